"""Start an engine's worker in its own environment, talk to it, and notice when it dies.

    trainer process                                     worker's process group
      channel.ask() ──frame──► [socket, 0700 directory] ─►  worker ─► engine core ─► model
      reader thread ◄────reply or end of file──────────       │
      lifeline (write end) ───────end of file─────────────────┘  trainer gone: the group ends itself

End of file on the socket means that the worker is gone, whatever ended it: every waiting request raises
:class:`EngineDied` with the end of the engine's log, and the whole process group is ended so that nothing is
left behind: what the engine's processes write as temporary files lies in the private directory too, which
goes with them. The constructor returns while the engine starts; :meth:`WorkerProcess.close` ends it then as
it does later, at once.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import lockstep
from lockstep.engines.channel import Channel, Posted
from lockstep.engines.replies import describe
from lockstep.engines.worker.group import end_group
from lockstep.errors import EngineDied, EngineError, UsageError
from lockstep.records.messages import Failure, Ready, Reply, Request

R = TypeVar("R", bound=Reply)
LOG_TAIL_LINES, LOG_TAIL_BYTES = 15, 1 << 16
LOG_READ_BYTES = 1 << 24
"""How much of a log's end is read: what ended an engine stands far above its last lines."""
PREFIX, TEMPORARY = "lockstep-", "tmp"
SHORT_PATH = 107 - len(f"/{PREFIX}12345678/{TEMPORARY}/") - 36
"""A Unix socket's path has at most 107 bytes; an engine names its own by UUIDs in its temporary directory."""
SHORT_ROOTS = ("/tmp", "/var/tmp", "/dev/shm")
SHARED = Path("/dev/shm")
SCARCE_BYTES = 64 << 20
REAP_S = 10.0
METADATA = "Metadata-Version: 2.1\nName: lockstep-engine\nVersion: 0\n"


@dataclass(frozen=True)
class WorkerProgram:
    """What a worker runs, as its adapter declares it."""

    module: str
    """The module that the worker's interpreter runs with ``-m``."""
    launcher: str = ""
    """A module that is run instead and runs that one, whose name is its first argument."""
    entry_points: str = ""
    """``entry_points.txt`` of what the engine's processes load of ours when they start."""
    temporary: tuple[str, ...] = ()
    """Variables, besides ``TMPDIR``, by which the engine is told where temporary files and sockets go."""
    root_cause: re.Pattern[str] | None = None
    """How the engine logs what ended it, as group 1, where the worker's error only points at the log."""

    @property
    def command(self) -> list[str]:
        """The interpreter's arguments."""
        # Unbuffered: what a killed worker said last is in the log.
        return ["-u", "-m", *([self.launcher] if self.launcher else []), self.module]


