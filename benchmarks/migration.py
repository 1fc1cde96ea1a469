"""The migration from vLLM 0.8.5 to 0.18.1, fix by fix, as RL runs: what ServiceNow's PipelineRL went through.

    python benchmarks/migration.py                                    which runs, and how long they may take
    python benchmarks/migration.py --out runs/migration [--page]      ``make migration``: hours; it says
    python benchmarks/migration.py --out runs/migration-short --short ``make migration-short``: a quarter hour
    python benchmarks/migration.py --out … --no-runs [--page]         the page alone, of what is there

The arms are in ``migration_arms.py``. Each run is ``lockstep train recipes/quickstart.toml --set …`` in a
process and a directory of its own, one after another. Killed, the same command goes on: what has ended is
kept, a half run is resumed. A run that a proof refuses is a result; one that could not go on for another
reason is tried again by the next start. Checkpoints of what has ended are removed.

At the end ``migration.json``, ``the-migration.md`` and its picture lie in the directory, made from the runs'
files (``migration_results.py``, ``migration_page.py``); with ``--page`` in ``evidence/`` and ``docs/`` too.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import migration_page
import migration_results
from migration_arms import FULL, SHORT, Form, PlannedRun, planned
from msgspec import Struct
from msgspec import json as fast

from lockstep.config.recipe import load_recipe
from lockstep.errors import LockstepError, UsageError
from lockstep.runs.durable import write_atomically
from lockstep.runs.layout import RunLayout
from lockstep.runs.manifest import read_manifest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.toml"
STATUS = {0: "finished", 1: "refused"}
"""Of an exit code; any other is ``failed``, and tried again."""
LOOK_S = 0.5
TOLD = ("] step ", "] OVERRIDDEN", "] ALARM", "the engine died")
"""What of a run's own lines is passed on."""

Say = Callable[[str], None]
Start = Callable[[list[str], Path, Say], int]


class RunOutcome(Struct, frozen=True, kw_only=True):
    """How a run ended, beside its directory."""

    arm: str
    seed: int
    status: str
    """``finished``, ``refused`` by a proof, or ``failed``."""
    exit_code: int
    reason: str
    """The error; empty of a run that finished."""
    seconds: float
    """Over its starts, less those that were killed."""
    starts: int

    @property
    def ended(self) -> bool:
        """Nothing is left to be done."""
        return self.status in STATUS.values()


def run_all(plan: Sequence[PlannedRun], out: Path, say: Say, start: Start) -> dict[str, RunOutcome]:
    """Do what is left of the plan, in order; how each run ended, by its name.

    Raises:
        UsageError: where a run of that name has another recipe.
    """
    for run in plan:
        refuse_other_recipe(run, out)
    outcomes = known_outcomes(plan, out)
    for number, run in enumerate(plan, 1):
        before = outcomes.get(run.name)
        if before is not None and before.ended:
            say(f"[{number} of {len(plan)}] {run.name}: {before.status} before")
            continue
        say(f"[{number} of {len(plan)}] {run.name}: {run.arm.says}; {told_left(plan, outcomes)}")
        outcomes[run.name] = outcome = one(run, out, before, say, start)
        say(
            f"    {outcome.status} after {outcome.seconds:.0f} s{'; ' * bool(outcome.reason)}{outcome.reason}"
        )
    return outcomes


def one(run: PlannedRun, out: Path, before: RunOutcome | None, say: Say, start: Start) -> RunOutcome:
    """Start a run, or go on with it; the outcome is on disk when this returns."""
    began = time.monotonic()
    code = start(command_of(run, out), out / "logs" / run.name, say)
    outcome = RunOutcome(
        arm=run.arm.name,
        seed=run.seed,
        status=STATUS.get(code, "failed"),
        exit_code=code,
        reason=reason_of(out / "logs" / run.name, code, out),
        seconds=time.monotonic() - began + (before.seconds if before else 0.0),
        starts=1 + (before.starts if before else 0),
    )
    write_atomically(_place(out, run), fast.format(fast.encode(outcome), indent=1))
    if outcome.ended:
        shutil.rmtree(RunLayout(out / run.name).checkpoints, ignore_errors=True)
    return outcome


def command_of(run: PlannedRun, out: Path) -> list[str]:
    """``lockstep``'s arguments: a new run, or a half one that goes on."""
    own = out / run.name
    command = ["train", str(RECIPE), "--out", str(own)]
    for text in run.sets:
        command += ["--set", text]
    if RunLayout(own).manifest.is_file():
        command = ["train", "--resume", str(own)]
    for fault in run.arm.plants:
        command += ["--plant", fault]
    return [*command, "--json"]


