"""An engine that is known by what it logged alone: it draws nothing, scores nothing and takes no weights."""

from collections.abc import Sequence

import numpy as np

from lockstep.engines.base import Engine
from lockstep.errors import CapabilityError
from lockstep.records.capabilities import CAPABILITIES, Capability
from lockstep.records.messages import Ready
from lockstep.records.tokens import Completion, SamplingParams
from lockstep.records.versions import LoadMode, LoadReceipt, WeightUpdate

REASON = "needs a live engine: lockstep check RECIPE"


class LoggedEngine(Engine):
    """What drew the completions of a log.

    Which engine that was is not said, so that nothing is declared of it.

    Args:
        dtype: what its body computed in (``float32``), as the user says; empty where the user does not, and
            it is unknown.
        head_dtype: the same of its last matrix product.
    """

    def __init__(self, dtype: str = "", head_dtype: str = "") -> None:
        self.asked = {}
        said = {self.facts.parameter_dtype: dtype, self.facts.head_dtype: head_dtype}
        resolved = {key: f"torch.{name}" for key, name in said.items() if name}
        self.ready = Ready(
            engine="a log",
            version="unknown",
            generation="log",
            distribution="sampler",
            resolved=resolved,
            capabilities=dict.fromkeys(CAPABILITIES, Capability(False, REASON)),
            start_s=0.0,
        )

    def _sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        raise CapabilityError(
            "a log, sample", got=REASON, expected="completions", hint="lockstep check RECIPE"
        )

    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        raise AssertionError("unreachable: a log does not have this capability")

    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`."""
        self.need("load")
        raise AssertionError("unreachable: a log does not have this capability")

    def abort(self) -> int:
        """See :meth:`Engine.abort`."""
        return 0

    def close(self) -> None:
        """See :meth:`Engine.close`."""
