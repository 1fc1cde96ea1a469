"""Faults of the engine's own loads, which no proxy can commit: they happen beside the model.

trainer ── names ──► [weights directory]/planted                        an engine with a process of its own
   └── load ──► the worker, started by in_worker.py, reads them ──► it removes the file: they were committed
"""

from pathlib import Path
from typing import Any, cast

from lockstep.engines.base import Engine
from lockstep.errors import EngineError
from lockstep.faults.in_worker import PLAN
from lockstep.faults.relay import Relay
from lockstep.loop.open import Plants
from lockstep.records.versions import LoadMode, LoadReceipt, WeightUpdate

LAUNCHER = "lockstep.faults.in_worker"


def plants(names: tuple[str, ...] = ()) -> Plants:
    """For a session whose engine commits ``names`` at every load.

    With none, one whose engine can be made to later (:class:`AtLoad`).
    """
    return Plants(LAUNCHER, lambda engine: AtLoad(engine, names) if names else engine)


class AtLoad(Relay):
    """An engine that commits faults at every load.

    Args:
        inner: in this process, or with a worker that :data:`LAUNCHER` runs.
        names: of :data:`lockstep.faults.catalogue.AT_LOAD`.
    """

    def __init__(self, inner: Engine, names: tuple[str, ...]) -> None:
        super().__init__(inner, *names)
        self._names = names

    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`.

        Raises:
            EngineError: when the engine's worker does not know how to commit a fault, or will not.
        """
        return self._in_worker(update, mode) if self.ready.pids else self._in_process(update, mode)

    def _in_worker(self, update: WeightUpdate, mode: LoadMode) -> LoadReceipt:
        names = ", ".join(self._names)
        if not update.path:
            expected = "weights in a file, beside which it is told"
            hint = "--set engine.weights=shared_memory"
            raise EngineError(
                "engine, load", got=f"{names} planted in a broadcast", expected=expected, hint=hint
            )
        plan = Path(update.path).with_name(PLAN)
        plan.write_text("\n".join(self._names))
        try:
            receipt = self.inner.load(update, mode)
            if plan.exists():
                got = f"a worker that does not commit {names}"
                expected = f"one that was started by {LAUNCHER}"
                raise EngineError(
                    "engine, load", got=got, expected=expected, hint="open_session(…, plants=plants())"
                )
            return receipt
        finally:
            plan.unlink(missing_ok=True)

    def _in_process(self, update: WeightUpdate, mode: LoadMode) -> LoadReceipt:
        """Nothing is packed and no cache outlives a request there: a load can only be lost."""
        self.inner.need("load")
        if "not_delivered" not in self._names:
            return self.inner.load(update, mode)
        import torch

        engine = self.inner
        while isinstance(engine, Relay):
            engine = engine.inner
        weights = cast(Any, engine).model.state_dict()
        before = {name: tensor.clone() for name, tensor in weights.items()}
        receipt = self.inner.load(update, mode)
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(before[name])
        return receipt
