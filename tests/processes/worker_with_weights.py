"""A worker that answers loads as vLLM's does, with a small module in vLLM's place: a body, and a packed head.

Beside the model runs what vLLM would mix into its own worker, and before it an engine's front of
``vllm_terms``. Its counters say what became of the weights.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

if __name__ == "__main__":  # as in an engine's environment, where nothing of the tests is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from lockstep.engines.worker import vllm_terms as terms
from lockstep.records.messages import Load, Ready
from lockstep.records.versions import LoadReceipt
from tests.worker_that_lies import READY


class OwnWorker:
    """vLLM's, with tensors of one number each."""

    def __init__(self) -> None:
        self.body, self.weight, self.packed = 0.0, 0.0, 0.0
        head = SimpleNamespace(
            cpu_linear=True, quant_method=SimpleNamespace(process_weights_after_loading=self._pack)
        )
        self.model_runner = SimpleNamespace(
            get_model=lambda: SimpleNamespace(lm_head=head), reload_weights=self.reload_weights
        )

    def _pack(self, head: Any) -> None:
        self.packed = self.weight

    def reload_weights(self, weights_iterator: Any) -> None:
        for name, tensor in weights_iterator:
            setattr(self, name, float(tensor))


class Llm:
    """vLLM's front: it pauses and it clears."""

    def __init__(self) -> None:
        self.cleared = 0

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.cleared += clear_cache

    async def reset_prefix_cache(self) -> bool:
        self.cleared += 1
        return True


class OwnV1(terms.VllmWorker):
    """As ``vllm_v1.V1Worker``."""

    async def start(self) -> "OwnV1":
        module, _, name = terms.EXTENSION.rpartition(".")
        extended = type("Worker", (OwnWorker, getattr(importlib.import_module(module), name)), {})
        self.llm, self.worker = Llm(), extended()
        return self

    def ready(self) -> Ready:
        return msgspec.structs.replace(READY, resolved={"mixed_in": terms.EXTENSION})

    async def load(self, request: Load) -> LoadReceipt:
        path = terms.checked_path(self.config, request)
        await self.llm.pause_generation(mode="wait", clear_cache=True)
        loaded = self.worker.lockstep_load(str(path), request.update.version)
        cleared = await self.llm.reset_prefix_cache()
        self.version = request.update.version
        return self.receipt(loaded, cleared, 0.0)

    def counters(self) -> dict[str, float]:
        worker = self.worker
        return {
            "body": worker.body,
            "weight": worker.weight,
            "packed": worker.packed,
            "cleared": self.llm.cleared,
        }

    def params(self, params: Any, **extra: Any) -> Any:
        raise NotImplementedError

    async def generate(self, name: str, ids: list[int], params: Any) -> Any:
        raise NotImplementedError

    async def abort(self, draws) -> int:
        return 0


if __name__ == "__main__":
    terms.serve(OwnV1)
