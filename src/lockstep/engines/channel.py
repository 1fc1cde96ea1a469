"""The trainer's end of a worker's socket: who waits for which reply, until when, and what becomes of all.

    any thread      post() ─ waiting[id] ─► [send lock, until the deadline] ──frame──► worker
                      │ future; ask() waits for it, until the deadline                   │
    reader thread   waiting[id] ◄── check_reply ◄── decode ◄── length ≤ limit ◄──frame───┘
                      │
                      └─ end of file, or a reply that cannot be: on_end(), and *every* future fails, told why

Nothing ends the reader silently, and nobody waits for longer than asked: the worker's bytes are not trusted
to be a reply, to be the right reply, or to come at all.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from lockstep.engines.replies import check_reply, describe, reply_limit
from lockstep.errors import EngineDied, LockstepError, ProtocolError, UsageError
from lockstep.records.messages import MAX_FRAME_BYTES, Failure, Ready, Reply, Request, decode_reply, encode

_LENGTH = struct.Struct("<I")
JOIN_S = 5.0
START = 0
"""The id under which the worker's first message is awaited."""


@dataclass(eq=False)
class _Waiting:
    request: Request | None
    limit: int
    future: "Future[Reply]" = field(default_factory=Future)


@dataclass(frozen=True)
class Posted:
    """A request that was sent."""

    number: int
    future: "Future[Reply]"


