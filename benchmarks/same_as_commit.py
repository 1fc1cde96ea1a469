"""This tree beside an earlier commit of it: do both train to the same bits?

    python benchmarks/same_as_commit.py 2a1329f [--engine vllm] [--steps 6] [--out FILE]

Both trees train the quick start with 8 prompts a step, from the same seed, each in a process of its own. What
is told: SHA-256 of the trained weights and of the optimizer's state, and every figure of a step that both
trees record and that is no time, where it differs in a bit.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from beside_commit import HERE, RECIPE, lockstep, tree_of

FILES = ("model.safetensors", "trainer/optimizer.safetensors")


def trained(tree: Path, engine: str, steps: int) -> tuple[dict[str, str], list[dict[str, float]]]:
    """Digests of what a tree trains, by file, and the figures of its steps."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        sets = [
            "training.prompts_per_step=8",
            f"training.steps={steps}",
            f"training.checkpoint_every={steps}",
        ]
        words = [word for text in sets for word in ("--set", text)]
        lockstep(tree, "train", RECIPE, "--engine", engine, "--out", str(run), *words)
        (saved,) = (run / "checkpoints").iterdir()
        digests = {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in FILES}
        rows = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return digests, rows


def differing(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """Figures that both have and that differ in a step: name → step by step, theirs and ours."""
    shared = {name for name in theirs[0] if name in ours[0] and not name.endswith("_s")}
    pairs = {name: [[a[name], b[name]] for a, b in zip(theirs, ours, strict=True)] for name in sorted(shared)}
    return {name: values for name, values in pairs.items() if any(a != b for a, b in values)}


def main() -> int:
    """Print what differs; 0 where both train to the same bits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tree_of(args.commit) as tree:
        theirs, their_rows = trained(tree, args.engine, args.steps)
    ours, our_rows = trained(HERE, args.engine, args.steps)
    shared = sum(name in our_rows[0] and not name.endswith("_s") for name in their_rows[0])
    report = {
        "schema": "lockstep.benchmark.same_as_commit/1",
        "commit": args.commit,
        "engine": args.engine,
        "steps": args.steps,
        "same": ours == theirs,
        "sha256": {"theirs": theirs, "ours": ours},
        "figures_compared": shared,
        "figures_that_differ": differing(their_rows, our_rows),
        "grad_norm": [row["grad_norm"] for row in our_rows],
        "reward_mean": [row["reward_mean"] for row in our_rows],
    }
    text = json.dumps(report, indent=1) + "\n"
    print(text, end="")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    return int(ours != theirs)


if __name__ == "__main__":
    sys.exit(main())
