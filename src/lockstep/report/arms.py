"""From the words of a command line to configurations and their seeds."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from lockstep.errors import UsageError
from lockstep.report.sources.read import read_runs
from lockstep.report.trajectories import Arm, Trajectory


def read_arms(words: Sequence[str], mapping: Mapping[str, str]) -> list[Arm]:
    """Configurations in the order in which they were named.

    ``NAME=PATH,PATH`` is a configuration with a seed at each path; a path may be a pattern, or a directory
    with a run in each of its directories. A ``PATH`` alone is a configuration of its own, but for Lockstep
    runs whose recipes and engines differ in nothing but the seed: these are one.

    Raises:
        UsageError: for a path with nothing in it, and for a name that is given twice.
    """
    arms: dict[str, list[Trajectory]] = {}
    told: set[str] = set()
    of_recipe: dict[str, str] = {}
    for word in words:
        # A path may have an equals sign in it: what is there is a path.
        name, _, paths = word.rpartition("=") if not Path(word).exists() else ("", "", word)
        runs = [run for path in _paths(paths) for run in read_runs(path, mapping)]
        if name:
            if name in told:
                raise UsageError(
                    "lockstep compare", got=f"{name!r} twice", expected="each once", hint=f"{name}=A,B"
                )
            told.add(name)
            arms[name] = runs
            continue
        for run in runs if _many(runs) else [None]:
            some = [run] if run is not None else runs
            # Runs of one recipe are one configuration, whichever words they came by.
            own = of_recipe.setdefault(some[0].same or word, _short(some[0] if run else None, word, arms))
            arms.setdefault(own, []).extend(some)
    return [Arm(name, tuple(runs), _notes(name, runs)) for name, runs in arms.items()]


def _many(runs: list[Trajectory]) -> bool:
    """Lockstep's own runs, which say themselves what they are seeds of."""
    return all(run.same for run in runs)


def _short(run: Trajectory | None, word: str, arms: Mapping[str, object]) -> str:
    path = Path(run.source if run is not None else word)
    name = path.name or word
    return name if name not in arms else str(path)


def _paths(text: str) -> list[Path]:
    found: list[Path] = []
    # Globs too: a shell expands none behind ``NAME=`` or a comma.
    for part in text.split(","):
        matches = (
            sorted(glob.glob(part)) if any(c in part for c in "*?[") and not Path(part).exists() else [part]
        )
        if not matches:
            raise UsageError(f"run {part}", got="nothing there", expected="a run or a log", hint="ls runs/")
        found += map(Path, matches)
    return found


def _notes(name: str, runs: Sequence[Trajectory]) -> tuple[str, ...]:
    notes = []
    if len(runs) == 1:
        notes.append(f"{name}: one seed, so nothing is called different from it or in it")
    if len({run.same for run in runs if run.same}) > 1:
        notes.append(
            f"{name}: its runs differ in more than their seeds, so their spread is no spread of seeds"
        )
    notes += [
        f"{name}: {run.source} was trained without proof. {run.unproven}" for run in runs if run.unproven
    ]
    return tuple(notes)
