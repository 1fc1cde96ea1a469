"""The stages of a step, each a function of the run. The loops of this folder only put them in order.

    sample ─► reward ─► train_gated ───────────► sync ─► record ─► checkpoint
      │         │          gate │                  │
      │         │     refused ◄─┴─► admitted       └► canary: is version k + 1 served?
      ▼         ▼        ▼             ▼
    rollouts/drawn/…   rollouts/refused/…   rollouts/step-….parquet

A step's samples are on disk before anything else is done with them. They get the name that resume trains on
only when the gate has admitted every token of them, and the gate is in the one stage that trains, replayed or
not. What each stage proves is in ``proofs.py``.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from lockstep.errors import ParityError, RewardError
from lockstep.loop.figures import rollout_figures
from lockstep.loop.proofs import prove_rollouts, prove_sync, prove_transport
from lockstep.loop.run import Run
from lockstep.parity.gate import unscored
from lockstep.records.samples import Samples
from lockstep.records.verdicts import BeforeCheckpoint
from lockstep.records.versions import LoadMode
from lockstep.rollout import collect, store
from lockstep.training.step import AtSampling
from lockstep.training.versions import Before


def sample(run: Run, step: int) -> Samples:
    """Draw one step's samples and store them before anything else; or take those that an interruption left.

    Raises:
        ParityError: for a token without a finite log-probability, and where the engine itself says that other
            weights drew a completion than those that were sent.
    """
    drawn = run.layout.drawn(step)
    if drawn.is_file():
        run.say(f"step {step + 1}: its samples were drawn before the interruption")
        rollouts = store.load_step(drawn, step, run.recipe, run.pair.trainer.vocabulary)
    else:
        rollouts = collect.sample(run.pair.engine, run.pair.task, run.pair.renderer, run.recipe, step)
        store.save(drawn, rollouts)
    leave_out(run, step, rollouts)
    versions = {span.version for sample in rollouts for span in sample.version_spans}
    if versions != {step}:  # this loop publishes once a step, and waits for the load
        told = ", ".join(map(str, sorted(versions)))
        raise refuse(
            run, step, [f"the engine says that version {told} drew them, and was sent version {step}"]
        )
    return rollouts


def leave_out(run: Run, step: int, rollouts: Samples) -> None:
    """Tokens without a number leave the loss, as many as ``parity.missing_share`` lets go.

    Raises:
        ParityError: where there are more; none is left out then.
    """
    if 0 < rollouts.missing <= run.recipe.parity.missing_share * rollouts.loss_mask.sum():
        rollouts.leave_out_missing()
    if rollouts.missing:
        raise refuse(run, step, [f"{rollouts.missing} tokens without a finite log-probability"])


def reward(run: Run, step: int, rollouts: Samples) -> None:
    """Score a step's samples, unless an earlier start has.

    Raises:
        RewardError: when the reward function fails; the samples stay where they are, and resume scores them
            again.
    """
    if rollouts.rewarded:
        return
    drawn = run.layout.drawn(step)
    try:
        collect.score(rollouts, run.pair.task, run.recipe)
    except RewardError as error:
        store.save(drawn, rollouts)  # with the rewards before it, which are not computed again
        error.add_note(f"the samples of step {step} are kept in {drawn}; resume scores them again")
        raise
    store.save(drawn, rollouts)


def train_gated(
    run: Run,
    step: int,
    rollouts: Samples,
    before: Before | None = None,
    judge: Callable[[], None] = lambda: None,
    *,
    replayed: bool = False,
) -> dict[str, float]:
    """Train on a step's rollouts, every token of which the gate has admitted.

    Returns figures by catalog name.

    Args:
        before: scores of what versions before ``step`` drew; None: they drew nothing.
        judge: looks at them before the gate does, when the trainer's scores of all are in them; it raises.
        replayed: they were admitted by an earlier start, and are judged again.

    Raises:
        ParityError: when the gate refuses them, or they were drawn from other weights than those that were
            sent; no weight has changed.
        DivergenceError: for a non-finite loss or gradient.
    """

    version = step  # the loop publishes once a step: before step k the trainer holds version k
    said: dict[str, float] = {}

    def admit(tokens: AtSampling) -> None:
        if not replayed:
            store.save(run.layout.drawn(step), _as_scored(rollouts, before))
        judge()
        assert run.gate is not None or run.recipe.parity.override, "the ladder comes before the first step"
        reasons = run.gate.refusals(tokens) if run.gate is not None else unscored(tokens)
        if reasons:
            raise refuse(run, step, reasons, replayed=replayed)
        if not replayed:
            if run.override is None:
                said.update(prove_rollouts(run, version, rollouts, tokens))
            # The name that resume trains on, given before the optimizer's step: a kill in between trains on
            # it again, and never on what no gate has seen.
            store.admit(run.layout, step)

    # ``said`` comes last: it is filled in the midst of the step.
    return rollout_figures(rollouts, version) | run.pair.trainer.step(rollouts, step, admit, before) | said


def _as_scored(rollouts: Samples, before: Before | None) -> Samples:
    """As they are stored for whoever reads the run: with the trainer's numbers, NaN where it gave none."""
    if before is None:
        return rollouts
    stored = replace(rollouts)
    # In the place of what is not audited stands the engine's own number, which is no score.
    known = np.where(before.audited, rollouts.sampling_logprobs, np.float32("nan"))
    stored.fill(sampling_logprobs=known)
    return stored


