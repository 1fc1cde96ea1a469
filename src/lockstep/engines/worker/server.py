"""Serve one engine over a Unix socket.

    trainer ──Request──► [socket in a 0700 directory] ──► serve() ──► engine.sample / score / load
            ◄──Reply────                                        ◄──

One task reads frames and starts one task per request, so that a long sample does not hold up a score.
``Load`` waits for every sample in flight and holds up those that come after it, so that no completion spans
two weight versions; in its other modes it does not wait, and the engine says which tokens each version drew.

The trainer passes the listening socket and the read end of a *lifeline* pipe as inherited descriptors. The
pipe's end of file means that the trainer is gone, however it died; the worker then ends its whole process
group, so nothing is orphaned. It ends likewise when a process of the engine's is gone.
"""

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import socket
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from lockstep.engines.worker.group import end_group
from lockstep.errors import ProtocolError
from lockstep.records.messages import (
    MAX_FRAME_BYTES,
    Abort,
    Aborted,
    Count,
    Counted,
    Draw,
    Drawn,
    Failure,
    Load,
    Loaded,
    Ready,
    Reply,
    Request,
    Score,
    Scored,
    decode_request,
    encode,
    number_of,
)
from lockstep.records.tokens import Completion, Scores
from lockstep.records.versions import LoadReceipt

_LENGTH = struct.Struct("<I")
T = TypeVar("T")
LAST_WORDS_S = 1.0
"""How long the replies that say why an engine died may take to leave."""


class ServedEngine(Protocol):
    """What an engine must do inside its worker."""

    def ready(self) -> Ready:
        """Who the engine is and what it resolved to."""
        ...

    async def sample(self, request: Draw) -> list[Completion]:
        """All completions of all prompts, in prompt order, then sample order."""
        ...

    async def score(self, request: Score) -> list[Scores]:
        """One entry for each sequence, in order."""
        ...

    async def load(self, request: Load) -> LoadReceipt:
        """Replace the weights; nothing samples meanwhile."""
        ...

    async def abort(self, draws: Sequence[int]) -> int:
        """End the samples in flight of these requests, of all where none is named; returns how many."""
        ...

    def counters(self) -> dict[str, float]:
        """What the engine counted since its start; empty where its statistics are off."""
        ...

    def ended_by(self, error: Exception) -> bool:
        """True when ``error``, raised by a request, says that the engine is gone."""
        ...


class BadRequestError(Exception):
    """A request or an option that is the user's to mend. ``args``: message, expected, hint."""


def run(
    listener_fd: int, lifeline_fd: int, start: Callable[[], Awaitable[ServedEngine]], scratch: Sequence[str]
) -> None:
    """Start the engine and serve it until the trainer's end, or the engine's death.

    Args:
        scratch: directories to remove when the trainer is gone and cannot.
    """
    asyncio.run(_run(listener_fd, lifeline_fd, start, scratch))


async def _run(
    listener_fd: int, lifeline_fd: int, start: Callable[[], Awaitable[ServedEngine]], scratch: Sequence[str]
) -> None:
    keep_from_forks(listener_fd, lifeline_fd)
    loop = asyncio.get_running_loop()
    loop.add_reader(lifeline_fd, end_with_trainer, scratch)
    listener = socket.socket(fileno=listener_fd)
    try:
        engine = await start()
        ready = encode(engine.ready())
    except BaseException as error:
        traceback.print_exc()
        await _refuse(listener, failure_of(0, error, fatal=True))
        sys.exit(1)
    # Processes that the engine started through multiprocessing: an end of one is seen at once, and not by a
    # request that hangs.
    for child in multiprocessing.active_children():
        loop.add_reader(child.sentinel, end_with_child, child)
    async with await asyncio.start_unix_server(_Server(engine, ready).serve_peer, sock=listener) as server:
        await server.serve_forever()


def keep_from_forks(*descriptors: int) -> None:
    """Close them in children that this process forks.

    A listener that outlived it there would hide its end from the trainer.
    """
    owner = os.getpid()

    def close() -> None:
        if os.getppid() == owner:  # a child's own children have other files under these numbers
            for descriptor in descriptors:
                os.close(descriptor)

    os.register_at_fork(after_in_child=close)


async def _refuse(listener: socket.socket, failure: Failure) -> None:
    """Tell the waiting trainer why the engine did not start."""
    listener.setblocking(False)
    peer, _ = await asyncio.get_running_loop().sock_accept(listener)
    body = encode(failure)
    await asyncio.get_running_loop().sock_sendall(peer, _LENGTH.pack(len(body)) + body)
    peer.close()