class Channel:
    """Requests and replies over one connected socket.

    Args:
        peer: the socket. From the start on, the worker's first message is waited for.
        on_end: called once when the stream has ended or broken, before anyone is told.
        death: the error of an end of file; called after ``on_end``.
    """

    def __init__(
        self, peer: socket.socket, on_end: Callable[[], None], death: Callable[[], EngineDied]
    ) -> None:
        self._peer = peer
        self._on_end = on_end
        self._death = death
        self._waiting = {START: _Waiting(None, reply_limit(None))}
        self._start = self._waiting[START].future
        self._next_id = START + 1
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._reason: LockstepError | None = None
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="engine-replies", daemon=True)
        self._reader.start()

    def ready(self, timeout_s: float) -> Ready | Failure:
        """The worker's first message.

        Raises:
            TimeoutError: when none came.
            EngineDied, ProtocolError: when the worker is gone, or said what it cannot.
        """
        reply = self._start.result(timeout_s)
        assert isinstance(reply, Ready | Failure)
        return reply

    def ask(self, make: Callable[[int], Request], timeout_s: float) -> Reply:
        """Send ``make(id)`` and wait for its reply.

        Raises:
            UsageError: when it is larger than a frame.
            TimeoutError: when it could not be sent, or no reply came.
            EngineDied, ProtocolError: when the worker is gone, or said what it cannot.
        """
        deadline = time.monotonic() + timeout_s
        return self.post(make, timeout_s).future.result(max(0.0, deadline - time.monotonic()))

    def post(self, make: Callable[[int], Request], timeout_s: float) -> Posted:
        """Send ``make(id)``; its reply, or the stream's end, is the future's.

        Raises:
            UsageError: when it is larger than a frame.
            TimeoutError: when it could not be sent.
            EngineDied, ProtocolError: when the worker is gone, or said what it cannot.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            number = self._next_id
            self._next_id += 1
        request = make(number)
        body = encode(request)
        if len(body) > MAX_FRAME_BYTES:
            expected = f"at most {MAX_FRAME_BYTES}"
            raise UsageError(
                f"engine, {describe(request)}",
                got=f"a request of {len(body)} bytes",
                expected=expected,
                hint="ask in portions",
            )
        waiting = _Waiting(request, reply_limit(request))
        with self._lock:
            if self._ended:
                raise self._why()
            # Before it is sent: the reply may come before this thread goes on.
            self._waiting[number] = waiting
        self._send(_LENGTH.pack(len(body)) + body, deadline)
        return Posted(number, waiting.future)

    def give_up(self, reason: LockstepError) -> None:
        """Let the others who wait know why the worker is about to be ended."""
        with self._lock:
            self._reason = self._reason or reason

    def close(self) -> None:
        """End the stream; everyone who waits is told. Safe to call twice, and from any thread."""
        with contextlib.suppress(OSError):  # the worker was faster
            self._peer.shutdown(socket.SHUT_RDWR)
        # ``on_end`` runs in the reader, and closes too.
        if threading.current_thread() is not self._reader:
            self._reader.join(JOIN_S)

    def _send(self, frame: bytes, deadline: float) -> None:
        """Raises TimeoutError while the worker, or another thread's earlier request, takes too long."""
        # The lock keeps frames whole; a frame that the deadline cuts off has broken the stream, and who asked
        # then ends the worker.
        if not self._sending.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        try:
            poller = select.poll()
            poller.register(self._peer, select.POLLOUT)
            left = memoryview(frame)
            while left:
                if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise TimeoutError
                try:
                    # Poll says that something fits, not that all does: a send that blocks would outwait the
                    # deadline.
                    left = left[self._peer.send(left, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    continue
        except TimeoutError:
            raise
        except (OSError, ValueError):
            return  # a broken pipe is the worker's end: the reader thread fails the future
        finally:
            self._sending.release()

    def _read(self) -> None:
        reason: LockstepError | None = None
        try:
            with self._peer.makefile("rb") as stream:
                while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
                    (length,) = _LENGTH.unpack(head)
                    self._refuse_oversize(length)
                    body = stream.read(length)
                    if len(body) < length:
                        break
                    self._take(body)
        except OSError:
            pass
        except ProtocolError as error:
            reason = error
        except Exception as error:  # whatever else a reply can bring about, nobody may be left waiting
            reason = ProtocolError(
                "engine, reply",
                got=f"a reply that ends in {type(error).__name__}: {error}",
                expected="a reply that can be read",
                hint="please report this",
            )
        self._end(reason)

    def _refuse_oversize(self, length: int) -> None:
        with self._lock:
            waiting = list(self._waiting.values())
        # Before a byte of the body is read: which request it answers is inside, so the largest that anybody
        # waits for is allowed.
        limit = max((entry.limit for entry in waiting), default=0)
        if length > limit:
            asked = ", ".join(describe(entry.request) for entry in waiting[:3]) or "nothing that was asked"
            raise ProtocolError(
                f"engine, reply to {asked}",
                got=f"a frame of {length} bytes",
                expected=f"at most {limit}",
                hint="the engine was ended: its worker is broken, or of another Lockstep",
            )

    def _take(self, body: bytes) -> None:
        reply = decode_reply(body)
        number = START if isinstance(reply, Ready) else reply.id
        with self._lock:
            waiting = self._waiting.get(number)
        if waiting is None:
            said = f": {reply.message[:2000]}" if isinstance(reply, Failure) else ""
            raise ProtocolError(
                "engine, reply",
                got=f"{type(reply).__name__} to request {number}, which nobody waits for{said}",
                expected=f"a reply to one of {sorted(self._waiting)[:8]}",
                hint="the engine was ended: its worker is broken, or of another Lockstep",
            )
        # It is still waited for while it is checked, so that a reply that cannot be is told to who asked.
        # Only this thread takes entries out.
        check_reply(waiting.request, reply)
        with self._lock:
            self._waiting.pop(number, None)
        waiting.future.set_result(reply)

    def _end(self, reason: LockstepError | None) -> None:
        with self._lock:
            self._ended = True
            self._reason = self._reason or reason
            waiting = list(self._waiting.values())
            self._waiting = {}
        # The group is ended before anyone is told: whoever is may start the next engine at once.
        try:
            self._on_end()
        finally:
            self._peer.close()
            for entry in waiting:
                entry.future.set_exception(self._why())

    def _why(self) -> LockstepError:
        """One of its own for each who waits: a traceback belongs to one thread."""
        if self._reason is None:
            return self._death()
        reason = self._reason
        return type(reason)(reason.boundary, got=reason.got, expected=reason.expected, hint=reason.hint)