def refuse(run: Run, step: int, reasons: list[str], *, replayed: bool = False) -> ParityError:
    """Put a step's samples where nothing trains on them, and say why.

    Replayed ones stay: they were trained on.
    """
    kept = run.layout.rollouts(step) if replayed else store.refuse(run.layout, step)
    return ParityError(
        f"rollouts of step {step}, before they are trained on",
        got="; ".join(reasons),
        expected="every token as the trainer scores it under the weights that drew it",
        hint=f"they are kept in {kept} and are not trained on; lockstep check names the cause",
    )


def sync(run: Run, version: int, mode: LoadMode = "wait") -> dict[str, float]:
    """Publish, load, and prove by the canary that the engine serves what it was sent.

    Args:
        mode: what becomes of what is being drawn.

    Raises:
        WeightSyncError: when it does not; the cause is named.
    """
    began = time.perf_counter()
    if run.canary is None:
        assert run.override is not None
        run.pair.sync(version, mode)
        run.pair.version = version
        run.unproven += 1
        return {"unproven_syncs": float(run.unproven), "sync_s": time.perf_counter() - began}
    # The trainer scores the canary while the engine loads: both only read the weights.
    with run.pair.loading(version, mode):
        trainer = run.canary.trainer_side(run.pair)
    run.pair.version = version
    loaded = time.perf_counter()
    result = prove_sync(run, version, trainer)
    return {
        "canary_gap_abs_max_nats": result.gap_abs_max_nats,
        "canary_shift_abs_mean_nats": result.shift_abs_mean_nats,
        "unproven_syncs": float(version - run.deliveries.proven),
        "sync_s": loaded - began,
        "canary_s": time.perf_counter() - loaded,
    }


def record(run: Run, step: int, figures: dict[str, float], spent_s: float) -> None:
    """A step's line in ``metrics.jsonl``, and one for people."""
    figures |= {
        "step_s": spent_s,
        "tokens_per_s": figures["n_tokens"] / spent_s,
        "samples_per_s": figures["n_samples"] / spent_s,
    }
    run.recorder.step(step, step + 1, figures)
    run.latest = figures
    run.say(_line(run, step, figures))
    alarm = run.watch.look(step, figures)
    if alarm is not None:
        run.recorder.alarm(alarm)
        run.say(f"ALARM {alarm}")


def checkpoint(run: Run, version: int, also: Callable[[Path], None] = lambda partial: None) -> None:
    """Save the weights of ``version``, once their way into the engine is proven.

    Args:
        also: writes what else belongs to it.

    Raises:
        WeightSyncError: when it is refuted.
    """
    prove_transport(run, version, BeforeCheckpoint(version))
    model = run.session.model_path
    run.pair.trainer.save(run.layout.checkpoints, version, model, also, run.ever_overridden)


def _line(run: Run, step: int, figures: dict[str, float]) -> str:
    canary = figures.get("canary_gap_abs_max_nats")
    proven = (
        f"canary {canary:.0e}  weights {run.deliveries.told(step + 1)}"
        if canary is not None
        else str(run.override)
    )
    flight = (
        f"lag {figures['lag_steps']:.2f}  queue {figures['queue_samples']:.0f}  "
        if "queue_samples" in figures
        else ""
    )
    return (
        f"step {step + 1:>3}/{run.recipe.training.steps}  reward {figures['reward_mean']:.3f}  {flight}"
        f"entropy {figures['entropy_mean_nats']:.2f}  "
        f"|gap| max {figures['gap_abs_max_nats']:.0e}  {proven}  {figures['step_s']:.1f} s"
    )
