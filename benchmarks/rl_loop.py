"""This loop beside TRL's ``GRPOTrainer``.

Same model, task, prompts a step, group size, completion length, dtype, machine, run.

    pip install -r requirements-bench.lock      # TRL, in the trainer's environment
    python benchmarks/rl_loop.py [--workload short|long] [--steps 3] [--rounds 2] [--json]

``short``: 64 answers of 5 tokens after three solved examples, which the samples of a step share. ``long``: 32
answers of 96 tokens without examples.

Each side runs in a process of its own, in turn (ours, TRL, ours, TRL …), so that neither keeps memory or
threads while the other is timed. Counted are the steps after the first ones of each process; a step is
sampling, rewards, training, and for us publishing, loading and proving the weights. TRL generates with its
own transformers path, in the trainer's process, all samples of a step at once; its microbatch is the fastest
of those tried before the rounds. Both update the weights once a step, at the same learning rate, with the
same reward, on the same prompts.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from arithmetic import flops_per_s, stages
from long_answers import UNDRAWN, WORKLOADS

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


@dataclass(frozen=True)
class Workload:
    """What is timed."""

    sets: list[str]
    microbatches: tuple[int, ...]
    """Of TRL's, tried in turn."""
    target: float
    warm_steps: int


TIMED = {
    "short": Workload([*WORKLOADS["short"], "training.prompts_per_step=8"], (64, 16), 3.0, 2),
    "long": Workload(WORKLOADS["long"], (32, 8, 4), 4.0, 1),
}


def run_ours(load, steps):
    """The figures of each counted step of ``lockstep train``."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [sys.executable, "-m", "lockstep.cli.main", "train", str(RECIPE), "--out", str(run)]
        last = f"training.steps={steps + load.warm_steps}"
        for text in (*load.sets, last, "training.checkpoint_every=1000"):
            command += ["--set", text]
        here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": here})
        rows = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows[load.warm_steps :]


def trl_config(recipe, steps, microbatch, output):
    """The recipe in TRL's words."""
    import torch
    from trl import GRPOConfig

    samples = recipe.training.prompts_per_step * recipe.training.group_size
    # Answers that ours draws to their limit are drawn to it there.
    to_the_limit = UNDRAWN in recipe.sampling.stop_token_ids
    longest = {"min_new_tokens": recipe.sampling.max_tokens} if to_the_limit else None
    return GRPOConfig(
        output_dir=output,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=samples // microbatch,
        num_generations=recipe.training.group_size,
        max_completion_length=recipe.sampling.max_tokens,
        generation_kwargs=longest,
        max_steps=steps,
        learning_rate=recipe.optimizer.lr,
        lr_scheduler_type="constant",
        temperature=recipe.sampling.temperature,
        beta=0.0,
        num_iterations=1,
        shuffle_dataset=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
    )


def run_trl(load, steps, microbatch):
    """Seconds of each counted step of ``GRPOTrainer``; the body of a process of its own."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from lockstep.config.recipe import load_recipe
    from lockstep.policy.pretrained import resolve_model
    from lockstep.rollout.rewards import reward_named
    from lockstep.rollout.tasks import Task

    recipe = load_recipe(RECIPE, load.sets)
    path = resolve_model(recipe.model.path)
    task = Task(recipe.task, recipe.training.seed)
    judged = reward_named(recipe.task.reward, None)
    items = [task.item(n) for n in range(recipe.training.prompts_per_step * (steps + load.warm_steps))]
    rows = [{"prompt": task.messages(item), "answer": str(item["answer"])} for item in items]

    def reward(completions, answer, **_):
        return [judged(c[0]["content"], {"answer": a}) for c, a in zip(completions, answer, strict=True)]

    stamps = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            stamps.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            reward_funcs=reward,
            args=trl_config(recipe, steps + load.warm_steps, microbatch, scratch),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(path),
            callbacks=[Clock()],
        )
        trainer.train()
    return [b - a for a, b in itertools.pairwise(stamps)][load.warm_steps :]


def apart(args, steps, microbatch):
    """:func:`run_trl` in a process of its own."""
    command = [sys.executable, __file__, "--workload", args.workload]
    command += ["--steps", str(steps), "--trl", str(microbatch)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout.splitlines()[-1])


def measured(args):
    """The report of all rounds."""
    load = TIMED[args.workload]
    tried = {size: statistics.median(apart(args, 1, size)) for size in load.microbatches}
    best = min(tried, key=tried.__getitem__)
    ours = []
    trl = []
    for _ in range(args.rounds):
        ours.append(run_ours(load, args.steps))
        trl.append(apart(args, args.steps, best))
    seconds = [[row["step_s"] for row in rows] for rows in ours]
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(seconds, trl, strict=True)]
    samples = ours[0][0]["n_samples"]
    counted = [row for rows in ours for row in rows]
    peak = flops_per_s()
    return {
        "schema": "lockstep.benchmark.rl_loop/2",
        "workload": args.workload,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "samples_per_step": samples,
        "ours_samples_per_s": samples / statistics.median(itertools.chain(*seconds)),
        "trl_samples_per_s": samples / statistics.median(itertools.chain(*trl)),
        "trl_microbatch": best,
        "trl_step_s_by_microbatch": tried,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "target": load.target,
        "ours_step_s": seconds,
        "trl_step_s": trl,
        "fp32_flops_per_s": peak,
        "stages": stages(counted, peak),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=TIMED, default="short")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trl", type=int, metavar="MICROBATCH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        print(json.dumps(run_trl(TIMED[args.workload], args.steps, args.trl)))
        return
    report = measured(args)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    low, high = report["ratio_range"]
    print(f"{report['machine']}; {args.workload}: {report['samples_per_step']:.0f} samples a step, fp32")
    print(f"lockstep  {report['ours_samples_per_s']:6.2f} samples/s   each step's weights proven")
    print(f"TRL       {report['trl_samples_per_s']:6.2f} samples/s   microbatch {report['trl_microbatch']}")
    print(f"ratio     {report['ratio']:6.2f}   rounds {low:.2f} to {high:.2f}; target {report['target']:g}")
    for name, stage in report["stages"].items():
        print(f"{name:10} {stage['seconds']:7.2f} s  {stage['share']:4.0%}  least {stage['least_s']:.2f} s")


if __name__ == "__main__":
    main()
