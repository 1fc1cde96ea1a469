"""This loop beside TRL's ``GRPOTrainer``.

Same model, task, prompts a step, group size, completion length, dtype, machine, run.

    pip install -r requirements-bench.lock      # TRL, in the trainer's environment
    python benchmarks/rl_loop.py [--steps 3] [--rounds 2] [--prompts 8] [--json]

Each side runs in a process of its own, in turn (ours, TRL, ours, TRL …), so that neither keeps memory or
threads while the other is timed. Counted are the steps after the first two of each process; a step is
sampling, rewards, training, and for us publishing, loading and proving the weights. TRL generates with its
own transformers path, in the trainer's process. Both update the weights once a step, at the same learning
rate, with the same reward, on the same prompts.
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
from pathlib import Path

WARM_STEPS = 2
TARGET = 3.0
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


def run_ours(steps, prompts):
    """Seconds of each counted step of ``lockstep train``, and samples a step."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [sys.executable, "-m", "lockstep.cli.main", "train", str(RECIPE), "--out", str(run)]
        command += [
            "--set",
            f"training.steps={steps + WARM_STEPS}",
            "--set",
            f"training.prompts_per_step={prompts}",
            "--set",
            "training.checkpoint_every=1000",
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        rows = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step_s"] for row in rows[WARM_STEPS:]], rows[0]["n_samples"]


def trl_config(recipe, steps, output):
    """The recipe in TRL's words."""
    import torch
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=output,
        per_device_train_batch_size=recipe.training.prompts_per_step * recipe.training.group_size,
        num_generations=recipe.training.group_size,
        max_completion_length=recipe.sampling.max_tokens,
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


def run_trl(steps, prompts):
    """The same of ``GRPOTrainer``; the body of a process of its own."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from lockstep.config.recipe import load_recipe
    from lockstep.policy.pretrained import resolve_model
    from lockstep.rollout.rewards import exact_match
    from lockstep.rollout.tasks import Task

    recipe = load_recipe(RECIPE, [f"training.prompts_per_step={prompts}"])
    path = resolve_model(recipe.model.path)
    task = Task(recipe.task, recipe.training.seed)
    n_prompts = recipe.training.prompts_per_step
    group = recipe.training.group_size
    items = [task.item(number) for number in range(n_prompts * (steps + WARM_STEPS))]
    rows = [{"prompt": task.messages(item), "answer": str(item["answer"])} for item in items]

    def reward(completions, answer, **_):
        return [exact_match(c[0]["content"], {"answer": a}) for c, a in zip(completions, answer, strict=True)]

    stamps = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            stamps.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        config = trl_config(recipe, steps + WARM_STEPS, scratch)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        trainer = GRPOTrainer(
            model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(path),
            callbacks=[Clock()],
        )
        trainer.train()
    spent = [b - a for a, b in itertools.pairwise(stamps)]
    return spent[WARM_STEPS:], n_prompts * group


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step, of 8 samples each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trl", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        times, samples = run_trl(args.steps, args.prompts)
        print(json.dumps({"times": times, "samples": samples}))
        return
    ours = []
    trl = []
    samples = 0
    for _ in range(args.rounds):
        times, samples = run_ours(args.steps, args.prompts)
        ours.append(times)
        child = subprocess.run(
            [sys.executable, __file__, "--trl", "--steps", str(args.steps), "--prompts", str(args.prompts)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        trl.append(json.loads(child.stdout.splitlines()[-1])["times"])
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(ours, trl, strict=True)]
    report = {
        "schema": "lockstep.benchmark.rl_loop/1",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "samples_per_step": samples,
        "ours_samples_per_s": samples / statistics.median(itertools.chain(*ours)),
        "trl_samples_per_s": samples / statistics.median(itertools.chain(*trl)),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ours_step_s": ours,
        "trl_step_s": trl,
    }
    if args.json:
        print(json.dumps(report, indent=1))
        return
    print(
        f"{report['machine']}; {samples:.0f} samples a step, fp32, SmolLM2-135M; "
        f"each side {args.rounds} × {args.steps} steps"
    )
    print(
        f"lockstep  {report['ours_samples_per_s']:6.2f} samples/s   vLLM 0.32.0 in its own process, "
        "weights proven after every step"
    )
    print(
        f"TRL       {report['trl_samples_per_s']:6.2f} samples/s   "
        "transformers generate in the trainer's process"
    )
    low, high = report["ratio_range"]
    print(f"ratio     {report['ratio']:6.2f}             (rounds {low:.2f}–{high:.2f}; target ≥ {TARGET:g})")


if __name__ == "__main__":
    main()
