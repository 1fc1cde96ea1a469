"""What the migration's runs found, as one document: ``migration.json``. Nothing in it is computed elsewhere.

runs' files ─► a mean a run and figure, what the ladder said ─┐
           └─► ``lockstep.report.compare``: a verdict a figure ┴─► document ─► ``migration_page.py``

Only runs that finished are compared: a curve that a proof cut short has other steps.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from migration_arms import ARMS, COMPARED, Form, PlannedRun

import lockstep
from lockstep.records.verdicts import BeforeStep
from lockstep.report.compare import compare
from lockstep.report.sources.read import read_runs
from lockstep.report.trajectories import Arm
from lockstep.runs.manifest import processor
from lockstep.runs.read import RunRecord, Steps, open_run
from lockstep.runs.strict import plain

SCHEMA = "lockstep.bench.migration/1"
STORY = ("clip_fraction", "policy_kl_k3_nats", "entropy_mean_nats", "reward_mean")
"""The four curves that the story shows."""
BACKEND = ("policy_ratio_mean", "mismatch_ratio_mean", "gap_abs_mean_nats", "mismatch_kl_k3_nats")
"""What the engine's numbers are off by. Judged apart: the four are held to no stricter level for these."""
SHOWN = (
    *STORY,
    *BACKEND,
    "outside_clip_fraction",
    "gap_abs_max_nats",
    "lag_steps",
    "spanning_fraction",
    "correction_masked_fraction",
    "correction_mass_removed",
    "step_s",
)


def document(
    form: Form, plan: Sequence[PlannedRun], outcomes: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Everything that the page says, as strict JSON.

    Args:
        outcomes: ``migration.RunOutcome`` by the run's name.
    """
    arms = [_arm(name, [run for run in plan if run.arm.name == name], outcomes, out) for name in form.arms]
    return plain(
        {
            "schema": SCHEMA,
            "form": form.name,
            "lockstep": lockstep.__version__,
            "machine": {"cores": len(os.sched_getaffinity(0)), "processor": processor()},
            "seeds": list(form.seeds),
            "seconds": sum(outcome.seconds for outcome in outcomes.values()),
            "common": _common(plan),
            "arms": arms,
            "comparisons": [found for reference in COMPARED for found in _compared(reference, arms, out)],
        }
    )


def _common(plan: Sequence[PlannedRun]) -> list[str]:
    """What every arm sets alike."""
    every = [{text for text in run.sets if not text.startswith("training.seed=")} for run in plan]
    return [text for text in plan[0].sets if all(text in sets for sets in every)] if plan else []


def _arm(name: str, runs: Sequence[PlannedRun], outcomes: Mapping[str, Any], out: Path) -> dict[str, Any]:
    arm = ARMS[name]
    return {
        "name": name,
        "says": arm.says,
        "dtype": arm.dtype,
        "sets": [text for text in runs[0].sets if not text.startswith("training.seed=")],
        "planted": list(arm.plants),
        "runs": [_run(run, outcomes.get(run.name), out) for run in runs],
    }


def _run(run: PlannedRun, outcome: Any, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": run.seed, "name": run.name, "status": "not run", "reason": ""}
    if outcome is not None:
        found |= {"status": outcome.status, "reason": outcome.reason, "seconds": outcome.seconds}
        found["starts"] = outcome.starts
    place = out / run.name
    if not (place / "manifest.json").is_file():
        return found | {"steps": 0, "figures": {}, "ladder": []}
    record = open_run(place)
    engine = record.manifest.engine
    return found | {
        "engine": f"{engine.engine} {engine.version} ({engine.generation})",
        "override": record.manifest.recipe.parity.override,
        "planted": list(record.manifest.planted),
        "steps": len(record.steps),
        "figures": _figures(record.steps),
        "ladder": _ladder(record),
        "alarms": len(record.alarms),
    }


def _figures(steps: Steps) -> dict[str, float]:
    """Means over the steps that logged the figure; the reward of the first and the last quarter besides."""
    found = {}
    for name in SHOWN:
        measured = steps.measured(name)
        if measured.any():
            found[name] = fmean(steps.column(name)[measured].tolist())
    if len(steps):
        rewards = steps.column("reward_mean").tolist()
        quarter = max(1, len(rewards) // 4)
        found["reward_first_quarter"] = fmean(rewards[:quarter])
        found["reward_last_quarter"] = fmean(rewards[-quarter:])
    return found


def _ladder(record: RunRecord) -> list[dict[str, Any]]:
    """What each layer said before the first step; of the first start, if there were several."""
    first = [row.verdict for row in record.verdicts if row.when == BeforeStep(0)][:5]
    rows = []
    for verdict in first:
        cause = verdict.findings[0] if verdict.findings else None
        rows.append(
            {
                "layer": verdict.layer,
                "status": verdict.status,
                "cause": cause.cause if cause else "",
                "effect_nats": cause.effect_nats if cause else None,
                "ci95": list(cause.ci95) if cause else None,
                "fix": cause.fix if cause else "",
            }
        )
    return rows


def _compared(reference: str, arms: Sequence[Mapping[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The arms that belong to a reference held against it, the story's figures and the backend's."""
    finished = {arm["name"]: _curves(arm, out) for arm in arms}
    finished = {name: arm for name, arm in finished.items() if arm is not None}
    others = [finished[name] for name in COMPARED[reference] if name in finished]
    if reference not in finished or not others:
        return []
    held = [finished[reference], *others]
    names = [f"{arm.name}={','.join(f'DIR/{Path(run.source).name}' for run in arm.runs)}" for arm in held]
    found = []
    for kind, figures in (("story", STORY), ("backend", BACKEND)):
        judged = compare(held, figures)
        command = " ".join(["lockstep compare", *names, *(f"--figure {figure}" for figure in figures)])
        found.append(
            {
                "reference": reference,
                "kind": kind,
                "command": command,
                "against": plain(judged.against),
                "series": plain(judged.series) if kind == "story" else [],
            }
        )
    return found


def _curves(arm: Mapping[str, Any], out: Path) -> Arm | None:
    names = [run["name"] for run in arm["runs"] if run["status"] == "finished" and run["steps"]]
    runs = tuple(curve for name in names for curve in read_runs(out / name, {}))
    return Arm(arm["name"], runs) if runs else None
