"""Start an engine's worker in its own environment, talk to it, and notice when it dies.

    trainer process                                     worker's process group
      request() ──frame──► [socket, 0700 directory] ──►   worker ─► engine core ─► model
      reader thread ◄──────reply or end of file──────       │
      lifeline (write end) ───────end of file───────────────┘  trainer gone: the group ends itself

End of file on the socket means that the worker is gone, whatever ended it: every waiting request raises
:class:`EngineDied` with the end of the engine's log, and the whole process group is ended so that nothing is left behind.
"""

import contextlib
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lockstep
from lockstep.engines.worker.group import end_group
from lockstep.engines.worker.vllm_plugin import ENTRY_POINTS, METADATA
from lockstep.errors import EngineDied, EngineError, ProtocolError, UsageError
from lockstep.records.messages import Failure, Ready, Reply, Request, decode_reply, encode

_LENGTH = struct.Struct("<I")
LOG_TAIL_LINES = 15
CORE_ERROR = re.compile(r"^\(EngineCore[^)]*\) ERROR .*?\] (\w+(?:Error|Exception): .+)$", re.MULTILINE)
"""How vLLM's core logs what ended it; the error that reaches the worker only says "see root cause above"."""


class WorkerProcess:
    """One worker and the socket to it.

    Args:
        python: the interpreter of the engine's environment.
        module: the worker's module, run with ``-m``.
        config: the worker's configuration, JSON.
        env: the environment variables to run with.
        log_path: takes the worker's stdout and stderr.
    """

    def __init__(self, python: Path, module: str, config: bytes, env: dict[str, str], log_path: Path) -> None:
        self.log_path = log_path
        self.directory = Path(tempfile.mkdtemp(prefix="lockstep-"))
        self._replies: dict[int, Future[Reply]] = {0: Future()}
        self._next_id = 1
        self._lock = threading.Lock()
        self._closed = False
        self._start(python, module, config, env)
        self._reader = threading.Thread(target=self._read, name="engine-replies", daemon=True)
        self._reader.start()

    def _start(self, python: Path, module: str, config: bytes, env: dict[str, str]) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.directory / "engine.sock"))
        listener.listen(4)
        lifeline, self._lifeline = os.pipe()
        (self.directory / "config.json").write_bytes(config)
        # Only this package is lent to the foreign environment, never the trainer's site-packages.
        plugin = self.directory / "path" / "lockstep_engine-0.dist-info"
        plugin.mkdir(parents=True)
        (plugin / "METADATA").write_text(METADATA)
        (plugin / "entry_points.txt").write_text(ENTRY_POINTS)
        (self.directory / "path" / "lockstep").symlink_to(Path(lockstep.__file__).parent)
        env = env | {"PYTHONPATH": str(self.directory / "path"), "VLLM_RPC_BASE_PATH": str(self.directory)}
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as log:
            self._log_from = log.tell()
            self.popen = subprocess.Popen(
                [python, "-u", "-m", module, str(listener.fileno()), str(lifeline), self.directory / "config.json"],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(listener.fileno(), lifeline),
                start_new_session=True,
                cwd=self.directory,
            )
        os.close(lifeline)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(self.directory / "engine.sock"))
        listener.close()

    def wait_ready(self, timeout_s: float) -> Ready:
        """The worker's first message.

        Raises:
            EngineDied: when it ends before.
            EngineError, UsageError: when it says why it could not start.
        """
        try:
            reply = self._await(self._replies[0], "start", timeout_s)
            if not isinstance(reply, Ready):
                raise ProtocolError("engine start", got=type(reply).__name__, expected="Ready", hint=f"tail {self.log_path}")
        except BaseException:
            self.close()
            raise
        return reply

    def request(self, kind: type[Request], *args: Any, timeout_s: float = 1800.0) -> Reply:
        """Send ``kind(id, *args)`` and wait for its reply.

        Raises:
            EngineDied: when the worker is or goes away.
            EngineError, UsageError: when it answers with a failure.
        """
        with self._lock:
            number, self._next_id = self._next_id, self._next_id + 1
            future: Future[Reply] = Future()
            if self._closed:
                raise self._death()
            self._replies[number] = future
            body = encode(kind(number, *args))
            # A broken pipe is the worker's end; the reader thread fails the future.
            with contextlib.suppress(OSError):
                self._socket.sendall(_LENGTH.pack(len(body)) + body)
        return self._await(future, kind.__name__.lower(), timeout_s)

    def _await(self, future: "Future[Reply]", what: str, timeout_s: float) -> Reply:
        try:
            reply = future.result(timeout_s)
        except TimeoutError:
            self.close()
            raise EngineError(
                f"engine, {what}",
                got=f"no answer in {timeout_s:g} s",
                expected="a reply",
                hint=f"the engine was ended; its log is {self.log_path}",
            ) from None
        if isinstance(reply, Failure):
            if reply.fatal:
                self.close()
            error = UsageError if reply.usage else (EngineDied if reply.fatal else EngineError)
            hint = reply.hint if reply.usage else f"{reply.hint}: {self.log_path}{self._tail_text()}"
            got = reply.message if reply.usage else self._root_cause() or reply.message
            raise error(f"engine, {what}", got=got, expected=reply.expected, hint=hint)
        return reply

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as stream:
            while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
                (length,) = _LENGTH.unpack(head)
                body = stream.read(length)
                if len(body) < length:
                    break
                reply = decode_reply(body)
                future = self._replies.pop(0 if isinstance(reply, Ready) else reply.id, None)
                if future is not None:
                    future.set_result(reply)
        with self._lock:
            self._closed = True
            waiting, self._replies = list(self._replies.values()), {}
        self._end_group()
        for future in waiting:
            if not future.done():
                future.set_exception(self._death())

    def _death(self) -> EngineDied:
        return EngineDied(
            "engine process",
            got=f"its end (exit status {self.popen.poll()})",
            expected="a running engine",
            hint=f"the engine's log is {self.log_path}{self._tail_text()}",
        )

    def _root_cause(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._log_from)
            return next(reversed(CORE_ERROR.findall(log.read().decode(errors="replace"))), "")

    def _tail_text(self) -> str:
        return f", and ends:\n\n{tail(self.log_path, LOG_TAIL_LINES)}"

    def _end_group(self) -> None:
        end_group(self.popen.pid)
        self.popen.wait()

    def close(self) -> None:
        """End the worker and everything it started, at once: it holds nothing that is not the trainer's too."""
        self._end_group()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        shutil.rmtree(self.directory, ignore_errors=True)


def tail(path: Path, n_lines: int) -> str:
    """The last lines of a log file."""
    with contextlib.suppress(OSError):
        lines: Sequence[str] = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-n_lines:])
    return "(no log)"
