"""What some objectives need beside the policy, and what a step's tokens are given of it before any update.

reference model ──score──► reference_logprobs ─┬─► KL in the loss, DPO
                                               └─► KL in the reward ─┐
reward ─────────────────────────────────────────────────────────────┴─► advantages, returns
value head ──────────────► old_values ───────────────────────────────┘
"""

from dataclasses import dataclass

import numpy as np
import torch

from lockstep.config.recipe import Recipe
from lockstep.objectives.advantages import ESTIMATORS, Rewards, gae, whitened
from lockstep.objectives.registry import advantage_of
from lockstep.objectives.regularisers import kl
from lockstep.policy.model import Policy
from lockstep.policy.values import ValueHead
from lockstep.records.samples import Samples
from lockstep.training.batch import Minibatch


@dataclass(frozen=True, eq=False)
class Beside:
    """The trainer's other models."""

    reference: Policy | None = None
    """The frozen reference model."""
    value_head: ValueHead | None = None


@torch.no_grad()
def score_under_sampling_weights(
    parts: list[Minibatch], policy: Policy, temperature: float, value_head: ValueHead | None = None
) -> None:
    """Fill in ``sampling_logprobs`` before any optimizer step changes the weights (the old-logprob pass).

    With a value head its estimates too.
    """
    for part in parts:
        for micro in part:
            hidden = policy.hidden(micro.row)
            micro.scored(policy.project(hidden, micro.row.targets, temperature).logprobs)
            if value_head is not None:
                micro.old_values = value_head(hidden)


@torch.no_grad()
def score_under_reference(parts: list[Minibatch], reference: Policy, temperature: float) -> None:
    """Fill in ``reference_logprobs``: the same function, the same temperature, the same rows."""
    for part in parts:
        for micro in part:
            scores = reference.scores(micro.row.to(reference.device), temperature)
            micro.reference_logprobs = scores.logprobs.to(micro.advantages.device)


def prepare(
    parts: list[Minibatch], rollouts: Samples, policy: Policy, beside: Beside, recipe: Recipe
) -> None:
    """Score what the recipe's objective needs, and make advantages of it that rewards alone do not give.

    Where rewards give them, the samples have them already (``rollout/collect.py``).
    """
    temperature = recipe.sampling.temperature
    objective = recipe.objective
    if beside.reference is not None:
        score_under_reference(parts, beside.reference, temperature)
    pays = objective.kl.coef > 0.0 and objective.kl.place == "reward"
    if not pays and beside.value_head is None:
        # The first minibatch's own forward pass is on these very weights (``step.py``).
        score_under_sampling_weights(parts[1:], policy, temperature)
        return
    score_under_sampling_weights(parts, policy, temperature, beside.value_head)
    rewards = Rewards(
        rollouts.rewards,
        rollouts.group_size,
        rollouts.owners,
        rollouts.loss_mask,
        -objective.kl.coef * _kl_of_tokens(parts, recipe) if pays else None,
    )
    if beside.value_head is None:
        advantages = ESTIMATORS[advantage_of(objective)](rewards, objective.advantage_scale)
    else:
        values = _flat(parts, "old_values")
        estimated = gae(rewards, values, recipe.value_head.gamma, recipe.value_head.lam)
        # The policy's alone are whitened: the head learns what is earned, in its own unit.
        advantages = whitened(estimated.advantages, rewards.loss_mask)
        _share_out(parts, "returns", estimated.returns)
    rollouts.fill(advantages=advantages)
    _share_out(parts, "advantages", np.where(rollouts.loss_mask, advantages, np.float32(0.0)))


def _kl_of_tokens(parts: list[Minibatch], recipe: Recipe) -> np.ndarray:
    estimates = []
    for micro in (micro for part in parts for micro in part):
        assert micro.sampling_logprobs is not None
        assert micro.reference_logprobs is not None
        estimate = kl(recipe.objective.kl.estimator, micro.sampling_logprobs, micro.reference_logprobs)
        estimates.append(estimate.numpy(force=True))
    return np.concatenate(estimates)


def _flat(parts: list[Minibatch], name: str) -> np.ndarray:
    return np.concatenate([getattr(micro, name).numpy(force=True) for part in parts for micro in part])


def _share_out(parts: list[Minibatch], name: str, values: np.ndarray) -> None:
    """Give each microbatch its slice; they keep the order of the samples."""
    start = 0
    for micro in (micro for part in parts for micro in part):
        stop = start + len(micro.loss_mask)
        setattr(micro, name, torch.tensor(values[start:stop], device=micro.loss_mask.device))
        start = stop
