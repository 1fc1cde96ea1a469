"""Updates in flight on a real engine, each token held to the version that the engine says drew it.

    python benchmarks/spanning_updates.py --engine vllm==0.32.0 --update keep --out evidence/in_flight
    python benchmarks/spanning_updates.py --tiny --update abort …      a tiny model, the transformers engine

The quick start in flight at lag 1, on answers that are long enough to span updates. Every token of every
step is scored under its own version, over the cache that the rule says; of each update one sequence is
replayed piece by piece besides (``parity/spans.py``), over the other cache too. What is written down is of
all of them.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import long_answers
import tiny

from lockstep.records.verdicts import InFlight
from lockstep.runs.read import read_verdicts

HERE = Path(__file__).parent
SETS = [
    "loop.kind=in_flight",
    "rollout.max_lag=1",
    "objective.old_logprobs=sampling",
    "optimizer.lr=3e-5",
    "parity.probe_prompts=4",
    "parity.probe_tokens=8",
    "parity.draw_tokens=256",
    "parity.draws_see=1.0",
]


def figures_of(run: Path) -> dict[str, Any]:
    """What a run's records say of its spans."""
    steps = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = read_verdicts(run / "verdicts.jsonl")
    replayed = {record.when.version for record in records if isinstance(record.when, InFlight)}
    replays = [record.verdict for record in records if isinstance(record.when, InFlight)]
    told = {
        name: [verdict.figures[name] for verdict in replays if name in verdict.figures]
        for name in ("replay_gap_abs_max_nats", "replay_other_cache_abs_max_nats", "told_apart")
    }
    step_s = sum(step["step_s"] for step in steps)
    return {
        "steps": len(steps),
        "updates_replayed": len(replayed),
        "replays": len(replays),
        "replays_passed": sum(verdict.status == "PASS" for verdict in replays),
        "replay_gap_abs_max_nats": max(told["replay_gap_abs_max_nats"], default=None),
        "other_cache_gap_abs_max_nats": sorted(told["replay_other_cache_abs_max_nats"]),
        "replays_with_power": len(told["told_apart"]),
        "updates_told_apart": sum(told["told_apart"]),
        "tokens": sum(step["n_tokens"] for step in steps),
        "gap_abs_max_nats": max(step["gap_abs_max_nats"] for step in steps),
        "spanning_fraction": sum(step["spanning_fraction"] for step in steps) / len(steps),
        "earlier_fraction": sum(step["earlier_fraction"] for step in steps) / len(steps),
        "lag_max_steps": max(step["lag_max_steps"] for step in steps),
        "replay_share_of_time": sum(step["replay_s"] for step in steps) / step_s,
        "earlier_share_of_time": sum(step["earlier_s"] for step in steps) / step_s,
        "step_s_mean": step_s / len(steps),
        "reward_first_last_quarter": [
            sum(step["reward_mean"] for step in part) / len(part)
            for part in (steps[: len(steps) // 4], steps[-(len(steps) // 4) :])
        ],
        "ledger": json.loads((run / "ledger.jsonl").read_text().splitlines()[-1]),
    }


def lockstep(
    command: list[str],
    run: Path,
    *,
    kill_at: int = 0,
    limit_s: float = math.inf,
    until: Callable[[], bool] = lambda: False,
) -> int:
    """The command's exit code.

    Args:
        kill_at: SIGKILL once so many steps are recorded; 0: never.
        limit_s: it is asked to end in order after so long.
        until: or once this is so.
    """
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, "-m", "lockstep.cli.main", *command], env=env)
    metrics = run / "metrics.jsonl"
    began = time.monotonic()
    asked = False
    while process.poll() is None:
        if kill_at and metrics.is_file() and metrics.read_bytes().count(b"\n") >= kill_at:
            process.kill()
        elif not asked and (time.monotonic() - began > limit_s or until()):
            process.terminate()
            asked = True
        time.sleep(0.2)
    return process.wait()


def main() -> None:
    """Run, and write the figures down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", default="vllm==0.32.0")
    parser.add_argument("--update", default="keep")
    parser.add_argument("--steps", type=int, default=54)
    parser.add_argument("--kill-at", type=int, default=0, help="SIGKILL after so many steps, then resume.")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="End each start after so long.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.tiny:
            args.engine = "transformers"
        name, _, version = args.engine.partition("==")
        sets = [*SETS, f"rollout.update={args.update}", f"training.steps={args.steps}"]
        sets += tiny.sets(Path(scratch)) if args.tiny else long_answers.sets(64, prompts=2, group_size=4)
        sets += [*args.set, *([f"engine.version={version}"] if version else [])]
        sets.append(f"training.checkpoint_every={20 if args.kill_at else 1000}")
        run = Path(scratch) / "run"
        recipe = str(HERE.parent / "recipes" / "quickstart.toml")
        command = ["train", recipe, "--engine", name, "--out", str(run)]
        for text in sets:
            command += ["--set", text]
        code = lockstep(command, run, kill_at=args.kill_at, limit_s=args.limit_s)
        if args.kill_at:
            code = lockstep(["train", "--resume", str(run)], run, limit_s=args.limit_s)
        found = figures_of(run)
    document = {"schema": "lockstep.bench.spans/1", "exit_code": code, "engine": args.engine}
    told = [text for text in sets if not text.startswith("model.path=")]
    document |= {"update": args.update, "killed_at": args.kill_at, "sets": told} | found
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"spans-{args.engine.replace('==', '-')}-{args.update}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    sys.exit(code)


if __name__ == "__main__":
    main()