def end_with_trainer(scratch: Sequence[str]) -> None:
    """The trainer is gone: remove what it left, then end."""
    for directory in scratch:
        shutil.rmtree(directory, ignore_errors=True)
    end_process_group()


def end_with_child(child: BaseProcess) -> None:
    """A process of the engine is gone: end too, for what was asked of it may never be answered."""
    loop = asyncio.get_running_loop()
    loop.remove_reader(child.sentinel)
    print(
        f"lockstep: {child.name} (pid {child.pid}) is gone, exit code {child.exitcode}",
        file=sys.stderr,
        flush=True,
    )
    loop.call_later(LAST_WORDS_S, end_process_group)


def end_process_group() -> None:
    """End this process and everything it started, at once."""
    end_group(os.getpgrp())


def failure_of(request_id: int, error: BaseException, *, fatal: bool = False) -> Failure:
    """The reply that carries ``error`` to the trainer."""
    if isinstance(error, BadRequestError):
        message, expected, hint = error.args
        return Failure(id=request_id, message=message, expected=expected, hint=hint, usage=True, fatal=fatal)
    return Failure(id=request_id, message=f"{type(error).__name__}: {error}"[:4000], fatal=fatal)


class _Server:
    def __init__(self, engine: ServedEngine, ready: bytes) -> None:
        self.engine = engine
        self.ready = ready
        self._sampling: set[asyncio.Task] = set()
        self._loading = asyncio.Lock()

    async def serve_peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one peer's frames until it closes the stream or announces an impossible frame."""
        tasks: set[asyncio.Task] = set()
        _send(writer, self.ready)
        try:
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if length > MAX_FRAME_BYTES:
                    return
                frame = await reader.readexactly(length)
                try:
                    request = decode_request(frame)
                except ProtocolError as error:
                    refused = Failure(
                        number_of(frame),
                        f"malformed frame: {error.got}",
                        error.expected,
                        error.hint,
                        usage=True,
                    )
                    _send(writer, refused)
                    await writer.drain()
                    continue
                task = asyncio.create_task(self._answer(request, writer))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for task in tasks:
                task.cancel()
            writer.close()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        try:
            reply: Reply = await self._reply(request)
        except asyncio.CancelledError as error:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise  # nobody waits any more
            # An engine's own: without a reply the trainer would wait for one to its deadline.
            reply = failure_of(request.id, error)
        except Exception as error:
            traceback.print_exc()
            reply = failure_of(request.id, error, fatal=self.engine.ended_by(error))
        # The trainer may be gone meanwhile; then the lifeline says so.
        with contextlib.suppress(ConnectionError):
            _send(writer, _fitting(request, reply))
            await writer.drain()
        # Only after the reply is on its way: it says what the trainer would else have to read from a log.
        if isinstance(reply, Failure) and reply.fatal:
            end_process_group()

    async def _reply(self, request: Request) -> Reply:
        match request:
            case Draw():
                return Drawn(request.id, await self._tracked(lambda: self.engine.sample(request)))
            case Score():
                return Scored(request.id, await self._tracked(lambda: self.engine.score(request)))
            case Load():
                async with self._loading:
                    # Holding the lock: what comes meanwhile waits behind the load, or samples would come for
                    # ever.
                    if self._sampling and request.mode == "wait":
                        await asyncio.wait(self._sampling)
                    return Loaded(request.id, await self.engine.load(request))
            case Abort():
                return Aborted(request.id, await self.engine.abort(request.draws))
            case Count():
                return Counted(request.id, self.engine.counters())

    async def _tracked(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with self._loading:
            task = asyncio.create_task(work())  # made only now: the peer may be gone before the load is over
            self._sampling.add(task)
            task.add_done_callback(self._sampling.discard)
        return await task


def _fitting(request: Request, reply: Reply) -> bytes:
    """The reply's frame, or that of a failure where nobody would take one of its size."""
    body = encode(reply)
    if len(body) <= MAX_FRAME_BYTES:
        return body
    what = f"{type(reply).__name__} of {len(body)} bytes"
    limit = f"at most {MAX_FRAME_BYTES}"
    return encode(
        Failure(request.id, f"a reply too large for a frame: {what}", limit, "ask in portions", usage=True)
    )


def _send(writer: asyncio.StreamWriter, reply: Reply | bytes) -> None:
    body = reply if isinstance(reply, bytes) else encode(reply)
    writer.write(_LENGTH.pack(len(body)))
    writer.write(body)
