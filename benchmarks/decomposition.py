"""What is broken between the two sides, and what was learned since: each moves its own figures alone.

    python benchmarks/decomposition.py --out evidence/in_flight/decomposition.json
    python benchmarks/decomposition.py --tiny …        a tiny model on the transformers engine

Four short runs in flight at T = 0.7: an engine that reports what it drew from, and one that reports raw
log-probabilities (which the ladder refuses, so ``parity.override`` goes on all the same); each at lag 0, and
at lag 2, where the weights that drew are older than those that are trained.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny

FIGURES = (
    "gap_abs_mean_nats",
    "mismatch_kl_k3_nats",
    "mismatch_ess",
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
    "parity.probe_prompts=4",
    "parity.probe_tokens=8",
    "parity.draw_tokens=256",
    "parity.draws_see=1.0",
    "parity.override=the table of docs/concepts/in-flight.md",
]
RAW = "engine.options.logprobs_mode=raw_logprobs"
RUNS = {
    "clean engine, lag 0": (0, False),
    "raw log-probabilities, lag 0": (0, True),
    "clean engine, lag 2": (2, False),
    "raw log-probabilities, lag 2": (2, True),
}
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


def one(out: str, sets: list[str], *, small: bool, raw: bool) -> None:
    """A run; the body of a process of its own."""
    from lockstep import api
    from lockstep.config.recipe import load_recipe

    if small:
        sets = [*tiny.sets(Path(out)), *sets]
        if raw:
            _raw()
    elif raw:
        sets = [*sets, RAW]
    recipe = load_recipe(RECIPE, sets, "transformers" if small else None)
    api.train(recipe, out=f"{out}/run", say=lambda text: print(text, file=sys.stderr))


def _raw() -> None:
    """The transformers engine reports the logits before it divides them by the temperature."""
    from lockstep.engines import transformers as engine

    code: Any = engine
    whole = engine.LogitsProcessorList
    code.LogitsProcessorList = lambda some=(): whole(
        sorted(some, key=lambda one: not isinstance(one, engine._TakeLogprobs))
    )


def measured(args: argparse.Namespace, lag: int, *, raw: bool) -> dict[str, float]:
    """Means over a run's steps, less the first two, in which few tokens can be old."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--one", scratch]
        command += ["--tiny"] * args.tiny + ["--raw"] * raw
        for text in (*SETS, f"training.steps={args.steps}", f"rollout.max_lag={lag}", *args.set):
            command += ["--set", text]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines][2:]
    return {name: statistics.fmean(row[name] for row in rows) for name in FIGURES}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--raw", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.set, small=args.tiny, raw=args.raw)
        return
    print("| run | " + " | ".join(FIGURES) + " |")
    print("|---" * (len(FIGURES) + 1) + "|")
    found = {}
    for name, (lag, raw) in RUNS.items():
        row = found[name] = measured(args, lag, raw=raw)
        print(f"| {name} | " + " | ".join(f"{row[figure]:.3g}" for figure in FIGURES) + " |", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": "lockstep.bench.decomposition/1", "steps": args.steps, "tiny": args.tiny}
        args.out.write_text(
            json.dumps(document | {"sets": [*SETS, *args.set], "runs": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
