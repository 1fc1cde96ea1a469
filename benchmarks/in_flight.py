"""The two loops on the same questions, in turn: samples a second, and how long each side had nothing to do.

    python benchmarks/in_flight.py [--recipe RECIPE] [--workload long] [--cores 0 1] [--lags 1 2]
    python benchmarks/in_flight.py --tiny --token-s 0.005 --train-s 1.5 --lags 1 2 4    simulated

Each loop is ``lockstep train`` in a process of its own, synchronous and in flight in turn. Both are given the
same questions and seeds. *steady*: the steps after the first two, and before the last ``max_lag``, in which
nothing is left to be drawn. *whole*: every step, the pipeline's filling and draining among them. The ratio is
of neighbours, so that a slow hour of the machine is in both. The ladder before the first step is a small one,
and in neither figure. ``--cores N``: so many are the engine's, the others the trainer's; 0: both have all.

With ``--token-s`` (on the transformers engine) a group is held back for the longest of its samples' lengths
times that, whoever else is drawn, as on an accelerator whose batch has room. The lengths are log-normal,
long-tailed, and the same for a group in each loop; the group is of the version that its request met, and no
load waits for it. With ``--train-s`` a step takes so much longer. *bound* is then max(generate, train)
over what the synchronous steps measured: their sampling, and their rest. ``--tiny``: what is really computed
is a tiny model's, so that the waits are nearly all.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from long_answers import WORKLOADS
from schedule_clock import World

from lockstep.records.tokens import SamplingParams

WARM_STEPS = 2
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
SMALL_LADDER = [
    "parity.probe_prompts=4",
    "parity.probe_tokens=8",
    "parity.draw_tokens=256",
    "parity.draws_see=1.0",
    "training.checkpoint_every=1000",
]
TINY = [
    "engine.name=transformers",
    "training.prompts_per_step=4",
    "training.group_size=4",
    "sampling.max_tokens=12",
]
TIMES = ("step_s", "sample_s", "earlier_s", "replay_s", "reward_s", "train_s", "sync_s", "canary_s")


def one(recipe: str, sets: list[str], out: str, token_s: float, train_s: float) -> None:
    """A run; the body of a process of its own."""
    from lockstep import api
    from lockstep.config.recipe import load_recipe

    sys.path.insert(0, str(tiny.ROOT))  # the tiny model's reward is one of the tests'
    if token_s:
        _pace_engine(token_s)
    if train_s:
        _pace_trainer(train_s)
    api.train(load_recipe(Path(recipe), sets), out=out, say=lambda text: print(text, file=sys.stderr))


def _pace_engine(token_s: float) -> None:
    from lockstep.engines.streaming import Begun, then
    from lockstep.engines.transformers import TransformersEngine

    begin = TransformersEngine._begin
    sample = TransformersEngine._sample

    def held(asked: Sequence[SamplingParams]) -> float:
        return token_s * max(longest(sampling) for sampling in asked)

    def paced_begin(self, prompt, params):
        import threading
        from concurrent.futures import Future

        begun = begin(self, prompt, params)
        ended = Future()

        def later(future: Future) -> None:
            completions = future.result()
            threading.Timer(held([params]), ended.set_result, [completions]).start()

        begun.future.add_done_callback(later)
        return Begun(then(ended, list), begun.cancel)

    def paced_sample(self, prompts, params):
        completions = sample(self, prompts, params)
        if len(prompts) > 1:  # the synchronous loop's: all of a step at once
            time.sleep(held(params))
        return completions

    TransformersEngine._begin = paced_begin
    TransformersEngine._sample = paced_sample


def longest(sampling: SamplingParams) -> int:
    """Tokens of the longest simulated sample of a request."""
    world = World(group_size=sampling.n, length_median=100.0, length_most=800)
    return int(world.lengths(np.random.default_rng(sampling.seed)).max())


def _pace_trainer(train_s: float) -> None:
    from lockstep.training.trainer import Trainer

    step = Trainer.step

    def paced(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        time.sleep(train_s)
        return found

    Trainer.step = paced


def measured(args: argparse.Namespace, sets: list[str], tail: int) -> dict[str, Any]:
    """One run: means over its steady steps, and the whole.

    Args:
        tail: steps after them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--one", f"{scratch}/run", "--recipe", args.recipe]
        command += ["--token-s", str(args.token_s), "--train-s", str(args.train_s)]
        steps = f"training.steps={WARM_STEPS + args.steps + tail}"
        load = [*tiny.sets(Path(scratch)), *TINY] if args.tiny else WORKLOADS[args.workload]
        for text in (*SMALL_LADDER, *load, *args.set, *sets, steps):
            command += ["--set", text]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()
    every = [json.loads(line)["metrics"] for line in lines]
    rows = every[WARM_STEPS : WARM_STEPS + args.steps]
    mean = {name: statistics.fmean(row.get(name, 0.0) for row in rows) for name in TIMES}
    trainer_idle = mean["sample_s"] / mean["step_s"]
    drew = [row["engine_idle_s"] / row["step_s"] for row in rows if "engine_idle_s" in row]
    engine_idle = statistics.fmean(drew) if drew else 1.0 - trainer_idle
    return {
        **mean,
        "samples_per_s": sum(row["n_samples"] for row in rows) / sum(row["step_s"] for row in rows),
        "whole_samples_per_s": sum(row["n_samples"] for row in every) / sum(row["step_s"] for row in every),
        "trainer_idle": trainer_idle,
        "engine_idle": engine_idle,
        "overlap": max(0.0, 1.0 - trainer_idle - engine_idle),
        "spanning": statistics.fmean(row.get("spanning_fraction", 0.0) for row in rows),
        "gap_abs_max_nats": max(row["gap_abs_max_nats"] for row in every),
        "tokens_mean": statistics.fmean(row["completion_tokens_mean"] for row in rows),
        "reward": statistics.fmean(row["reward_mean"] for row in rows),
        "rewards": [row["reward_mean"] for row in every],
        "step_ends_s": list(itertools.accumulate(row["step_s"] for row in every)),
    }


