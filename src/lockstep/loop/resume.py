"""Bring a killed run's trainer to where it was, from its last checkpoint and the rollouts that were admitted since.

    checkpoint k ─► replay step k, k + 1, … on rollouts/step-….parquet ─► the first step that is not admitted
                     gate, train, compare with metrics.jsonl

Rollouts of that step may lie drawn: ``stages.sample`` takes them. Refused ones lie elsewhere and are not looked at.
"""

from typing import Any

import numpy as np

from lockstep.errors import RunError
from lockstep.loop.stages import Run, train_gated
from lockstep.parity.gate import Gate
from lockstep.parity.tolerances import REPLAY_ATOL, replay_rtol
from lockstep.rollout import store
from lockstep.runs.read import drop_partial_line, number, read_lines
from lockstep.runs.write import append_metrics, forget_partials
from lockstep.training.checkpoint import keep_newest, newest_checkpoint

REPLAYED = ("loss", "entropy_mean_nats", "grad_norm")
"""Figures that a replayed step must give again. The loss alone says nothing of the weights where the policy ratio is 1; the
entropy and the gradient do, and the gate holds the gap."""


def catch_up(run: Run) -> int:
    """Bring a killed run's trainer to where it was. Returns the first step whose rollouts are not admitted yet.

    Raises:
        RunError: when a replayed step does not give the recorded figures, or files of the run are damaged.
        ParityError: when the gate refuses what was admitted: the weights are not those that drew it.
    """
    forget_partials(run.layout)
    drop_partial_line(run.layout.metrics)
    drop_partial_line(run.layout.verdicts)
    recorded = {row["step"]: row["metrics"] for row in read_lines(run.layout.metrics)}
    keep_newest(run.layout.checkpoints)  # the kill may have come before older ones went
    newest = newest_checkpoint(run.layout.checkpoints)
    step = run.pair.trainer.restore(newest) if newest else 0
    run.say(f"resume: {newest.name if newest else 'no checkpoint yet, from the start'}")
    while step < run.recipe.training.steps and run.layout.rollouts(step).is_file():
        run.gate = run.gate or _recorded_gate(run)
        rollouts = store.load(run.layout.rollouts(step), run.recipe.training.group_size, run.recipe.sampling)
        figures = train_gated(run, step, rollouts, replayed=True)
        if step not in recorded:
            append_metrics(run.layout.metrics, step, step + 1, figures)
        else:
            _refuse_other_figures(run, step, figures, recorded[step])
        run.say(f"resume: step {step + 1} replayed from its stored rollouts")
        step += 1
    lost = sorted(number for number in recorded if number >= step)
    if lost:
        raise RunError(
            f"resume, {run.layout.rollouts(step)}",
            got="no rollouts of a step that metrics.jsonl has as trained",
            expected="them, or a checkpoint that holds the step",
            hint="bring the file back, or start a new run: lockstep train RECIPE",
        )
    return step


def _recorded_gate(run: Run) -> Gate:
    """The gate of the ladder that passed last, from the run's verdicts."""
    rows = [row for row in read_lines(run.layout.verdicts) if row["layer"] == "numerics" and row["status"] == "PASS"]
    try:
        return Gate.of(run.pair, {name: number(value) for name, value in rows[-1]["figures"].items() if name.startswith("gap_")})
    except (IndexError, KeyError) as error:
        raise RunError(
            f"resume, {run.layout.verdicts}",
            got="no passing verdict of layer numerics with its figures",
            expected="the ladder that passed before the first step",
            hint="start a new run: lockstep train RECIPE",
        ) from error


def _refuse_other_figures(run: Run, step: int, figures: dict[str, float], recorded: dict[str, Any]) -> None:
    rtol = replay_rtol(run.pair.trainer.dtype)
    for name in REPLAYED:
        then = number(recorded[name])
        if not np.isclose(figures[name], then, rtol=rtol, atol=REPLAY_ATOL):
            raise RunError(
                f"resume, step {step + 1} replayed from its rollouts",
                got=f"{name} {figures[name]:.6g}",
                expected=f"{then:.6g}, as recorded",
                hint="the weights, the rollouts or the code are others than the run's; start a new run",
            )
