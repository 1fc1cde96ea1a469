"""Layer 5: is the objective at lag 0 what the certificate predicts?

Real rollouts of the recipe's own task go through the real training code, old-logprob pass, forward and
backward, without an optimizer step. On version-exact tokens the policy ratio is 1, nothing is clipped, and
the loss with the engine's numbers as old log-probabilities differs from the loss with the trainer's by no
more than the largest gap can bring about.
"""

from typing import Any

import numpy as np
from msgspec.structs import replace

from lockstep.config.recipe import Objective
from lockstep.errors import DivergenceError
from lockstep.metrics.reduce import mismatch_figures, policy_figures, quantiles_abs
from lockstep.parity.causes import finding
from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import LOSS_SLACK, POLICY_RATIO_AT_LAG_0
from lockstep.records.verdicts import Verdict
from lockstep.rollout import collect
from lockstep.training.rehearsal import Rehearsal

PROMPTS = 4
GROUP = 4


def judge(pair: Pair, seed: int) -> Verdict:
    """The verdict of layer 5."""
    try:
        rehearsed = _at_lag_0(pair, seed)
    except DivergenceError as error:
        text = f"the training code refuses the engine's numbers: {error.got}"
        named = finding(
            "task_tokens_differ",
            np.full(1, np.nan),
            np.zeros(1, int),
            text,
            pair.engine.fix("task_tokens_differ"),
        )
        return Verdict.failed("objective", text, named)
    clip = pair.recipe.objective.clip_low, pair.recipe.objective.clip_high
    figures: dict[str, Any] = mismatch_figures(rehearsed.gap, *clip) | policy_figures(
        rehearsed.log_ratio, *clip
    )
    figures |= {
        "clip_fraction": rehearsed.clip_fraction,
        "loss_with_trainer_old": rehearsed.loss,
        "loss_with_engine_old": rehearsed.loss_borrowed,
        "loss_bound": LOSS_SLACK * float(np.expm1(np.abs(rehearsed.gap).max())),
        "minimal_detectable_effect_nats": POLICY_RATIO_AT_LAG_0,
    }
    return _verdict(pair, rehearsed, figures)


def _at_lag_0(pair: Pair, seed: int) -> Rehearsal:
    training = replace(
        pair.recipe.training, prompts_per_step=PROMPTS, group_size=GROUP, minibatches=1, seed=seed
    )
    # The bound on the loss is of GRPO as a mean over tokens, which stands in for every other.
    clip_low, clip_high = pair.recipe.objective.clip_low, pair.recipe.objective.clip_high
    judged = Objective(clip_low=clip_low, clip_high=clip_high)
    recipe = replace(pair.recipe, training=training, objective=judged)
    rollouts = collect.sample(pair.engine, pair.task, pair.renderer, recipe, 0)
    # Alternating signs, so that both sides of the clip are exercised whatever so few samples' rewards are.
    rollouts.fill(advantages=np.where(rollouts.owners % 2, 1.0, -1.0).astype(np.float32))
    return pair.trainer.rehearse(rollouts, recipe)


def _verdict(pair: Pair, rehearsed: Rehearsal, figures: dict[str, Any]) -> Verdict:
    moved = abs(rehearsed.loss_borrowed - rehearsed.loss)
    cause = ""
    evidence = ""
    size = np.abs(rehearsed.gap)
    if not np.abs(rehearsed.log_ratio).max() <= POLICY_RATIO_AT_LAG_0:
        cause = "policy_ratio_at_lag_0"
        size = np.abs(rehearsed.log_ratio)
        evidence = f"before any optimizer step the policy's log-ratio reaches {size.max():.1e} nats"
    elif not quantiles_abs(rehearsed.gap)["p999"] <= pair.noise.p999:  # NaN where any token is none
        cause = "task_tokens_differ"
        evidence = f"|gap| reaches {size.max():.1e} nats on the task's own tokens, not on the probes"
    # Where every gap is 0 so is the bound, and two float32 sums may still part in their last digit.
    elif not moved <= figures["loss_bound"] + np.finfo(np.float32).eps:
        cause = "loss_not_explained"
        evidence = f"the loss moves by {moved:.1e}, the gaps allow {figures['loss_bound']:.1e}"
    if cause:
        named = finding(cause, size, rehearsed.owners, evidence, pair.engine.fix(cause))
        return Verdict.failed("objective", evidence, named, figures)
    summary = (
        f"at lag 0 the policy ratio is 1, {rehearsed.clip_fraction:.2%} clipped, "
        f"mismatch ESS {figures['mismatch_ess']:.6f}; "
        f"the engine's numbers as old log-probabilities move the loss by {moved:.1e}"
    )
    if pair.recipe.objective.name != "grpo":
        summary += f" (grpo in the place of {pair.recipe.objective.name})"
    return Verdict(layer="objective", status="PASS", summary=summary, n_tokens=size.size, figures=figures)
