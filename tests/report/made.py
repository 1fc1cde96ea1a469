"""Runs and documents for the report's tests, made of given numbers: the same bytes on every machine."""

import json
from pathlib import Path

import msgspec
import numpy as np

from lockstep.config.recipe import load_recipe
from lockstep.records.alarms import Alarm
from lockstep.records.messages import Ready
from lockstep.records.verdicts import AfterSync, BeforeStep, Finding, Verdict
from lockstep.runs.layout import RunLayout, new_run
from lockstep.runs.manifest import Manifest, build_manifest, write_manifest
from lockstep.runs.record import open_recorder
from lockstep.runs.rollouts import About, write_rollouts

ROOT = Path(__file__).parents[2]
SCRIPT = "<script>document.title='owned'</script>"
HOSTILE = [
    SCRIPT,
    "</script>",
    "\x1b[31mred",
    "\u202eevil\u2066",
    "&amp;\"'",
    "\n",
    "\ufeff\u200b",
    "<img src=x>",
]
"""What completions say in these runs: tokens 0 to 7 of the vocabulary."""
READY = Ready(
    engine="vllm",
    version="0.32.0",
    generation="V1",
    distribution="sampler",
    resolved={"model_config.seed": 0, "scheduler_config.async_scheduling": False, SCRIPT: SCRIPT},
    capabilities={},
    start_s=1.0,
)


def vocabulary(directory: Path) -> Path:
    """A ``tokenizer.json`` of hostile words and plain ones."""
    words = {word: at for at, word in enumerate([*HOSTILE, *(f"▁w{n}" for n in range(24))])}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": words}}))
    return directory


def run(
    root: Path, steps: int = 12, rows: int = 8, length: int = 20, failed: bool = False, seed: int = 3
) -> RunLayout:
    """A whole run: manifest, ladder, canaries, metrics, rollouts."""
    layout = new_run(root)
    model = vocabulary(root.parent / "model")
    write_manifest(layout.manifest, _manifest(model))
    recorder = open_recorder(layout)
    for verdict in ladder(failed=failed):
        recorder.verdict(BeforeStep(0), verdict)
    random = np.random.default_rng(seed)
    layout.rollouts(0).parent.mkdir()
    for step in range(steps):
        write_rollouts(
            layout.rollouts(step), completions(step, rows, length, random), About(step=step, group_size=2)
        )
        recorder.step(step, step + 1, figures(step, random))
        status = "NOT_RUN" if step == 4 else "PASS"
        recorder.verdict(AfterSync(step + 1), canary(status))
    return layout


def _manifest(model: Path) -> Manifest:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml", ["training.steps=12"])
    choices = {"device": ("cpu", "auto: no CUDA here"), "attention": ("sdpa", "it packs")}
    made = build_manifest(recipe, READY, choices, Path("model"), resolved=("vllm", "0.32.0"), model={})
    # What differs from machine to machine is left out of what is compared with golden files.
    return msgspec.structs.replace(
        made,
        model_path=str(model),
        versions={"python": "3.11"},
        machine={"system": "Linux"},
        lockstep_version="0",
    )


def ladder(*, failed: bool) -> list[Verdict]:
    """Five layers, or two and a FAIL of the first."""
    if failed:
        found = Finding(
            cause="raw_logprobs",
            effect_nats=0.146,
            ci95=(0.131, 0.162),
            n_tokens=960,
            fix='engine.options.logprobs_mode = "processed_logprobs"',
            evidence=f"raw fits {SCRIPT}",
        )
        return [Verdict.failed("semantics", "the engine reports raw log-probabilities", found)]
    layers = ("semantics", "path", "weights", "numerics", "objective")
    found = {layer: {"mean_nats": float("nan")} for layer in layers} | {
        "path": {
            **spread("decode_vs_prefill", 4e-6),
            **spread("batch_composition", 2e-6),
            "decode_vs_prefill_n_tokens": 512,
            "batch_composition_n_tokens": 128,
        },
        "numerics": {
            **spread("gap", 5.2e-6),
            **spread("rescore_to_trainer", 5e-6),
            "n_tokens": 512,
            "neutral_n_tokens": 512,
            "floor_trainer_repeat_abs_p999_nats": 0.0,
            "floor_trainer_abs_p999_nats": 1.3e-5,
            "gap_p999_in_floors": 4.0,
        },
    }
    return [
        Verdict(layer=layer, status="PASS", summary=f"{layer} holds", n_tokens=512, figures=found[layer])
        for layer in layers
    ]


