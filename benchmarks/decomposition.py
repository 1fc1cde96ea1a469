"""What is broken between the two sides, and what was learned since: each moves its own figures alone.

    python benchmarks/decomposition.py [--steps 6] --out evidence/in_flight/decomposition.json

Four short runs of the quick start in flight at T = 0.7: an engine that reports what it drew from, and one
that reports raw log-probabilities (which the ladder refuses, so ``parity.override`` goes on all the same);
each at lag 0, and at lag 2, where the weights that drew are older than those that are trained.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FIGURES = (
    "mismatch_kl_k3_nats",
    "mismatch_ess",
    "gap_abs_mean_nats",
    "policy_kl_k3_nats",
    "policy_ess",
    "clip_fraction",
    "lag_steps",
)
SETS = [
    "loop.kind=in_flight",
    "objective.old_logprobs=sampling",
    "sampling.temperature=0.7",
    "training.checkpoint_every=1000",
    "optimizer.lr=3e-5",
    "parity.probe_prompts=4",
    "parity.probe_tokens=8",
    "parity.draw_tokens=256",
    "parity.draws_see=1.0",
]
RAW = ["engine.options.logprobs_mode=raw_logprobs", "parity.override=the table of docs/concepts/in-flight.md"]
RUNS = {
    "clean engine, lag 0": ["rollout.max_lag=0"],
    "raw log-probabilities, lag 0": ["rollout.max_lag=0", *RAW],
    "clean engine, lag 2": ["rollout.max_lag=2"],
    "raw log-probabilities, lag 2": ["rollout.max_lag=2", *RAW],
}
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


def measured(sets: list[str], skipped: int) -> dict[str, float]:
    """Means over a run's steps, less the first, in which no token can be old."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "lockstep.cli.main", "train", str(RECIPE), "--out", str(out)]
        for text in sets:
            command += ["--set", text]
        subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ)
        lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines][skipped:]
    return {name: statistics.fmean(row[name] for row in rows) for name in FIGURES}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sets = [*SETS, f"training.steps={args.steps}", *args.set]
    found = {name: measured([*sets, *own], skipped=2) for name, own in RUNS.items()}
    print("| run | " + " | ".join(FIGURES) + " |")
    print("|---" * (len(FIGURES) + 1) + "|")
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{row[figure]:.3g}" for figure in FIGURES) + " |")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": "lockstep.bench.decomposition/1", "sets": sets, "runs": found}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
