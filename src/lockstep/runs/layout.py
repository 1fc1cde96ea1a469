"""What lies where in a run directory.

runs/<id>/
  manifest.json       what ran: recipe, versions, resolved engine configuration, hardware, catalog of figures
  certificate.json    which pair passed which layers; written only on PASS
  verdicts.jsonl      every verdict, in order, over all starts of the run
  metrics.jsonl       one line a training step; metrics.csv and the like: where the recipe asks for such sinks
  alarms.jsonl        figures that left what is predicted of them, a sentence each
  ledger.jsonl        in flight: where every sample and token is, one line a step
  rollouts/           step-000007.parquet: admitted by the gate, trained on or about to be; a row a completion
    drawn/            step-000007.parquet: sampled; not yet judged, perhaps not yet scored
    refused/          step-000007.parquet: refused by the gate, never trained on;
                      step-000007.2.parquet …: later refusals of the step
  checkpoints/        step-000010/: a Hugging Face directory, with the trainer's own state in trainer/
  engine.log          the engine's own output
"""

import contextlib
import fcntl
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lockstep.errors import UsageError
from lockstep.runs.durable import PARTIAL, flush_directory, make_directory, open_for_append, writing

LOOK_S = 0.05
"""Longer than :meth:`RunLayout.at_work` holds a run that it looks at."""


@dataclass(frozen=True)
class RunLayout:
    """Paths of one run."""

    root: Path

    def absolute(self) -> "RunLayout":
        """The same from any working directory."""
        return RunLayout(self.root.absolute())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from going on with this run at the same time; the lock ends with its process.

        Raises:
            UsageError: when one is at it.
        """
        with writing(self.root / ".lock"):
            descriptor = open_for_append(self.root / ".lock")
        with open(descriptor, "a") as file:
            if not _locked(file, fcntl.LOCK_EX):
                time.sleep(LOOK_S)
                if not _locked(file, fcntl.LOCK_EX):
                    raise UsageError(
                        f"run directory {self.root}",
                        got="another process that is at it",
                        expected="a run that nobody is at",
                        hint="wait for it, or give --out another directory",
                    )
            yield

    def at_work(self) -> bool:
        """True while a process holds the run; asking waits for nobody."""
        try:
            with open(self.root / ".lock", "rb") as file:
                return not _locked(file, fcntl.LOCK_SH)
        except OSError:  # there is no run, none of ours to look at, or a file system without locks
            return False

    @property
    def manifest(self) -> Path:
        """What ran."""
        return self.root / "manifest.json"

    @property
    def certificate(self) -> Path:
        """What was proven."""
        return self.root / "certificate.json"

    @property
    def verdicts(self) -> Path:
        """Every verdict."""
        return self.root / "verdicts.jsonl"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.root / "metrics.jsonl"

    @property
    def alarms(self) -> Path:
        """One line an alarm; not there without one."""
        return self.root / "alarms.jsonl"

    @property
    def ledger(self) -> Path:
        """Where every sample and token is, one line a step."""
        return self.root / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Weights and optimizer state."""
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint with ``step`` training steps in its weights."""
        return self.checkpoints / f"step-{step:06d}"

    @property
    def engine_log(self) -> Path:
        """The engine's output."""
        return self.root / "engine.log"

    def drawn(self, step: int) -> Path:
        """Rollouts of one step as they were sampled: not yet judged.

        Their rewards are NaN until they are scored.
        """
        return self.root / "rollouts" / "drawn" / f"step-{step:06d}.parquet"

    def rollouts(self, step: int) -> Path:
        """Rollouts of one step that the gate admitted; trained on, or about to be."""
        return self.root / "rollouts" / f"step-{step:06d}.parquet"

    def refused(self, step: int) -> Path:
        """Rollouts of one step that the gate refused, the first time; never trained on.

        :meth:`refusals` has all of them.
        """
        return self.root / "rollouts" / "refused" / f"step-{step:06d}.parquet"

    def refusals(self, step: int) -> list[Path]:
        """Every refusal of one step, oldest first."""
        first = self.refused(step)
        later = [
            path for path in first.parent.glob(f"step-{step:06d}.*.parquet") if path.suffixes[0][1:].isdigit()
        ]
        return [first] * first.is_file() + sorted(later, key=lambda path: int(path.suffixes[0][1:]))


def _locked(file: IO[Any], how: int) -> bool:
    """Take the lock, until the file is closed; False where another process has it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


LEFT = {".lock", "engine.log", "rollouts"}
"""What a start leaves that got no further than its manifest; a new run takes the place."""


def new_run(out: Path | None) -> RunLayout:
    """A run directory: ``out``, or ``runs/<date>-<random>``.

    It is made, private to the user. One that is there already keeps its mode, and must be empty: a run's
    files are not mixed with others, which a resume could take for its own. The files of a run are private in
    either case.

    Raises:
        UsageError: when ``out`` holds a run, or anything else, or is no directory.
        RunError: when it cannot be made.
    """
    root = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    refuse_no_directory(root)
    if (root / "manifest.json").exists():
        raise UsageError(
            f"run directory {root}",
            got="a run that is already there",
            expected="an empty place",
            hint=f"lockstep train --resume {root}",
        )
    if root.exists():
        _refuse_foreign(root)
    else:
        make_directory(root.parent, 0o777)  # above the run nothing is private: the user's umask has it
        make_directory(root)
    return RunLayout(root)


def refuse_no_directory(out: Path) -> None:
    """What can be wrong with ``--out`` before anything is started for it.

    Raises:
        UsageError: for a file, and for a name that the system refuses.
    """
    try:
        fault = "a file" if out.exists() and not out.is_dir() else ""
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise UsageError(
            f"flag --out {out}", got=fault, expected="a directory, or none yet", hint="give another"
        )


def _refuse_foreign(root: Path) -> None:
    own = {path.name for path in root.glob(f"{PARTIAL}*")} | LEFT
    foreign = sorted(path.name for path in root.iterdir() if path.name not in own)
    if foreign or any(path.is_file() for path in (root / "rollouts").rglob("*")):
        raise UsageError(
            f"flag --out {root}",
            got=(
                f"a directory that holds {', '.join(foreign[:3] or ['rollouts'])}"
                f"{' …' if len(foreign) > 3 else ''} and no run"
            ),
            expected="an empty directory, or none yet",
            hint=f"--out {root / 'run'}",
        )


def existing_run(root: Path) -> RunLayout:
    """Open a run directory.

    Raises:
        UsageError: when there is no run in it.
    """
    try:
        fault = "" if (root / "manifest.json").is_file() else "no manifest.json"
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise UsageError(f"run directory {root}", got=fault, expected="a run", hint="ls runs/")
    return RunLayout(root)


def forget_partials(layout: RunLayout) -> None:
    """Remove what a killed process left half-written in a run that goes on, and flush what it renamed last.

    Raises:
        RunError: when it cannot be removed.
    """
    with writing(layout.root):
        for left in list(layout.root.rglob(f"{PARTIAL}*")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        for directory in (layout.root, *(path for path in layout.root.rglob("*") if path.is_dir())):
            flush_directory(directory)
