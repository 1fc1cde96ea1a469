"""What lies where in a run directory.

runs/<id>/
  manifest.json       what ran: recipe, versions, resolved engine configuration, hardware, the catalog of figures
  certificate.json    which pair passed which layers; written only on PASS
  verdicts.jsonl      every verdict, in order, over all starts of the run
  metrics.jsonl       one line a training step
  rollouts/           step-000007.parquet; one row a completion
  checkpoints/        step-000010/: a Hugging Face directory plus optimizer state
  engine.log          the engine's own output
"""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep.errors import UsageError


@dataclass(frozen=True)
class RunLayout:
    """Paths of one run."""

    root: Path

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from going on with this run at the same time; the lock ends with its process.

        Raises:
            UsageError: when one is at it.
        """
        with (self.root / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"run directory {self.root}",
                    got="another process that is at it",
                    expected="a run that nobody is at",
                    hint="wait for it, or give --out another directory",
                ) from None
            yield

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
    def checkpoints(self) -> Path:
        """Weights and optimizer state."""
        return self.root / "checkpoints"

    @property
    def engine_log(self) -> Path:
        """The engine's output."""
        return self.root / "engine.log"

    def rollouts(self, step: int) -> Path:
        """Rollouts of one step; trained on, or about to be."""
        return self.root / "rollouts" / f"step-{step:06d}.parquet"

    def failed_rollouts(self, step: int) -> Path:
        """Rollouts whose reward function failed; never trained on."""
        return self.root / "rollouts" / f"step-{step:06d}.failed.parquet"


def new_run(out: Path | None) -> RunLayout:
    """Create a run directory, private to the user: ``out``, or ``runs/<date>-<random>``.

    Raises:
        UsageError: when ``out`` already holds a run.
    """
    root = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if (root / "manifest.json").exists():
        raise UsageError(
            f"run directory {root}",
            got="a run that is already there",
            expected="an empty place",
            hint=f"lockstep train --resume {root}",
        )
    (root / "rollouts").mkdir(parents=True, exist_ok=True)
    os.chmod(root, 0o700)
    return RunLayout(root)


def existing_run(root: Path) -> RunLayout:
    """Open a run directory.

    Raises:
        UsageError: when there is no run in it.
    """
    if not (root / "manifest.json").is_file():
        raise UsageError(f"run directory {root}", got="no manifest.json", expected="a run", hint="ls runs/")
    return RunLayout(root)