class WorkerProcess:
    """One worker and the socket to it.

    Args:
        python: the interpreter of the engine's environment.
        program: what it runs.
        config: the worker's configuration, JSON.
        env: the environment variables to run with.
        log_path: takes the worker's stdout and stderr.

    Raises:
        EngineError: when the process cannot be started at all.
    """

    def __init__(
        self, python: Path, program: WorkerProgram, config: bytes, env: dict[str, str], log_path: Path
    ) -> None:
        self.program = program
        self.log_path = log_path
        self.directory = private_directory()
        self._lifeline = -1
        try:
            peer = self._start(python, config, env)
        except BaseException as error:
            shutil.rmtree(self.directory, ignore_errors=True)
            if isinstance(error, OSError):
                raise EngineError(
                    "engine, start",
                    got=f"{type(error).__name__}: {error}",
                    expected=f"a process of {python}",
                    hint="lockstep engines list  shows what is installed",
                ) from error
            raise
        self._channel = Channel(peer, self._end_group, self._death)

    def _start(self, python: Path, config: bytes, env: dict[str, str]) -> socket.socket:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(self.directory / "engine.sock"))
            # Bound before the worker starts: the connection below waits in the kernel's queue, so nobody
            # polls for a file, and a worker that dies before it accepts is an end of file.
            listener.listen(4)
            self._write_files(config)
            temporary = dict.fromkeys(("TMPDIR", *self.program.temporary), str(self.directory / TEMPORARY))
            env = env | temporary | {"PYTHONPATH": str(self.directory / "path")}
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(_private_log(self.log_path))
            # A resumed run appends to its log: what an earlier engine died of is not this one's cause.
            self._log_from = log.tell()
            # Python makes descriptors close-on-exec, so this process alone holds the end that is written to,
            # and the pipe ends when it does, however that comes.
            lifeline, write_end = os.pipe()
            stack.callback(os.close, lifeline)
            held = contextlib.ExitStack()  # what outlives this function, unless it fails
            held.callback(os.close, write_end)
            with held:
                peer = held.enter_context(socket.socket(socket.AF_UNIX))
                self.popen = subprocess.Popen(
                    [
                        python,
                        *self.program.command,
                        str(listener.fileno()),
                        str(lifeline),
                        self.directory / "config.json",
                    ],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(listener.fileno(), lifeline),
                    # Ctrl-C reaches the terminal's group; the engine's own is ended in order by this process.
                    start_new_session=True,
                    # ``-m`` puts the working directory before all others on the import path: not the user's.
                    cwd=self.directory,
                )
                peer.connect(str(self.directory / "engine.sock"))
                held.pop_all()
        self._lifeline = write_end
        return peer

    def _write_files(self, config: bytes) -> None:
        (self.directory / "config.json").write_bytes(config)
        (self.directory / TEMPORARY).mkdir(0o700)
        # Only this package is lent to the foreign environment, never the trainer's site-packages.
        plugin = self.directory / "path" / "lockstep_engine-0.dist-info"
        plugin.mkdir(parents=True)
        # A directory of this form is a distribution to importlib.metadata, where an engine looks for plugins;
        # nothing is installed into the environment that is lent.
        (plugin / "METADATA").write_text(METADATA)
        (plugin / "entry_points.txt").write_text(self.program.entry_points)
        (self.directory / "path" / "lockstep").symlink_to(Path(lockstep.__file__).parent)

    def wait_ready(self, timeout_s: float) -> Ready:
        """The worker's first message.

        Raises:
            EngineDied: when it ends before.
            EngineError, UsageError: when it says why it could not start.
            ProtocolError: when it says something else first.
        """
        try:
            return self._answer(Ready, describe(None), timeout_s, lambda: self._channel.ready(timeout_s))
        except BaseException:
            self.close()
            raise

    def request(self, expected: type[R], kind: type[Request], *args: Any, timeout_s: float = 1800.0) -> R:
        """Send ``kind(id, *args)`` and wait for its reply.

        Raises:
            EngineDied: when the worker is or goes away.
            EngineError, UsageError: when it answers with a failure, or not in time.
            ProtocolError: when what comes is no answer to this request.
        """

        def make(number: int) -> Request:
            return kind(number, *args)

        return self._answer(
            expected, describe(make(0)), timeout_s, lambda: self._channel.ask(make, timeout_s)
        )

    def post(self, kind: type[Request], *args: Any, timeout_s: float = 60.0) -> Posted:
        """Send ``kind(id, *args)`` and go on. What its future comes to, :meth:`answer` reads.

        Raises:
            EngineDied, EngineError: when the worker is gone, or does not take it in that time.
        """
        try:
            return self._channel.post(lambda number: kind(number, *args), timeout_s)
        except TimeoutError:
            raise self._overdue(f"taking {describe(kind(0, *args))}", timeout_s) from None

    def answer(self, expected: type[R], what: str, reply: Reply) -> R:
        """A reply as what was expected. Raises EngineError, UsageError where it is a failure."""
        if isinstance(reply, Failure):
            raise self._failure(reply, what)
        assert isinstance(reply, expected)  # the channel has checked it
        return reply

    def _answer(self, expected: type[R], what: str, timeout_s: float, wait: Callable[[], Reply]) -> R:
        try:
            reply = wait()
        except TimeoutError:
            raise self._overdue(what, timeout_s) from None
        return self.answer(expected, what, reply)

    def _overdue(self, what: str, timeout_s: float) -> EngineError:
        """The worker is ended: nobody is left waiting for one that does not answer."""
        overdue = EngineError(
            f"engine, {what}",
            got=f"no answer in {timeout_s:g} s",
            expected="a reply",
            hint=f"the engine was ended; its log is {self.log_path}{self._tail_text()}",
        )
        # Told to the others first: once the worker ends, theirs would be the error of a death that has no
        # cause.
        self._channel.give_up(overdue)
        self.close()
        return overdue

    def _failure(self, reply: Failure, what: str) -> EngineError | UsageError:
        # Before the log is read: the engine's last words are in it once its processes are gone.
        if reply.fatal:
            self.close()
        error = UsageError if reply.usage else (EngineDied if reply.fatal else EngineError)
        hint = reply.hint if reply.usage else f"{reply.hint}: {self.log_path}{self._tail_text()}"
        got = reply.message if reply.usage else self._root_cause() or reply.message
        return error(f"engine, {what}", got=got, expected=reply.expected, hint=hint)

    def _death(self) -> EngineDied:
        return EngineDied(
            "engine process",
            got=f"its end (exit status {self.popen.poll()})",
            expected="a running engine",
            hint=f"{scarce_memory(SHARED)}the engine's log is {self.log_path}{self._tail_text()}",
        )

    def _root_cause(self) -> str:
        pattern = self.program.root_cause
        if pattern is not None:
            with contextlib.suppress(OSError), self.log_path.open("rb") as log:
                log.seek(max(self._log_from, log.seek(0, os.SEEK_END) - LOG_READ_BYTES))
                return next(reversed(pattern.findall(log.read().decode(errors="replace"))), "")
        return ""

    def _tail_text(self) -> str:
        return f", and ends:\n\n{tail(self.log_path, LOG_TAIL_LINES)}"

    def _end_group(self) -> None:
        end_group(self.popen.pid)
        # A killed process that the kernel does not let go of.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(REAP_S)

    def close(self) -> None:
        """End the worker and all that it started, at once: it holds nothing that is not the trainer's too."""
        self._end_group()
        self._channel.close()
        lifeline = self._lifeline
        self._lifeline = -1
        if lifeline >= 0:
            os.close(lifeline)
        shutil.rmtree(self.directory, ignore_errors=True)


