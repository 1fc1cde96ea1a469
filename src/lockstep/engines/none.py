"""No engine: for training on what is in a file. Whatever is asked of it, it says so."""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from lockstep.engines.base import Engine
from lockstep.errors import CapabilityError
from lockstep.records.capabilities import CAPABILITIES, Capability
from lockstep.records.messages import Ready
from lockstep.records.tokens import Completion, SamplingParams
from lockstep.records.versions import LoadMode, LoadReceipt, WeightUpdate

WHY = "no engine runs in an offline loop"


class NoEngine(Engine):
    """Draws nothing, scores nothing, loads nothing."""

    def __init__(self) -> None:
        can = {name: Capability(False, WHY) for name in CAPABILITIES}
        self.ready = Ready("none", "", "none", "model", {}, can, 0.0)
        self.asked = {}

    def _sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        self._refuse("sample")

    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        self._refuse("score")

    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`."""
        self._refuse("load")

    def abort(self) -> int:
        """See :meth:`Engine.abort`."""
        return 0

    def close(self) -> None:
        """See :meth:`Engine.close`."""

    def _refuse(self, what: str) -> NoReturn:
        raise CapabilityError(f"engine, {what}", got=WHY, expected="an engine", hint="--set loop.kind=sync")
