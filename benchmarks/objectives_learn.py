"""Does each objective learn the quick start? Reward, and the seconds until it is up by so much.

    python benchmarks/objectives_learn.py --out evidence/objectives            the real vLLM, all of them
    python benchmarks/objectives_learn.py --only ppo dpo --limit-s 600 …

Each is ``recipes/quickstart.toml`` with ``objective.name`` alone another; the clock begins with the command,
so engine start and proof are in it. A run ends in order when the mean reward of its last :data:`WINDOW`
steps is :data:`UP` above that of its first ones, or at its limit. One run each, with the recipe's seed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from lockstep.objectives.catalogue import OBJECTIVES

ROOT = Path(__file__).parent.parent
UP = 0.15
WINDOW = 4
"""Steps: 128 samples each."""
KEPT = ("value_loss", "value_explained_variance", "pair_accuracy", "reference_kl_k3_nats", "clip_fraction")
"""Of what not every objective has, the first and the last windows' means are told."""


def steps_of(run: Path) -> list[dict[str, float]]:
    """Figures of the steps that are recorded so far."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line)["metrics"] for line in whole.splitlines()]


def ends_of(steps: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Means of a figure over the first window and the last."""
    values = [step[name] for step in steps if name in step]
    return fmean(values[:WINDOW]), fmean(values[-WINDOW:])


def one(name: str, run: Path, sets: list[str], limit_s: float) -> dict[str, Any]:
    """Train until the reward is up or the time is."""
    command = [sys.executable, "-m", "lockstep.cli.main", "train", str(ROOT / "recipes" / "quickstart.toml")]
    for text in [f"objective.name={json.dumps(name)}", "training.steps=200", *sets]:
        command += ["--set", text]
    began = time.monotonic()
    process = subprocess.Popen([*command, "--out", str(run)], env=os.environ)
    up_s = None
    while process.poll() is None and up_s is None and time.monotonic() - began < limit_s:
        time.sleep(0.5)
        steps = steps_of(run)
        if len(steps) >= 2 * WINDOW:
            first, last = ends_of(steps, "reward_mean")
            up_s = time.monotonic() - began if last - first >= UP else None
    spent_s = time.monotonic() - began
    if process.poll() is None:
        process.terminate()
    process.wait()
    steps = steps_of(run)
    found: dict[str, Any] = {"objective": name, "steps": len(steps), "up_s": up_s, "spent_s": spent_s}
    if len(steps) < 2 * WINDOW:
        return found | {"exit_code": process.returncode}
    names = ("reward_mean", *(kept for kept in KEPT if any(kept in step for step in steps)))
    return found | {"first_last": {figure: ends_of(steps, figure) for figure in names}}


def told(found: dict[str, Any]) -> str:
    """One line for people."""
    if "first_last" not in found:
        return f"{found['objective']:>14}  {found['steps']} steps, exit code {found['exit_code']}"
    up = "not up by then" if found["up_s"] is None else f"up by {UP} after {found['up_s']:.0f} s"
    figures = "  ".join(
        f"{figure} {first:.3f} → {last:.3f}" for figure, (first, last) in found["first_last"].items()
    )
    return f"{found['objective']:>14}  {found['steps']:3} steps, {found['spent_s']:.0f} s: {up}  {figures}"


def main() -> None:
    """One objective after the other; what is found is on disk after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--limit-s", type=float, default=300.0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "quickstart.json"
    document = {"schema": "lockstep.bench.objectives/1", "up": UP, "limit_s": args.limit_s, "sets": args.set}
    found = []
    for name in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            found.append(one(name, Path(scratch) / "run", args.set, args.limit_s))
        path.write_text(json.dumps(document | {"objectives": found}, indent=1) + "\n")
        print(told(found[-1]), flush=True)


if __name__ == "__main__":
    main()
