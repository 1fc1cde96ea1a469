"""Rollouts as packed rows, with the per-token values that the objective needs beside them."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lockstep.config.recipe import Recipe
from lockstep.objectives.grpo import token_weights
from lockstep.policy.model import Policy
from lockstep.policy.packing import Group, Packed
from lockstep.rollout.collect import Rollouts


@dataclass(eq=False)
class Microbatch:
    """One forward pass. All per-token tensors are [T] in the order of ``row.targets``."""

    row: Packed
    engine_logprobs: Float[Tensor, "T"]
    advantages: Float[Tensor, "T"]
    token_weights: Float[Tensor, "T"]
    sampling_logprobs: Float[Tensor, "T"] | None = None
    """The trainer's own log-probabilities under the weights that sampled; None until they are computed."""


Minibatch = list[Microbatch]
"""Microbatches whose gradients are added up for one optimizer step."""


def minibatches(rollouts: Rollouts, policy: Policy, recipe: Recipe) -> list[Minibatch]:
    """Split a step's groups evenly, in order, and pack each part."""
    n_groups, size = len(rollouts.prompts), rollouts.group_size
    per_part = n_groups // recipe.training.minibatches
    return [
        _minibatch(rollouts, policy, recipe, range(first * size, (first + per_part) * size))
        for first in range(0, n_groups, per_part)
    ]


def groups_of(rollouts: Rollouts, samples: range) -> list[Group]:
    """The groups that a whole-group range of samples belongs to."""
    size = rollouts.group_size
    return [
        Group(rollouts.prompts[start // size], [rollouts.token_ids(i) for i in range(start, start + size)])
        for start in range(samples.start, samples.stop, size)
    ]


def _minibatch(rollouts: Rollouts, policy: Policy, recipe: Recipe, samples: range) -> Minibatch:
    lengths = rollouts.lengths()[samples.start : samples.stop]
    bounds = np.r_[0, np.cumsum(rollouts.lengths())]
    engine = rollouts.engine_logprobs()[bounds[samples.start] : bounds[samples.stop]]
    advantages = np.repeat(rollouts.advantages[samples.start : samples.stop], lengths)
    weights = token_weights(lengths, recipe.objective.loss_scale)
    starts = np.r_[0, np.cumsum(lengths)]
    parts = []
    for row in policy.rows(groups_of(rollouts, samples), recipe.training.tokens_per_microbatch):
        # Rows keep the order of completions, so each row's tokens are one slice of the flat arrays.
        tokens = slice(starts[row.completions[0]], starts[row.completions[-1] + 1])
        flat = [torch.tensor(values[tokens], device=policy.head.device) for values in (engine, advantages, weights)]
        parts.append(Microbatch(row.to(policy.head.device), *flat))
    return parts
