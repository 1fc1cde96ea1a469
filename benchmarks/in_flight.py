"""The two loops on the same samples, in turn: samples a second, and how long each side had nothing to do.

    python benchmarks/in_flight.py [--recipe recipes/quickstart.toml] [--steps 6] [--rounds 3] [--lags 1 2 4]
    python benchmarks/in_flight.py --token-s 0.05 --train-s 1.5 …    an accelerator simulated on each side

Each loop is ``lockstep train`` in a process of its own, synchronous and in flight in turn; counted are the
steps after the first two. The ratio is of neighbours, so that a slow hour of the machine is in both. With
``--token-s`` (on the transformers engine) a group is held back for its longest sample's tokens times that,
whoever else is drawn, as on an accelerator whose batch has room; with ``--train-s`` a step takes so much
longer. *bound* is then max(generate, train) over what the synchronous steps measured: their sampling, and
their rest.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM_STEPS = 2
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


def one(recipe: str, sets: list[str], out: str, token_s: float, train_s: float) -> None:
    """A run; the body of a process of its own."""
    from lockstep import api
    from lockstep.config.recipe import load_recipe

    if token_s:
        _pace_engine(token_s)
    if train_s:
        _pace_trainer(train_s)
    api.train(load_recipe(Path(recipe), sets), out=out, say=lambda text: print(text, file=sys.stderr))


def _pace_engine(token_s: float) -> None:
    from lockstep.engines.streaming import Begun, then
    from lockstep.engines.transformers import TransformersEngine

    begin, sample = TransformersEngine._begin, TransformersEngine._sample

    def held(completions: list) -> float:
        return max(len(c.token_ids) // 4 for c in completions) * token_s

    def paced_begin(self, prompt, params):
        import threading
        from concurrent.futures import Future

        begun, ended = begin(self, prompt, params), Future()

        def later(future: Future) -> None:
            completions = future.result()
            threading.Timer(held(completions), ended.set_result, [completions]).start()

        begun.future.add_done_callback(later)
        return Begun(then(ended, list), begun.cancel)

    def paced_sample(self, prompts, params):
        completions = sample(self, prompts, params)
        if len(prompts) > 1:  # the synchronous loop's: all of a step at once
            time.sleep(held(completions))
        return completions

    TransformersEngine._begin = paced_begin
    TransformersEngine._sample = paced_sample


def _pace_trainer(train_s: float) -> None:
    from lockstep.training.trainer import Trainer

    step = Trainer.step

    def paced(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        time.sleep(train_s)
        return found

    Trainer.step = paced


def measured(args: argparse.Namespace, sets: list[str]) -> dict[str, float]:
    """Means over the counted steps of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--one", f"{scratch}/run", "--recipe", args.recipe]
        command += ["--token-s", str(args.token_s), "--train-s", str(args.train_s)]
        steps = f"training.steps={args.steps + WARM_STEPS}"
        for text in (*args.set, *sets, steps, "training.checkpoint_every=1000"):
            command += ["--set", text]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines][WARM_STEPS:]
    mean = {name: statistics.fmean(row[name] for row in rows) for name in ("step_s", "sample_s", "n_samples")}
    idle = mean["sample_s"] / mean["step_s"]
    engine = [row["engine_idle_s"] / row["step_s"] for row in rows if "engine_idle_s" in row]
    return {
        "step_s": mean["step_s"],
        "samples_per_s": mean["n_samples"] / mean["step_s"],
        "generate_s": mean["sample_s"],
        "trainer_idle": idle,
        "engine_idle": statistics.fmean(engine) if engine else 1.0 - idle,
        "reward": statistics.fmean(row["reward_mean"] for row in rows),
    }


def compared(args: argparse.Namespace, lag: int) -> dict[str, float]:
    """One lag beside the synchronous loop, over all rounds."""
    update = "wait" if args.token_s else args.update
    flight = ["loop.kind=in_flight", f"rollout.max_lag={lag}", f"rollout.update={update}"]
    pairs = [(measured(args, []), measured(args, flight)) for _ in range(args.rounds)]
    ratios = [ours["samples_per_s"] / theirs["samples_per_s"] for theirs, ours in pairs]
    sync, ours = ({k: statistics.fmean(p[side][k] for p in pairs) for k in pairs[0][0]} for side in (0, 1))
    bound = max(sync["generate_s"], sync["step_s"] - sync["generate_s"])
    return {
        "lag": lag,
        "sync_samples_per_s": sync["samples_per_s"],
        "samples_per_s": ours["samples_per_s"],
        "ratio": statistics.fmean(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "of_bound": bound / ours["step_s"],
        "trainer_idle": ours["trainer_idle"],
        "engine_idle": ours["engine_idle"],
        "sync_trainer_idle": sync["trainer_idle"],
        "reward": ours["reward"],
        "sync_reward": sync["reward"],
    }


def main() -> None:
    """Print a line a lag."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lags", type=int, nargs="+", default=[1])
    parser.add_argument("--update", default="keep")
    parser.add_argument("--token-s", type=float, default=0.0)
    parser.add_argument("--train-s", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.recipe, args.set, args.one, args.token_s, args.train_s)
        return
    table = [compared(args, lag) for lag in args.lags]
    if args.json:
        print(json.dumps({"schema": "lockstep.bench.in_flight/1", "rows": table}))
        return
    for row in table:
        spread = f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})"
        idle = f"trainer {row['trainer_idle']:.0%} (synchronous {row['sync_trainer_idle']:.0%})"
        print(
            f"lag {row['lag']}: {row['samples_per_s']:.2f} samples/s, synchronous "
            f"{row['sync_samples_per_s']:.2f}; ratio {spread}; {row['of_bound']:.0%} of "
            f"max(generate, train); idle: {idle}, engine {row['engine_idle']:.0%}"
        )


if __name__ == "__main__":
    main()