def to_same_reward(sync: dict[str, Any], ours: dict[str, Any]) -> float:
    """Seconds to the highest mean reward of four steps that both come to: synchronous over in flight."""
    smooth = [np.convolve(run["rewards"], np.full(4, 0.25), "valid") for run in (sync, ours)]
    both = min(rewards.max() for rewards in smooth)
    seconds = [
        run["step_ends_s"][int(np.argmax(rewards >= both)) + 3]
        for run, rewards in zip((sync, ours), smooth, strict=True)
    ]
    return seconds[0] / seconds[1]


def round_of(args: argparse.Namespace) -> tuple[dict[str, Any], dict[tuple[int, int], dict[str, Any]]]:
    """The synchronous loop, then each lag and split of the cores beside it."""
    tail = max(args.lags)
    sync = measured(args, [], tail)
    flights = {}
    for lag, cores in itertools.product(args.lags, args.cores):
        sets = ["loop.kind=in_flight", f"rollout.max_lag={lag}", f"rollout.update={args.update}"]
        flights[lag, cores] = measured(args, [*sets, f"rollout.cores={cores}"], tail)
        print(told(compared([(sync, flights[lag, cores])], lag, cores)), flush=True)
    return sync, flights


def compared(pairs: list[tuple[dict[str, Any], dict[str, Any]]], lag: int, cores: int) -> dict[str, Any]:
    """One lag and split over all rounds: the synchronous loop's figures and its own."""
    numbers = [name for name, value in pairs[0][0].items() if not isinstance(value, list)]
    sync, ours = ({k: statistics.fmean(p[side][k] for p in pairs) for k in numbers} for side in (0, 1))
    bound = max(sync["sample_s"], sync["step_s"] - sync["sample_s"])
    steady, whole = (
        [ours[name] / theirs[name] for theirs, ours in pairs]
        for name in ("samples_per_s", "whole_samples_per_s")
    )
    return {
        "lag": lag,
        "cores": cores,
        "ratio": statistics.fmean(steady),
        "ratio_least": min(steady),
        "ratio_most": max(steady),
        "whole_ratio": statistics.fmean(whole),
        "to_same_reward_ratio": statistics.fmean(to_same_reward(*pair) for pair in pairs),
        "of_bound": bound / ours["step_s"],
        "synchronous": sync,
        "in_flight": ours,
    }


def told(row: dict[str, Any]) -> str:
    """A row for people."""
    ours, sync = row["in_flight"], row["synchronous"]
    split = f"engine {row['cores']} of the cores" if row["cores"] else "all cores to both"
    parts = ", ".join(f"{name[:-2]} {ours[name]:.2f} ({sync[name]:.2f})" for name in TIMES)
    spread = f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})"
    idle = (
        f"trainer {ours['trainer_idle']:.0%} ({sync['trainer_idle']:.0%}), "
        f"engine {ours['engine_idle']:.0%} ({sync['engine_idle']:.0%})"
    )
    return (
        f"lag {row['lag']}, {split}: {ours['samples_per_s']:.2f} samples/s, synchronous "
        f"{sync['samples_per_s']:.2f}; ratio {spread}, whole {row['whole_ratio']:.2f}, "
        f"to the same reward {row['to_same_reward_ratio']:.2f}; "
        f"{row['of_bound']:.0%} of max(generate, train)\n"
        f"  idle (synchronous): {idle}; both busy {ours['overlap']:.0%}\n"
        f"  seconds a step (synchronous): {parts}\n"
        f"  {ours['spanning']:.0%} of the samples span an update; |gap| max {ours['gap_abs_max_nats']:.1e}"
    )


def main() -> None:
    """Print a line a lag and split."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--workload", choices=WORKLOADS, default="long")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lags", type=int, nargs="+", default=[1])
    parser.add_argument("--cores", type=int, nargs="+", default=[0])
    parser.add_argument("--update", default="keep")
    parser.add_argument("--token-s", type=float, default=0.0)
    parser.add_argument("--train-s", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, help="Where the figures go, as JSON.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.recipe, args.set, args.one, args.token_s, args.train_s)
        return
    if args.token_s:
        args.update = "wait"
    began = time.perf_counter()
    rounds = [round_of(args) for _ in range(args.rounds)]
    table = [
        compared([(sync, flights[chosen]) for sync, flights in rounds], *chosen) for chosen in rounds[0][1]
    ]
    if args.rounds > 1:
        print(f"over {args.rounds} rounds:", *map(told, table), sep="\n")
    if args.out:
        machine = {
            "cores": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg(),
            "seconds": time.perf_counter() - began,
        }
        settings = {name: str(value) for name, value in vars(args).items() if name not in ("one", "out")}
        settings["recipe"] = Path(args.recipe).name
        document = {"schema": "lockstep.bench.in_flight/2", **machine, "settings": settings, "rows": table}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
