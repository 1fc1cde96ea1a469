"""An engine before another one: whatever is asked of it, it asks of that."""

from collections.abc import Sequence

import numpy as np

from lockstep.engines.base import Engine
from lockstep.records.tokens import Completion, SamplingParams
from lockstep.records.versions import LoadMode, LoadReceipt, WeightUpdate


class Relay(Engine):
    """Behaves as ``inner`` does, and says that it is altered.

    Args:
        alterations: by name; what alters ``inner`` stands before them.
    """

    at_once = 128
    """Each submitted request waits in a thread of its own for the inner engine, which draws many."""

    def __init__(self, inner: Engine, *alterations: str) -> None:
        self.inner = inner
        self.facts = inner.facts
        self.ready = inner.ready
        self.asked = inner.asked
        self.vocabulary = inner.vocabulary
        self.altered_by = (*inner.altered_by, *alterations)

    def sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """See :meth:`Engine.sample`.

        What a subclass makes of the completions is not checked: the ladder is to find it.
        """
        return self.inner.sample(prompts, params)

    def _sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        raise AssertionError("unreachable: sample is the inner engine's")

    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        return self.inner.score(sequences, temperature)

    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`."""
        return self.inner.load(update, mode)

    def abort(self) -> int:
        """See :meth:`Engine.abort`."""
        return self.inner.abort()

    def counters(self) -> dict[str, float]:
        """See :meth:`Engine.counters`."""
        return self.inner.counters()

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self.inner.close()