def spread(name: str, median: float) -> dict[str, float]:
    """The quantiles of a gap, as verdicts hold them."""
    times = {"p50": 1.0, "p90": 2.5, "p99": 5.0, "p999": 10.0, "max": 12.5}
    return {f"{name}_abs_{q}_nats": median * factor for q, factor in times.items()}


def canary(status: str) -> Verdict:
    """A sync's proof."""
    reason = "the update moves the canary less than the noise" if status == "NOT_RUN" else ""
    return Verdict(layer="weights", status=status, summary="as sent", reason=reason, n_tokens=8)


def figures(step: int, random: np.random.Generator) -> dict[str, float]:
    """One step's."""
    return {
        "reward_mean": 0.1 + 0.04 * step + 0.01 * float(random.normal()),
        "entropy_mean_nats": 1.8 - 0.1 * step,
        "clip_fraction": 0.01,
        "policy_kl_k3_nats": float("nan") if step == 5 else 1e-4 * (step + 1),
        "mismatch_kl_k3_nats": 1e-10,
        "gap_abs_p50_nats": 1e-5,
        "gap_abs_max_nats": 6e-5,
        "lag_steps": 0.0,
        "completion_tokens_mean": 12.0,
        "step_s": 12.0,
        "tokens_per_s": 30.0,
        "samples_per_s": 9.0,
    }


def completions(step: int, rows: int, length: int, random: np.random.Generator) -> dict[str, list]:
    """Rollouts with hostile words in the first row and one missing number in the second."""
    ids = [[(at + row) % 32 for at in range(length)] for row in range(rows)]
    engine = -random.exponential(1.0, (rows, length)).astype(np.float32)
    trainer = engine + (1e-5 * random.normal(size=(rows, length))).astype(np.float32)
    trainer[0, 3] += 0.25
    engine[1, 2] = np.nan
    texts = ["".join(([*HOSTILE, *(f" w{n}" for n in range(24))])[t] for t in row) for row in ids]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    return {
        "step": [step] * rows,
        "item": list(range(rows)),
        "group": [row // 2 for row in range(rows)],
        "sample": list(range(rows)),
        "prompt_ids": [[1, 2]] * rows,
        "prompt_tokens": [2] * rows,
        "token_ids": ids,
        "loss_mask": [[True] * length] * rows,
        "engine_logprobs": engine.tolist(),
        "missing_logprobs": [0, 1, *[0] * (rows - 2)][:rows],
        "sampling_logprobs": trainer.tolist(),
        "weight_version": [step] * rows,
        "version_spans": [[{"start": 0, "stop": length, "version": step}]] * rows,
        "finish_reason": ["stop"] * rows,
        "text": texts,
        "reward": [float(row % 2) for row in range(rows)],
        "advantages": [[0.5] * length] * rows,
    }


DIAGNOSIS = {
    "schema": "lockstep.diagnose/1",
    "explained": True,
    "ablation": {
        "total_nats": 0.1,
        "ci95": [0.09, 0.11],
        "factors": [
            {"name": "engine.options.x=1", "flag": "leave it out", "effect_nats": 0.1, "alone_nats": 0.1}
        ],
        "unexplained_nats": 0.0,
    },
}
"""What ``lockstep diagnose --json`` prints, as far as its report reads it."""
CAMPAIGN = {
    "schema": "lockstep.faults/1",
    "hits": 1,
    "missed": 0,
    "outcomes": [
        {
            "name": "stale_head",
            "planted_layer": "weights",
            "found_layer": "weights",
            "found_cause": "stale_head",
            "hit": True,
            "not_run": "",
            "evidence": "x",
        }
    ],
    "matrix": {"weights": {"weights": 1}},
}
"""What ``lockstep faults --json`` prints, as far as its report reads it."""
LEDGER = {
    "schema": "lockstep.ledger/1",
    "step": 1,
    "open_groups": 1,
    "issued": 40,
    "trained": 32,
    "dropped": {"too old": 4},
    "drawn_tokens": 200,
    "trained_tokens": 160,
    "dropped_tokens": {"too old": 30},
    "reissued": 2,
    "kept_lengths": {"8": 30, "16": 2},
    "dropped_lengths": {"16": 4},
}
"""A line of ``ledger.jsonl``."""


def whole_run(root: Path) -> RunLayout:
    """:func:`run` with all that only some runs have: alarms, a ledger, held-out questions."""
    layout = run(root)
    recorder = open_recorder(layout)
    recorder.step(12, 13, figures(12, np.random.default_rng(0)) | {"evaluation_reward_mean": 0.5})
    recorder.alarm(Alarm(step=12, name="mismatch", layer="semantics", sentence=f"ESS 0.71 {SCRIPT}"))
    layout.ledger.write_text(json.dumps(LEDGER) + "\n")
    return layout