def started(arguments: list[str], log: Path, say: Say) -> int:
    """Run ``lockstep`` to its end; its data go to LOG.json, its talk to LOG.log and the steps to ``say``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    whole = [sys.executable, "-m", "lockstep.cli.main", *arguments]
    # Its talk is read from the file: a pipe would stay open as long as anything that it started lives. In a
    # session of its own it gets one signal, from here, and ends in order; a second would end it at once.
    with open(f"{log}.json", "w") as data, open(f"{log}.log", "a") as talk, open(f"{log}.log") as heard:
        heard.seek(0, os.SEEK_END)
        process = subprocess.Popen(whole, stdout=data, stderr=talk, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(LOOK_S)
                _pass_on(heard, say)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        _pass_on(heard, say)
        return process.returncode


def _pass_on(heard: TextIO, say: Say) -> None:
    """What was written since the last look; of a line that is only half there, what there is."""
    for line in heard.read().splitlines():
        if any(mark in line for mark in TOLD):
            say(f"    {line.rstrip()}")


def reason_of(log: Path, code: int, out: Path) -> str:
    """Why a run ended as it did, without a path of this machine; empty where it finished."""
    if code == 0:
        return ""
    try:
        error = json.loads(Path(f"{log}.json").read_text())["error"]
        return scrubbed(f"{error['type']}, {error['boundary']}: {error['got']}", out)
    except (OSError, ValueError, KeyError):
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{ended}, without an error of its own"


def scrubbed(text: str, out: Path) -> str:
    """The text with the paths that a run knows as DIR and HERE."""
    for path, name in ((out.absolute(), "DIR"), (out, "DIR"), (ROOT, "HERE"), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return text


def known_outcomes(plan: Sequence[PlannedRun], out: Path) -> dict[str, RunOutcome]:
    """Of runs that were started before, by their names."""
    places = {run.name: _place(out, run) for run in plan}
    return {
        name: fast.decode(place.read_bytes(), type=RunOutcome)
        for name, place in places.items()
        if place.is_file()
    }


def _place(out: Path, run: PlannedRun) -> Path:
    return out / f"{run.name}.json"


def refuse_other_recipe(run: PlannedRun, out: Path) -> None:
    """Keep runs of two recipes from being read as seeds of one arm.

    Raises:
        UsageError: names the run.
    """
    manifest = RunLayout(out / run.name).manifest
    if not manifest.is_file():
        return
    if read_manifest(manifest).recipe != load_recipe(RECIPE, list(run.sets)):
        raise UsageError(
            f"run directory {out / run.name}",
            got="a run of another recipe",
            expected="one of this experiment: the same form, the same --set",
            hint="give another --out",
        )


def left_s(plan: Sequence[PlannedRun], outcomes: dict[str, RunOutcome]) -> float:
    """Seconds that what has not ended takes: by runs of the same dtype that finished, else by the guess."""
    took: dict[str, list[float]] = {}
    for run in plan:
        outcome = outcomes.get(run.name)
        if outcome is not None and outcome.status == "finished":
            took.setdefault(run.arm.dtype, []).append(outcome.seconds)
    mean = {dtype: sum(seconds) / len(seconds) for dtype, seconds in took.items()}
    open_runs = [run for run in plan if run.name not in outcomes or not outcomes[run.name].ended]
    return sum(mean.get(run.arm.dtype, run.guess_s) for run in open_runs)


def told_left(plan: Sequence[PlannedRun], outcomes: dict[str, RunOutcome]) -> str:
    """How long is left, and on what that rests."""
    seconds = left_s(plan, outcomes)
    told = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
    finished = sum(outcome.status == "finished" for outcome in outcomes.values())
    return f"about {told} left, {f'by the {finished} that finished' if finished else 'a guess'}"


def describe(form: Form, more: Sequence[str]) -> str:
    """The plan for people; nothing is started."""
    plan = planned(form, more)
    lines = [f"{len(plan)} runs ({form.name} form): {told_left(plan, {})}, on two cores"]
    for arm in {run.arm.name: run.arm for run in plan}.values():
        planted = f"; planted: {', '.join(arm.plants)}" * bool(arm.plants)
        lines.append(f"  {arm.name:<14} {arm.says}; {form.steps[arm.dtype]} steps{planted}")
    return "\n".join(lines)


def write_results(form: Form, plan: Sequence[PlannedRun], out: Path, page: bool) -> None:
    """The document, the page and its picture, from the runs' files."""
    document = migration_results.document(form, plan, known_outcomes(plan, out), out)
    places = [
        migration_page.Places(out / "migration.json", out / "the-migration.md", out / "the-migration.svg")
    ]
    if page:
        places.append(migration_page.in_tree(form.name))
    for place in places:
        migration_page.write(document, place)
    for line in migration_page.told(document):
        print(line)
    print(f"{places[-1].page}, made from {places[-1].document}")


def main() -> int:
    """Run what is left, then write what was found. Exit code 3 while a run has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="Where the runs are; none: only the plan is shown.")
    parser.add_argument("--short", action="store_true", help="One seed, four arms, few steps.")
    parser.add_argument("--no-runs", action="store_true", help="Start nothing; write what is there.")
    parser.add_argument("--page", action="store_true", help="Write docs/ and evidence/ too.")
    parser.add_argument("--set", action="append", default=[], help="Of every arm, after its own.")
    args = parser.parse_args()
    form = SHORT if args.short else FULL
    print(describe(form, args.set), flush=True)
    if args.out is None:
        print((__doc__ or "").partition("\n\n")[2])
        return 0
    plan = planned(form, args.set)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if not args.no_runs:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, _interrupt)
            run_all(plan, args.out, lambda text: print(text, flush=True), started)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except LockstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_results(form, plan, args.out, args.page)
    outcomes: dict[str, Any] = known_outcomes(plan, args.out)
    return 3 if any(not outcome.ended for outcome in outcomes.values()) else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    os.environ.setdefault("TERM", "dumb")
    sys.exit(main())
