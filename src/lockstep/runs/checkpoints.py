"""Which checkpoints a run has, and which of them are as they were written. No torch.

    step-000012/
      model.safetensors, config.json, tokenizer.json, …    the weights alone: engines load every
                                                           safetensors file of the top level
      trainer/optimizer.safetensors                        what a resume needs besides
      trainer/state.json                                   the step, and the SHA-256 of every file above

    step-000012.older     was there before a step-000012 was saved again, until that is on the disk
    step-000012.damaged   set aside: not whole, or other bytes than were written; nothing reads it again

A disk, a copy or a hand may change a byte where no length changes, and a resume would train on with it. So
what is loaded is a :class:`Checkpoint`, and only :func:`checked` makes one.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from msgspec import MsgspecError, Struct, json

from lockstep.errors import RunError
from lockstep.records.alarms import Override
from lockstep.runs.durable import PARTIAL, rename, writing
from lockstep.runs.tensor_files import header_of

MODEL, OPTIMIZER, STATE = "model.safetensors", "trainer/optimizer.safetensors", "trainer/state.json"
PARTS = ("config.json", MODEL, OPTIMIZER, STATE)
OLDER, DAMAGED = ".older", ".damaged"
NAME = re.compile(rf"step-(\d+)({re.escape(OLDER)})?")


class CheckpointState(Struct, frozen=True, omit_defaults=True):
    """What is no tensor. ``step`` training steps are inside the weights."""

    step: int
    sha256: dict[str, str] = {}
    """SHA-256 of every other file, by its path in the checkpoint. Empty: one of before these were kept."""
    override: Override | None = None
    """Where a start of the run trained although the ladder did not pass."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is as it was written: whole, of the step that its name says, every byte as digested."""

    path: Path
    step: int
    """Training steps that are in it."""


def seal(directory: Path, step: int, override: Override | None = None) -> None:
    """Write ``state.json`` over all files that are there: the last file of a checkpoint. Raises OSError."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / STATE)
    digests = {path.relative_to(directory).as_posix(): _sha256(path) for path in files}
    (directory / STATE).write_bytes(json.encode(CheckpointState(step, digests, override)))


def checked(path: Path) -> Checkpoint:
    """Hold a checkpoint against what was written: reads it whole once.

    Raises:
        RunError: names the first file that is not as it was.
    """
    state = read_state(path)
    for part in PARTS:
        if not (path / part).is_file():
            raise not_whole(path, part, "no such file")
    name = NAME.fullmatch(path.name)
    if name is not None and int(name[1]) != state.step:
        raise not_whole(path, STATE, f"step {state.step}")
    for part, digest in state.sha256.items():
        try:
            found = _sha256(path / part)
        except OSError as error:
            raise not_whole(path, part, error.strerror or str(error)) from error
        if found != digest:
            raise not_whole(path, part, "other bytes than were written")
    return Checkpoint(path, state.step)


def newest_checked(directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest that is as it was written; damaged ones that are newer are set aside, and told.

    Raises:
        RunError: when one cannot be set aside.
    """
    for path in damaged_checkpoints(directory):
        say(f"{path.name} is not whole and is passed over; it is kept as {_set_aside(path).name}")
    while (newest := newest_checkpoint(directory)) is not None:
        try:
            return checked(newest)
        except RunError as error:
            told = f"{newest.name} is damaged ({error.boundary.rpartition(', ')[2]}: {error.got})"
            say(f"{told} and is passed over; it is kept as {_set_aside(newest).name}")
    return None


def _set_aside(path: Path) -> Path:
    plain = path.with_name(path.name + DAMAGED)
    names = (plain if number == 1 else path.with_name(f"{plain.name}.{number}") for number in count(1))
    target = next(name for name in names if not name.exists())
    rename(path, target)
    return target


def keep_newest(directory: Path) -> None:
    """Remove every checkpoint but the newest whole one; a half-removed one has no name that looks whole.

    Raises:
        RunError: when one cannot be removed.
    """
    newest = newest_checkpoint(directory)
    for older in _named(directory) if newest is not None else ():
        if older != newest:
            going = directory / f"{PARTIAL}{older.name}"
            with writing(older):
                remove(going)
                os.replace(older, going)
                shutil.rmtree(going)


def newest_checkpoint(directory: Path) -> Path | None:
    """The last whole checkpoint, or None. One that is not whole, whatever cut it short, is passed over."""
    return max(filter(is_whole, _named(directory)), default=None, key=_age)


def damaged_checkpoints(directory: Path) -> list[Path]:
    """Paths with a checkpoint's name that are not whole."""
    return sorted(path for path in _named(directory) if not is_whole(path))


def read_state(path: Path) -> CheckpointState:
    """What a checkpoint says of itself.

    Raises:
        RunError: when it does not.
    """
    try:
        return json.decode((path / STATE).read_bytes(), type=CheckpointState)
    except (OSError, MsgspecError, UnicodeDecodeError) as error:
        raise not_whole(path, STATE, str(error) or type(error).__name__) from error


def not_whole(path: Path, part: str, got: str) -> RunError:
    """The error of a file of a checkpoint that is not as it was written."""
    return RunError(
        f"checkpoint {path}, {part}",
        got=got,
        expected="the file as it was written",
        hint=(
            f"mv {path} {path}{DAMAGED}, then resume: "
            "the run goes on from an older checkpoint or from its rollouts"
        ),
    )


def remove(directory: Path) -> None:
    """One that may not be there. Raises OSError."""
    if directory.exists():
        shutil.rmtree(directory)


def _named(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step-*") if NAME.fullmatch(path.name)]


def _age(path: Path) -> tuple[int, bool]:
    name = NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1]), name[2] is None


def is_whole(path: Path) -> bool:
    """All parts are there, and each tensor file is as long as its header says."""
    try:
        return (
            all((path / part).is_file() for part in PARTS)
            and read_state(path).step >= 0
            and all(_full_length(path / part) for part in (MODEL, OPTIMIZER))
        )
    except (OSError, RunError):
        return False


def _full_length(path: Path) -> bool:
    """True where a file is as long as its header says. Raises OSError."""
    try:
        return header_of(path).nbytes == path.stat().st_size
    except ValueError:
        return False


def _sha256(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
