"""A deadline for somebody else's code in this thread.

    main thread      with deadline(60): theirs() ◄──signal: Overdue──┐
    watching thread       waits ────────60 s─────────────────────────┴─► again every second, if swallowed

The signal is one of its own, so that code with an alarm of its own keeps that. What never comes back to the
interpreter cannot be interrupted so: that needs a process of its own (``reward_workers.py``).
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR1 - 7) + 7
AGAIN_S = 1.0


class Overdue(BaseException):
    """The deadline has passed. No ``Exception``: code that retries on every one of those would go on."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise :class:`Overdue` in the body once it has taken so long. 0: never.

    Signals reach the main thread; others have none.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    under_way = True
    ended = threading.Event()

    def overdue(number: int, frame: object) -> None:
        if under_way:
            raise Overdue

    def watch(main: int) -> None:
        wait = seconds
        while not ended.wait(wait):
            signal.pthread_kill(main, SIGNAL)
            wait = AGAIN_S

    before = signal.signal(SIGNAL, overdue)
    watching = threading.Thread(
        target=watch, args=[threading.get_ident()], name="reward-deadline", daemon=True
    )
    watching.start()
    try:
        try:
            yield
        finally:
            under_way = False
    finally:
        under_way = False  # once more: the signal may have come just before the first
        ended.set()
        watching.join()
        signal.signal(SIGNAL, before)
