"""This tree beside an earlier commit of it: what a check costs, and the loop's samples a second, in pairs.

    python benchmarks/beside_commit.py 2a1329f [--rounds 3] [--steps 8] [--json]

Both trees run in the environment, on the engine and on the model that are there, each command in a process
of its own, in turn: theirs, ours, ours, theirs, … A check is ``lockstep check`` of the quick start at quick
depth, whole, from the process's start to its end. The loop is ``lockstep train`` of the quick start; its
first two steps warm up, and the steps after them are counted. What is told is the ratio of each pair, ours to
theirs.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parents[1]
RECIPE = "recipes/quickstart.toml"
WARM_STEPS = 2


@dataclass(frozen=True)
class Measured:
    """Of one tree in one round."""

    check_s: float
    samples_per_s: float


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The commit's files, in a directory that goes at the end."""
    with tempfile.TemporaryDirectory(prefix="lockstep-beside-") as scratch:
        tree = Path(scratch) / "tree"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def lockstep(tree: Path, *words: str) -> float:
    """Seconds of one command of the tree's own, which must pass."""
    env = os.environ | {"PYTHONPATH": str(tree / "src")}
    began = time.perf_counter()
    command = [sys.executable, "-m", "lockstep.cli.main", *words]
    subprocess.run(command, check=True, cwd=tree, env=env, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def measured(tree: Path, steps: int) -> Measured:
    """A check, and a short run."""
    check_s = lockstep(tree, "check", RECIPE, "--depth", "quick")
    with tempfile.TemporaryDirectory(prefix="lockstep-beside-") as scratch:
        run = Path(scratch) / "run"
        sets = [f"training.steps={steps + WARM_STEPS}", "training.checkpoint_every=1000"]
        flags = [word for one in sets for word in ("--set", one)]
        lockstep(tree, "train", RECIPE, "--out", str(run), *flags)
        rows = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = rows[WARM_STEPS:]
    return Measured(check_s, sum(r["n_samples"] for r in counted) / sum(r["step_s"] for r in counted))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    # Ended so, the other tree is taken away too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pairs = []
    with tree_of(flags.commit) as theirs:
        for number in range(flags.rounds):
            found = {}
            # Turned about from round to round: what a machine does to whoever comes second takes no side.
            for tree in (theirs, HERE) if number % 2 == 0 else (HERE, theirs):
                found[tree] = measured(tree, flags.steps)
                print(f"{'theirs' if tree is theirs else 'ours'} {found[tree]}", file=sys.stderr, flush=True)
            pairs.append((found[HERE], found[theirs]))
    ratios = {
        "check_s": [ours.check_s / theirs.check_s for ours, theirs in pairs],
        "samples_per_s": [ours.samples_per_s / theirs.samples_per_s for ours, theirs in pairs],
    }
    if flags.json:
        print(json.dumps({"commit": flags.commit, "ours_over_theirs": ratios}, indent=1))
        return 0
    for name, values in ratios.items():
        middle = statistics.median(values)
        print(f"{name:<14} {middle:.3f}  ({min(values):.3f} to {max(values):.3f}, n = {len(values)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
