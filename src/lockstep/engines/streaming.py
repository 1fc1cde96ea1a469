"""Requests under way, one prompt each: begun at once, told as they end.

    any thread       submit() ─► Handle ── begun by the adapter: a frame to a worker, a coroutine, a thread
                                   │ open, in Streams
    engine's thread  ends ─► completions checked ─► no longer open ─► ended(handle) ─► result() is there
                                                         │
    any thread       drain() waits for the last ◄────────┘   until its deadline

A request that comes while weights are loaded waits for the load (in the worker, in the server, in the lock of
an engine in this process). A handle always ends: in completions, in those of an abort, or in the engine's
error.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lockstep.records.tokens import Completion, SamplingParams

Completions = list[Completion]


@dataclass(frozen=True)
class Begun:
    """What an adapter made of a request."""

    future: "Future[Completions]"
    """Its completions, checked. Cancelled: it ended before it began."""
    cancel: Callable[[], object]
    """Have it end early; it still ends in :attr:`future`."""


@dataclass(eq=False)
class Handle:
    """One prompt's request under way."""

    prompt: np.ndarray
    """int32 [P]."""
    params: SamplingParams
    _outcome: "Future[Completions]" = field(default_factory=Future)
    _cancel: Callable[[], object] = lambda: None

    @property
    def done(self) -> bool:
        """True when it has ended."""
        return self._outcome.done()

    def result(self, timeout_s: float) -> Completions:
        """``params.n`` completions in sample order.

        Raises:
            TimeoutError: when it has not ended by then; it goes on.
            EngineError, UsageError: the engine's, as :meth:`Engine.sample` has it.
        """
        return self._outcome.result(timeout_s)

    def cancel(self) -> None:
        """Have it end early, with what there is: its finish reason is ``abort``. Returns at once."""
        self._cancel()


class Streams:
    """An engine's open handles, and threads for an adapter that has none of its own.

    Args:
        at_once: how many of these.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._open: set[Handle] = set()
        self._changed = threading.Condition()

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Made when first needed."""
        return ThreadPoolExecutor(self._at_once, "engine-requests")

    def __len__(self) -> int:
        return len(self._open)

    def follow(self, handle: Handle, begun: Begun, ended: Callable[[Handle], object]) -> None:
        """From now on the handle is open; once the request has ended, it is not, and ``ended`` is called."""
        with self._changed:
            self._open.add(handle)
        # Before the callback, which runs here and now where the request has ended already.
        handle._cancel = begun.cancel

        def settle(future: "Future[Completions]") -> None:
            try:
                # The outcome comes first: who was in ``drain`` asks for it next.
                handle._outcome.set_result(future.result())
            except CancelledError:
                handle._outcome.set_result(aborted(handle.params))
            except BaseException as error:
                handle._outcome.set_exception(error)
            with self._changed:
                self._open.discard(handle)
                self._changed.notify_all()
            # Outside the lock: this may submit the next request.
            ended(handle)

        begun.future.add_done_callback(settle)

    def drain(self, timeout_s: float) -> int:
        """Wait until none is open, or for so long; returns how many still are."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._open and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return len(self._open)

    def close(self) -> None:
        """Nothing is begun any more."""
        # Not made in order to be closed.
        if "pool" in self.__dict__:
            self.pool.shutdown(wait=False, cancel_futures=True)


def aborted(params: SamplingParams) -> Completions:
    """What a request comes to that ended before it drew anything."""
    return [Completion(0, sample, b"", b"", "abort", ()) for sample in range(params.n)]


def then(future: "Future", make: Callable[..., Completions]) -> "Future[Completions]":
    """A future of ``make(result)``; what either raises is its error."""
    made: Future[Completions] = Future()

    def go_on(done: "Future") -> None:
        try:
            made.set_result(make(done.result()))
        except BaseException as error:
            made.set_exception(error)

    future.add_done_callback(go_on)
    return made
