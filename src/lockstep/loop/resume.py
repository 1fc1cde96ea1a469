"""Bring a killed run's trainer to where it was, from its last checkpoint and the rollouts admitted since.

    checkpoint k ─► replay step k, k + 1, … on rollouts/step-….parquet ─► the first step that is not admitted
                     gate, train, compare with metrics.jsonl

Rollouts of that step may lie drawn: ``stages.sample`` takes them. Refused ones lie elsewhere and are not
looked at.
"""

from collections.abc import Callable

import numpy as np

from lockstep.errors import RunError
from lockstep.loop.run import Run
from lockstep.loop.stages import train_gated
from lockstep.loop.unproven import overriding
from lockstep.parity.gate import Gate
from lockstep.parity.tolerances import REPLAY_ATOL, replay_rtol
from lockstep.records.alarms import Override
from lockstep.records.samples import Samples
from lockstep.records.verdicts import BeforeStep, Verdict
from lockstep.rollout import store
from lockstep.runs.checkpoints import keep_newest, newest_checked
from lockstep.runs.layout import forget_partials
from lockstep.runs.read import read_steps, read_verdicts
from lockstep.runs.strict import drop_partial_line

REPLAYED = ("loss", "entropy_mean_nats", "grad_norm")
"""Figures that a replayed step must give again. The loss alone says nothing of the weights where the policy
ratio is 1; the entropy and the gradient do, and the gate holds the gap."""


Again = Callable[[int, Samples], dict[str, float]]


def catch_up(run: Run, again: Again | None = None) -> int:
    """Bring a killed run's trainer to where it was; returns the first step without admitted rollouts.

    Args:
        again: trains a step on its stored rollouts, and returns its figures; None: as the synchronous loop.

    Raises:
        RunError: when a replayed step does not give the recorded figures, or files of the run are damaged.
        ParityError: when the gate refuses what was admitted: the weights are not those that drew it.
    """
    forget_partials(run.layout)
    drop_partial_line(run.layout.metrics)
    drop_partial_line(run.layout.verdicts)
    recorded = {row.step: row.metrics for row in read_steps(run.layout.metrics)}
    newest = newest_checked(run.layout.checkpoints, lambda told: run.say(f"resume: checkpoint {told}"))
    step = run.pair.trainer.restore(newest) if newest else 0
    keep_newest(run.layout.checkpoints)  # the kill may have come before older ones went
    run.say(f"resume: {newest.path.name if newest else 'no whole checkpoint, from the start'}")
    while step < run.recipe.training.steps and run.layout.rollouts(step).is_file():
        run.gate = _recorded_gate(run, step)
        run.recorder.override = _override_of(run, _recorded_ladders(run, step)) if run.gate is None else None
        rollouts = store.load_step(run.layout.rollouts(step), step, run.recipe, run.pair.trainer.vocabulary)
        figures = again(step, rollouts) if again else train_gated(run, step, rollouts, replayed=True)
        if step not in recorded:  # the kill came between the gate and the step's line
            run.recorder.step(step, step + 1, figures)
        else:
            _refuse_other_figures(run, step, figures, recorded[step])
        run.say(f"resume: step {step + 1} replayed from its stored rollouts")
        step += 1
    run.recorder.override = None  # what this start's own ladder says is not known yet
    lost = sorted(number for number in recorded if number >= step)
    if lost:
        raise RunError(
            f"resume, {run.layout.rollouts(step)}",
            got="no rollouts of a step that metrics.jsonl has as trained",
            expected="them, or a checkpoint that holds the step",
            hint="bring the file back, or start a new run: lockstep train RECIPE",
        )
    return step


def _recorded_gate(run: Run, step: int) -> Gate | None:
    """The gate that a step was held to, from the run's verdicts.

    None where no ladder passed before it and the recipe's override stood in.
    """
    ladders = _recorded_ladders(run, step)
    if _override_of(run, ladders) is not None:
        return None
    passed = [verdict for verdict in ladders if verdict.layer == "numerics" and verdict.status == "PASS"]
    try:
        return Gate.of(run.pair, passed[-1].figures)
    except (IndexError, KeyError) as error:
        raise RunError(
            f"resume, {run.layout.verdicts}",
            got="no passing verdict of layer numerics with its figures",
            expected="the ladder that passed before the first step",
            hint="start a new run: lockstep train RECIPE",
        ) from error


def _override_of(run: Run, ladders: list[Verdict]) -> Override | None:
    """What stood in for the last of these ladders; None where it passed."""
    sentence = run.recipe.parity.override
    # The last climb, which began with its first layer.
    first = max((n for n, verdict in enumerate(ladders) if verdict.layer == "semantics"), default=0)
    failed = any(verdict.status != "PASS" for verdict in ladders[first:])
    return overriding(sentence, ladders[first:]) if sentence and failed else None


def _recorded_ladders(run: Run, step: int) -> list[Verdict]:
    """The verdicts of every ladder that was climbed before a step, in order."""
    return [
        record.verdict
        for record in read_verdicts(run.layout.verdicts)
        if isinstance(record.when, BeforeStep) and record.when.step <= step
    ]


def _refuse_other_figures(run: Run, step: int, figures: dict[str, float], recorded: dict[str, float]) -> None:
    rtol = replay_rtol(run.pair.trainer.dtype)
    for name in REPLAYED:
        then = recorded.get(name, float("nan"))
        if not np.isclose(figures[name], then, rtol=rtol, atol=REPLAY_ATOL):
            raise RunError(
                f"resume, step {step + 1} replayed from its rollouts",
                got=f"{name} {figures[name]:.6g}",
                expected=f"{then:.6g}, as recorded"
                if name in recorded
                else "one in metrics.jsonl to hold it against",
                hint="the weights, the rollouts or the code are others than the run's; start a new run",
            )
