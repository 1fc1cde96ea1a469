"""From a run directory to what a person reads. No torch."""

import math
from statistics import fmean
from typing import Any

from lockstep.runs.layout import RunLayout
from lockstep.runs.manifest import read_manifest
from lockstep.runs.read import number, read_lines


def summarise(layout: RunLayout) -> dict[str, Any]:
    """The run in a dozen figures; rates and mismatch are over all steps, rewards over its first and last quarter."""
    planted = list(read_manifest(layout.manifest).planted) if layout.manifest.is_file() else []
    rows = [{name: number(value) for name, value in row["metrics"].items()} for row in read_lines(layout.metrics)]
    verdicts = read_lines(layout.verdicts)
    if not rows:
        return {"steps": 0, "run": str(layout.root), "planted": planted}
    quarter = max(1, len(rows) // 4)
    syncs = [v for v in verdicts if v["when"].startswith("after sync")]

    def mean(name: str, part: list[dict[str, float]] = rows) -> float:
        """Of the steps that have the figure: one that was replayed has no time of its own."""
        values = [row[name] for row in part if name in row]
        return fmean(values) if values else math.nan

    first, last = mean("reward_mean", rows[:quarter]), mean("reward_mean", rows[-quarter:])
    timed = [row for row in rows if "step_s" in row]
    return {
        "run": str(layout.root),
        "planted": planted,
        "steps": len(rows),
        "reward_first_quarter": first,
        "reward_last_quarter": last,
        "reward_gain": last - first,
        "clip_fraction": mean("clip_fraction"),
        "policy_kl_k3_nats": mean("policy_kl_k3_nats"),
        "mismatch_kl_k3_nats": mean("mismatch_kl_k3_nats"),
        "gap_abs_max_nats": max(row["gap_abs_max_nats"] for row in rows),
        "phantom_clip_fraction": mean("phantom_clip_fraction"),
        "entropy_first_nats": rows[0]["entropy_mean_nats"],
        "entropy_last_nats": rows[-1]["entropy_mean_nats"],
        "tokens_per_s": mean("tokens_per_s"),
        "samples_per_s": mean("samples_per_s"),
        "seconds_per_step": mean("step_s"),
        "training_s": sum(row["step_s"] for row in timed),
        "steps_timed": len(timed),
        "syncs": len(syncs),
        "syncs_proven": sum(v["status"] == "PASS" for v in syncs),
        "syncs_too_small_to_prove": sum(v["status"] == "NOT_RUN" for v in syncs),
    }


def summary_table(summary: dict[str, Any]) -> str:
    """The summary as plain text."""
    if not summary["steps"]:
        return f"no step was trained; files are in {summary['run']}"
    s = summary
    rows = [
        (
            "reward, first → last quarter",
            f"{s['reward_first_quarter']:.3f} → {s['reward_last_quarter']:.3f}  ({s['reward_gain']:+.3f})",
        ),
        ("clip rate (policy ratio)", f"{s['clip_fraction']:.4f}"),
        ("policy KL (k3)", f"{s['policy_kl_k3_nats']:.2e} nats"),
        ("mismatch KL (k3)", f"{s['mismatch_kl_k3_nats']:.2e} nats"),
        ("mismatch |gap|, largest", f"{s['gap_abs_max_nats']:.2e} nats"),
        ("phantom clips", f"{s['phantom_clip_fraction']:.4f}"),
        ("entropy, first → last step", f"{s['entropy_first_nats']:.3f} → {s['entropy_last_nats']:.3f} nats"),
        ("speed", _speed(s)),
        ("training time", f"{s['training_s']:.0f} s for {s['steps_timed']} of {s['steps']} steps"),
        ("weight syncs proven", f"{s['syncs_proven']} of {s['syncs']}{_too_small(s['syncs_too_small_to_prove'])}"),
        *([("planted on purpose", f"{', '.join(s['planted'])}: this run certifies nothing")] if s["planted"] else []),
        ("files", s["run"]),
    ]
    return "\n".join(f"{name:<30} {value}" for name, value in rows)


def _speed(s: dict[str, Any]) -> str:
    if not s["steps_timed"]:
        return "not measured: every step was replayed"
    return f"{s['tokens_per_s']:.0f} tokens/s, {s['samples_per_s']:.1f} samples/s, {s['seconds_per_step']:.1f} s a step"


def _too_small(n: int) -> str:
    return f"; {n} moved the canary less than the noise, and the way was proven by a perturbation instead" if n else ""
