"""End a process group and leave nothing behind, in memory or on the process table.

An engine's processes may share memory through named segments; killed outright they would leave hundreds of
megabytes in ``/dev/shm``. Python's resource tracker, a process of the same group, unlinks them once all who
used them are gone. So it is spared, and ends by itself.
"""

import contextlib
import os
import select
import signal
from pathlib import Path
from typing import NamedTuple

TRACKER_TIMEOUT_S = 3.0


def end_group(pgid: int) -> None:
    """SIGKILL every process of the group but its resource trackers, and wait for those.

    The caller may be a member.
    """
    own = os.getpid()
    trackers = []
    with contextlib.suppress(ProcessLookupError, PermissionError):
        members = _members(pgid)
        if members is None:
            os.killpg(pgid, signal.SIGKILL)
            return
        for pid, command in members:
            if "multiprocessing.resource_tracker" in command:
                trackers.append(pid)
            elif pid != own:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    # libiomp5's, 1 KB each.
                    Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}").unlink()
    # Last: a member that ended itself first would leave the others.
    if own in {member.pid for member in members or []}:
        os.kill(own, signal.SIGKILL)
    for pid in trackers:
        _await_end(pid)


class _Member(NamedTuple):
    pid: int
    command: str
    """Its command line."""


def _members(pgid: int) -> list[_Member] | None:
    """The processes of the group; None where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return None
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                # The command's name, in parentheses, may hold anything; the fields after it do not.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == pgid and fields[0] != "Z":
                    command = (entry / "cmdline").read_bytes().decode(errors="replace")
                    members.append(_Member(int(entry.name), command))
    return members


def _await_end(pid: int) -> None:
    """Wait for a process that is not a child, and end it if it does not end."""
    with contextlib.suppress(ProcessLookupError, OSError):
        descriptor = os.pidfd_open(pid)
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if not poller.poll(TRACKER_TIMEOUT_S * 1000):
            os.kill(pid, signal.SIGKILL)
        os.close(descriptor)
