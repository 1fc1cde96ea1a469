"""An engine's worker that commits faults when it loads weights.

Run as ``python -m lockstep.faults.in_worker WORKER_MODULE …`` inside the engine's environment, where it runs
the worker's module with two of its classes extended: the engine's front, and what is mixed into vLLM's own
worker beside the model. Which faults the next load has lies in a file beside the weights (``at_load.py``);
without it, every load is as it should be.
"""

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from lockstep.engines.worker import vllm_terms as terms
from lockstep.engines.worker.vllm_extension import WeightsExtension
from lockstep.records.messages import Load
from lockstep.records.versions import LoadReceipt

PLAN = "planted"
"""The file's name: one fault a line, removed when the load has returned."""


def planned(directory: Path) -> frozenset[str]:
    """Faults of the load that is under way."""
    try:
        return frozenset((directory / PLAN).read_text().split())
    except FileNotFoundError:
        return frozenset()


class PlantedWeights(WeightsExtension):
    """Loads that lose everything, or leave the head's packed copy stale."""

    lockstep_planned: frozenset[str] = frozenset()

    def lockstep_load(self, path: str, version: int) -> dict[str, Any]:
        """See :class:`WeightsExtension`."""
        self.lockstep_planned = planned(Path(path).parent)
        return super().lockstep_load(path, version)

    def lockstep_deliver(self, tensors: Iterator[tuple[str, Any]]) -> None:
        """See :class:`WeightsExtension`."""
        if "not_delivered" not in self.lockstep_planned:
            super().lockstep_deliver(tensors)

    def lockstep_repack(self) -> list[str]:
        """See :class:`WeightsExtension`."""
        return [] if self.lockstep_planned & {"not_delivered", "stale_head"} else super().lockstep_repack()


def planted_engine(engine: type[terms.VllmWorker]) -> type[terms.VllmWorker]:
    """The engine's front with loads that may leave its caches as they are."""

    whole = engine.load

    class Planted(engine):
        async def load(self, request: Load) -> LoadReceipt:
            directory = Path(self.config.weights_dir)
            keeps = "keep_cache" in planned(directory)
            try:
                with _kept_cache(self.llm) if keeps else nullcontext():
                    return await whole(self, request)
            finally:
                (directory / PLAN).unlink(missing_ok=True)

    return Planted


@contextmanager
def _kept_cache(llm: Any) -> Iterator[None]:
    """V1's prefix cache is not cleared, whether the version has a pause or none."""
    pause = getattr(llm, "pause_generation", None)

    async def pause_only(**settings: Any) -> Any:
        return await pause(**(settings | {"clear_cache": False})) if pause else None

    async def no_reset() -> bool:
        return False

    own = {"reset_prefix_cache": no_reset} | ({"pause_generation": pause_only} if pause else {})
    vars(llm).update(own)
    try:
        yield
    finally:
        for name in own:
            del vars(llm)[name]  # the class's own again


def main() -> None:
    """Run the worker's module as if it had been run itself."""
    module = sys.argv.pop(1)
    serve = terms.serve
    code = cast(Any, terms)
    code.serve = lambda engine: serve(planted_engine(engine))
    code.EXTENSION = "lockstep.faults.in_worker.PlantedWeights"
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
