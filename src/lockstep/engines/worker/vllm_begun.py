"""Which requests of an ``AsyncLLM`` have their first token, so that an update can wait until all of them do.

    let_in ─► prefill ─► first token ─► … ─► left          before an update that keeps caches: ``all_begun``
       ╰── held while an update is under way

A prompt that is read when such an update comes would be read on by the new weights over what the old ones
left in its cache, or take from the prefix cache what they wrote; its first token would then be of the new
version by every count, and of both in truth. Nothing that the engine reports would say so.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from lockstep.engines.worker.vllm_names import internal_of


class FirstTokens:
    """Requests by the worker's names.

    Args:
        processor: the engine's ``OutputProcessor`` (vllm/v1/engine/output_processor.py), through which the
            tokens of every step come.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._open, self._stepped = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._names: set[str] = set()
        process = processor.process_outputs

        def then_tell(*args: Any, **kwargs: Any) -> Any:
            processed = process(*args, **kwargs)
            self._stepped.set()
            return processed

        processor.process_outputs = then_tell

    async def let_in(self, name: str) -> None:
        """Count a request that is about to be added; while an update is under way it waits."""
        await self._open.wait()
        self._names.add(name)

    def left(self, name: str) -> None:
        """Count it no more."""
        self._names.discard(name)
        self._stepped.set()

    @asynccontextmanager
    async def all_begun(self) -> AsyncIterator[None]:
        """Every request that was let in has its first token; others wait until the body has ended."""
        self._open.clear()
        try:
            while self._unbegun():
                self._stepped.clear()
                await self._stepped.wait()
            yield
        finally:
            self._open.set()

    def _unbegun(self) -> bool:
        prefilling: dict[str, bool] = {}
        for name, state in self._processor.request_states.items():
            if of := internal_of(name):  # one of several samples of a request, each with a state of its own
                prefilling[of.request] = prefilling.get(of.request, False) or state.is_prefilling
        # One without a state is being added, or has just ended: ``left`` tells.
        return any(prefilling.get(name, True) for name in self._names)
