"""Does each objective learn the quick start? Reward, and the seconds until it is up by so much.

    python benchmarks/objectives_learn.py --out evidence/objectives            the real vLLM, all of them
    python benchmarks/objectives_learn.py --only ppo dpo --limit-s 600 …

Each is ``recipes/quickstart.toml`` with ``objective.name`` alone another; the clock begins with the command,
so engine start and proof are in it. A run ends in order when the mean reward of its last :data:`WINDOW`
steps is :data:`UP` above that of its first ones, or at its limit. One run each, with the recipe's seed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from spanning_updates import lockstep

from lockstep.objectives.catalogue import OBJECTIVES
from lockstep.runs.read import Steps, read_steps

ROOT = Path(__file__).parent.parent
UP = 0.15
WINDOW = 4
"""Steps: 128 samples each."""
KEPT = ("value_loss", "value_explained_variance", "pair_accuracy", "reference_kl_k3_nats", "clip_fraction")
"""Of what not every objective has, the first and the last windows' means are told."""


def ends_of(steps: Steps, name: str) -> tuple[float, float]:
    """Means of a figure over the first window and the last."""
    values = [step.metrics[name] for step in steps if name in step.metrics]
    return fmean(values[:WINDOW]), fmean(values[-WINDOW:])


def up(steps: Steps) -> bool:
    """The reward is."""
    if len(steps) < 2 * WINDOW:
        return False
    first, last = ends_of(steps, "reward_mean")
    return last - first >= UP


def one(name: str, run: Path, sets: list[str], limit_s: float) -> dict[str, Any]:
    """Train until the reward is up or the time is."""
    command = ["train", str(ROOT / "recipes" / "quickstart.toml"), "--out", str(run)]
    for text in [f"objective.name={json.dumps(name)}", "training.steps=200", *sets]:
        command += ["--set", text]
    metrics = run / "metrics.jsonl"
    began = time.monotonic()
    up_s: list[float] = []

    def done() -> bool:
        if up(read_steps(metrics)):
            up_s.append(time.monotonic() - began)
        return bool(up_s)

    code = lockstep(command, run, limit_s=limit_s, until=done)
    spent_s = time.monotonic() - began
    steps = read_steps(metrics)
    found: dict[str, Any] = {"objective": name, "steps": len(steps), "up_s": next(iter(up_s), None)}
    found |= {"spent_s": spent_s, "exit_code": code}
    if len(steps) < 2 * WINDOW:
        return found
    names = ("reward_mean", *(kept for kept in KEPT if any(kept in step.metrics for step in steps)))
    return found | {"first_last": {figure: ends_of(steps, figure) for figure in names}}


def told(found: dict[str, Any]) -> str:
    """One line for people."""
    if "first_last" not in found:
        return f"{found['objective']:>14}  {found['steps']} steps, exit code {found['exit_code']}"
    said = "not up by then" if found["up_s"] is None else f"up by {UP} after {found['up_s']:.0f} s"
    figures = "  ".join(
        f"{figure} {first:.3f} → {last:.3f}" for figure, (first, last) in found["first_last"].items()
    )
    return f"{found['objective']:>14}  {found['steps']:3} steps, {found['spent_s']:.0f} s: {said}  {figures}"


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
