"""What the proof costs, on the quick start's recipe.

Seconds of each depth on a running engine, and the canary's share of a step.

Quick and standard climb on one engine, warmed up by one climb, ``--repeats`` times each in turn; full is one
climb with the engine starts that its factors need. The canary costs what a sync with it takes longer than one
without, in pairs on the same engine, over the median of real training steps: the trainer scores while the
engine loads, so neither clock alone would tell.

    python benchmarks/check_cost.py [--repeats 3] [--steps 8] [--no-full] [--json]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lockstep.api import QUICK
from lockstep.config.recipe import Recipe, load_recipe, with_sets
from lockstep.deep.full import deeper
from lockstep.loop.open import Session, open_engine, open_session
from lockstep.loop.run import Run
from lockstep.loop.stages import sync
from lockstep.loop.sync import run_steps
from lockstep.parity.ladder import climb
from lockstep.runs.layout import new_run
from lockstep.runs.manifest import processor, write_manifest
from lockstep.runs.read import read_steps
from lockstep.runs.record import open_recorder

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
SYNC_PAIRS = 24
TARGETS = {"quick_s": 20.0, "standard_s": 60.0, "full_s": 300.0, "canary_share_of_step": 0.015}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-full", action="store_true")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    recipe = load_recipe(QUICKSTART, [f"training.steps={flags.steps}"])
    with (
        tempfile.TemporaryDirectory(prefix="lockstep-bench-") as scratch,
        open_session(recipe, Path(scratch) / "engine.log", say) as session,
    ):
        found = depths(session, recipe, flags.repeats)
        if not flags.no_full:
            found["full_s"] = [full(session)]
        found["canary_share_of_step"] = shares(session, Path(scratch) / "run")
    report(found, as_json=flags.json)
    return 0


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def depths(session: Session, recipe: Recipe, repeats: int) -> dict[str, list[float]]:
    """Seconds of quick and standard climbs, in turn."""
    climb(session.pair)
    found: dict[str, list[float]] = {"quick_s": [], "standard_s": []}
    for _ in range(repeats):
        for name, sets in (("quick_s", QUICK), ("standard_s", ())):
            session.pair.recipe = with_sets(recipe, sets)
            found[name].append(_timed(session, {}))
            say(f"{name} {found[name][-1]:.1f}")
    session.pair.recipe = recipe
    return found


def full(session: Session) -> float:
    """Seconds of one full climb."""
    return _timed(session, deeper(session.pair, open_engine))


def _timed(session: Session, more: dict) -> float:
    began = time.perf_counter()
    result = climb(session.pair, deeper=more)
    assert result.passed, [verdict.summary for verdict in result.verdicts]
    return time.perf_counter() - began


def shares(session: Session, root: Path) -> list[float]:
    """What the canary adds to a sync, over the median step of a short run; one share for each pair.

    The run's first step warms up.
    """
    layout = new_run(root)
    pair = session.pair
    write_manifest(layout.manifest, session.manifest)
    run = Run(session, layout, say, open_recorder(layout))
    run_steps(run, resumed=False)
    step = statistics.median(read_steps(layout.metrics).column("step_s")[1:].tolist())
    added = []
    for _ in range(SYNC_PAIRS):
        began = time.perf_counter()
        pair.sync(pair.version)
        between = time.perf_counter()
        sync(run, pair.version)
        added.append((time.perf_counter() - between) - (between - began))
    return [seconds / step for seconds in added]


def report(found: dict[str, list[float]], *, as_json: bool) -> None:
    """Medians with their spread, beside the targets."""
    if as_json:
        print(json.dumps({"machine": processor(), "targets": TARGETS, "measured": found}, indent=1))
        return
    print(f"machine: {processor()}")
    for name, values in found.items():
        middle = statistics.median(values)
        met = statistics.median(values) <= TARGETS[name]
        spread = f"{min(values):.4g} to {max(values):.4g}, n = {len(values)}"
        print(f"{name:<22} {middle:8.4g}  ({spread})  target {TARGETS[name]:g}: {'met' if met else 'missed'}")


if __name__ == "__main__":
    sys.exit(main())