def _private_log(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")


def private_directory() -> Path:
    """A new 0700 directory whose path leaves room for the names of sockets in it, however long ``TMPDIR`` is.

    Raises:
        EngineError: when no directory with a short path can be written.
    """
    own = tempfile.gettempdir()
    refused = []
    for root in (own, *SHORT_ROOTS):
        if len(os.fsencode(root)) > SHORT_PATH:
            refused.append(f"{root}: {len(os.fsencode(root))} bytes")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        except OSError as error:
            refused.append(f"{root}: {error.strerror}")
    raise EngineError(
        "engine, start",
        got=f"no directory for its sockets ({'; '.join(refused)})",
        expected=(
            f"one that can be written, whose path has at most {SHORT_PATH} bytes: "
            "a socket's path is limited by the system"
        ),
        hint="TMPDIR=/tmp lockstep …",
    )


def scarce_memory(shared: Path) -> str:
    """A sentence where shared memory is nearly used up.

    What an engine writes there then ends it with SIGBUS and no word.
    """
    with contextlib.suppress(OSError):
        room = os.statvfs(shared)
        free, size = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
        if free < SCARCE_BYTES:
            mend = f"mount -o remount,size=2G {shared}, or docker run --shm-size=2g"
            return (
                f"{shared} has {free / 1e6:.0f} MB free of {size / 1e6:.0f}, "
                f"which an engine may need more of: {mend}; "
            )
    return ""


def tail(path: Path, n_lines: int) -> str:
    """The last lines of a log file."""
    with contextlib.suppress(OSError), path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        lines: Sequence[str] = log.read().decode("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-n_lines:])
    return "(no log)"
