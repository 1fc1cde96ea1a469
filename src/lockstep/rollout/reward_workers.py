"""Rewards in processes of their own: what one does to its process, the trainer survives and tells.

    trainer                                    worker (one of task.reward_workers)
      rewards() ─ thread each ──Question──►      reward(completion, item)
         │            ▲──────────Answer─────────────┘
         └ in order   └─ end of file, or the deadline: the worker's group is ended, the completion is shown

Frames are msgpack: nothing that could run is sent either way.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from lockstep.config.recipe import TaskConfig
from lockstep.errors import RecipeError
from lockstep.rollout.reward_frames import (
    ANSWER_LIMIT,
    Answer,
    Question,
    Setup,
    encode,
    receive,
    send,
    unsendable,
)
from lockstep.rollout.rewards import Item, refused

START_S = 120.0
"""How long a worker's start may take: an interpreter, the user's module and what it imports."""
REAP_S = 5.0


class RewardWorkers:
    """``config.reward_workers`` processes.

    The first is started at once, so that what cannot be is said at once.

    Raises:
        RecipeError: when the reward cannot be had in them.
    """

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._live: set[_Worker] = set()
        self._closing = threading.Event()
        self._idle.put(self._started())
        for _ in range(config.reward_workers - 1):
            self._idle.put(None)  # a place, whose process is started by whoever takes it

    def rewards(self, completions: Sequence[str], items: Sequence[Item]) -> Iterator[float]:
        """What each completion is worth, in order.

        Raises:
            RewardError: at the first that has none.
            RecipeError: for an item that cannot be sent.
        """
        frames = [_frame(completion, item) for completion, item in zip(completions, items, strict=True)]
        self._closing.clear()
        pool = ThreadPoolExecutor(self._config.reward_workers, thread_name_prefix="rewards")
        try:
            waiting = [pool.submit(self._one, *each) for each in zip(frames, completions, items, strict=True)]
            for future in waiting:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self.close()
            raise
        finally:
            pool.shutdown()

    def close(self) -> None:
        """End every worker, in the middle of a reward too.

        Another call of :meth:`rewards` starts new ones.
        """
        self._closing.set()
        for worker in list(self._live):
            worker.end()

    def _one(self, frame: bytes, completion: str, item: Item) -> float:
        worker = self._idle.get()
        try:
            if worker is None or worker.process.poll() is not None:
                worker = self._started()
            answer = worker.ask(frame, self._config.reward_timeout_s)
        except _GoneError as gone:
            if worker is not None:
                self._ended(worker)
            worker = None
            raise refused(self._config.reward, str(gone), completion, item) from None
        finally:
            self._idle.put(worker)
        if answer.error:
            raise refused(self._config.reward, answer.error, completion, item)
        return answer.value

    def _started(self) -> "_Worker":
        if self._closing.is_set():
            raise _GoneError("it was ended")
        worker = _Worker()
        self._live.add(worker)
        try:
            answer = worker.ask(encode(Setup(self._config, self._seed)), START_S)
        except _GoneError as gone:
            self._ended(worker)
            raise RecipeError(
                "recipe, key task.reward",
                got=f"{self._config.reward!r}: {gone} when it was set up",
                expected="a reward that a process of its own can compute",
                hint="--set task.reward_workers=0  computes it in the trainer's process",
            ) from None
        if answer.recipe_error is not None:
            self._ended(worker)
            boundary, got, expected, hint = answer.recipe_error
            raise RecipeError(boundary, got=got, expected=expected, hint=hint)
        return worker

    def _ended(self, worker: "_Worker") -> None:
        worker.end()
        self._live.discard(worker)


class _GoneError(Exception):
    """A worker that will not answer any more. ``str``: why."""


class _Worker:
    def __init__(self) -> None:
        self._peer, theirs = socket.socketpair()
        with theirs:
            # ``-m`` would put the working directory before all others on the import path; ``-P`` does not.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lockstep.rollout.reward_worker", str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward prints is no part of a --json document
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )

    def ask(self, frame: bytes, timeout_s: float) -> Answer:
        """Raises _GoneError when there is no answer, and will be none."""
        until = time.monotonic() + timeout_s if timeout_s else None
        try:
            send(self._peer, frame, until)
            return msgspec.msgpack.decode(receive(self._peer, ANSWER_LIMIT, until), type=Answer)
        except TimeoutError:
            raise _GoneError(f"no answer in {timeout_s:g} s") from None
        except (EOFError, OSError):
            raise _GoneError(f"the end of its process ({self._fate()})") from None
        except (ValueError, msgspec.MsgspecError) as error:
            raise _GoneError(f"no answer that can be read ({error})") from None

    def _fate(self) -> str:
        try:
            status = self.process.wait(REAP_S)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(REAP_S)
        self._peer.close()


def _frame(completion: str, item: Item) -> bytes:
    odd = unsendable(item)
    try:
        if not odd:
            return encode(Question(completion, dict(item)))
    except (TypeError, OverflowError, ValueError) as error:
        odd = str(error)
    raise RecipeError(
        "recipe, key task.reward_workers",
        got=f"a question that cannot be sent to another process: {odd}",
        expected="text, numbers, true, false, none, bytes, lists and mappings of these",
        hint="--set task.reward_workers=0, or mend the dataset",
    )
