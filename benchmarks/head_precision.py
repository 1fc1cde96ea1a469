"""What an fp32 head on the engine's side is worth: mean |trainer − engine|, on and off, under a bf16 body.

    python benchmarks/head_precision.py [--tokens 2048] [--json]

The trainer has a bf16 body and an fp32 head throughout. Every vLLM that is installed is started twice, with
its own bf16 head and with an fp32 one (from 0.28 vLLM's ``head_dtype``, before that Lockstep's plugin), and
draws from the same prompts with the same seeds. The interval is a bootstrap over sequences. TARGET: the mean
falls on each V1 version.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np

from lockstep.engines.base import EngineSpec
from lockstep.engines.environments.locate import installed
from lockstep.engines.registry import Choice, start
from lockstep.metrics.reduce import bootstrap_mean_ci95
from lockstep.policy.model import load_policy
from lockstep.policy.pretrained import resolve_model
from lockstep.records.samples import Group
from lockstep.records.tokens import FLOAT32, INT32, SamplingParams

MODEL = "smollm2-135m-instruct"
LENGTH = 32
CLIP = (0.9, 1.1)


def prompts_of(n):
    rng = np.random.default_rng(0)
    return [rng.integers(300, 40_000, rng.integers(4, 24)).astype(np.int32) for _ in range(n)]


def measure(environment, head_dtype, policy, n):
    """|trainer − engine| of each token, and which sequence it belongs to."""
    prompts = prompts_of(n)
    with tempfile.TemporaryDirectory() as scratch:
        spec = EngineSpec(
            model_path=resolve_model(MODEL),
            dtype="bfloat16",
            head_dtype=head_dtype,
            max_model_len=128,
            options={},
            weights_dir=Path(scratch),
            log_path=Path(scratch) / "engine.log",
        )
        engine = start(Choice("vllm", environment, "benchmark"), spec)
        measured_head = engine.ready.resolved["worker.head_dtype"]
        params = [SamplingParams(max_tokens=LENGTH, seed=row) for row in range(n)]
        found = engine.sample(prompts, params)
        engine.close()
    groups = [Group(p, [np.frombuffer(c.token_ids, INT32)]) for p, c in zip(prompts, found, strict=True)]
    gap = np.concatenate(policy.score(groups, 1.0)) - np.frombuffer(
        b"".join(c.logprobs for c in found), FLOAT32
    )
    ratio = np.exp(gap)
    low, high = bootstrap_mean_ci95(np.abs(gap), np.repeat(np.arange(n), LENGTH))
    return {
        "head": measured_head,
        "gap_abs_mean_nats": float(np.abs(gap).mean()),
        "ci95": [low, high],
        "outside_fraction": float(((ratio < CLIP[0]) | (ratio > CLIP[1])).mean()),
        "n_tokens": int(gap.size),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    policy = load_policy(resolve_model(MODEL), "bfloat16", "float32")
    versions = [environment for environment in installed() if environment.name == "vllm"]
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    if not args.json:
        print(f"{machine}; {MODEL}, bf16 body, trainer's head fp32, {args.tokens} tokens at T = 1")
    results = {}
    for environment in versions:
        off, on = (
            measure(environment, head, policy, args.tokens // LENGTH) for head in ("bfloat16", "float32")
        )
        results[environment.version] = {"generation": environment.generation, "off": off, "on": on}
        if not args.json:
            for name, side in (("off", off), ("on", on)):
                low, high = side["ci95"]
                print(
                    f"vllm {environment.version:<12} fp32 head {name:<4} "
                    f"mean |gap| {side['gap_abs_mean_nats']:.4f} (95 % {low:.4f} to {high:.4f})  "
                    f"outside [0.9, 1.1] {side['outside_fraction']:.1%}"
                )
            change = on["gap_abs_mean_nats"] / off["gap_abs_mean_nats"]
            target = ", target < 1" if environment.generation == "V1" else ""
            print(f"{'':<17} on / off  {change:.3f}{target}")
    if args.json:
        print(
            json.dumps(
                {"schema": "lockstep.benchmark.head_precision/1", "machine": machine, "versions": results},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
