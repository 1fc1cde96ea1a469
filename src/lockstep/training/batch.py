"""Rollouts as packed rows, with the per-token values that the objective needs beside them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lockstep.config.recipe import Recipe
from lockstep.objectives.aggregation import token_weights
from lockstep.objectives.dpo import pairs_of
from lockstep.objectives.registry import needs_of
from lockstep.policy.model import Policy
from lockstep.policy.packing import Packed
from lockstep.records.samples import Samples
from lockstep.training.versions import Before


@dataclass(eq=False)
class Microbatch:
    """One forward pass. All per-token tensors are [T] in the order of ``row.targets``."""

    row: Packed
    engine_logprobs: Float[Tensor, "T"]
    advantages: Float[Tensor, "T"]
    token_weights: Float[Tensor, "T"]
    """As ``objective.aggregation`` says, over the whole minibatch; 0 outside the loss."""
    loss_mask: Bool[Tensor, "T"]
    """True where the model sampled the token. The rest is conditioned on, neither judged nor learned."""
    sequence_ids: Int[Tensor, "T"]
    """Which of the minibatch's samples each token belongs to, from 0."""
    audited: Bool[Tensor, "T"]
    """False where the trainer has not scored the token under the weights that drew it, and does not."""
    earlier_logprobs: Float[Tensor, "T"]
    """The trainer's where earlier weights drew the token; NaN where those of the step's start did."""
    pairs: Int[Tensor, "P 2"] | None = None
    """Chosen and rejected sample of each pair that lies in this microbatch; None where none are asked for."""
    pair_weight: float = 0.0
    """1 over the pairs of the whole minibatch."""
    reference_logprobs: Float[Tensor, "T"] | None = None
    """A frozen reference's; None until they are computed, or where there is none."""
    old_values: Float[Tensor, "T"] | None = None
    """A value head's when the step began; None as above."""
    returns: Float[Tensor, "T"] | None = None
    """What the head is to learn; None as above."""
    step_logprobs: Float[Tensor, "T"] | None = None
    """The trainer's when the step began, whoever drew the token; None until they are computed."""
    sampling_logprobs: Float[Tensor, "T"] | None = None
    """The trainer's own log-probabilities under the weights that sampled; None until they are computed."""

    def scored(self, now: Float[Tensor, "T"]) -> None:
        """Take in the log-probabilities under the step's first weights."""
        self.step_logprobs = now
        self.sampling_logprobs = torch.where(self.earlier_logprobs.isnan(), now, self.earlier_logprobs)


Minibatch = list[Microbatch]
"""Microbatches whose gradients are added up for one optimizer step."""


def minibatches(
    rollouts: Samples, policy: Policy, recipe: Recipe, before: Before | None = None
) -> list[Minibatch]:
    """Split a step's groups evenly, in order, and pack each part.

    Args:
        before: what is known of tokens that earlier weights drew; None: those of now drew them all.
    """
    n = int(rollouts.lengths.sum())
    per_part = len(rollouts) // recipe.training.minibatches
    known = before or Before(np.full(n, np.nan, np.float32), np.ones(n, bool))
    ends = np.r_[0, np.cumsum(rollouts.lengths)]
    parts = []
    for first in range(0, len(rollouts), per_part):
        tokens = slice(ends[first], ends[first + per_part])
        part = Before(known.logprobs[tokens], known.audited[tokens])
        parts.append(_minibatch(rollouts[first : first + per_part], policy, recipe, part))
    return parts


def _minibatch(samples: Samples, policy: Policy, recipe: Recipe, before: Before) -> Minibatch:
    loss_mask = samples.loss_mask
    kept = _kept(samples, recipe)
    learned = loss_mask & kept[samples.owners]
    per_token = {
        "engine_logprobs": samples.engine_logprobs,
        # Where nothing was sampled there is no advantage, and a NaN would outlive its weight of 0.
        "advantages": np.where(loss_mask, samples.advantages, np.float32(0.0)),
        "token_weights": token_weights(
            learned,
            samples.lengths,
            recipe.objective.aggregation,
            recipe.sampling.max_tokens * recipe.task.turns,
        )
        if learned.any()  # where every completion was cut there is nothing to weigh, which is no error
        else np.zeros(len(learned), np.float32),
        "loss_mask": loss_mask,
        "sequence_ids": samples.owners,
        "audited": before.audited,
        "earlier_logprobs": before.logprobs,
    }
    starts = np.r_[0, np.cumsum(samples.lengths)]
    parts = []
    in_pairs = needs_of(recipe.objective).pairs
    pairs = pairs_of(samples.rewards, samples.group_size) if in_pairs else None
    if pairs is not None:
        # One answer of a pair alone prefers nothing.
        pairs = pairs[kept[pairs].all(axis=1)]
    # A pair's two samples meet in one loss, and so in one row.
    for row in policy.rows(samples.groups, recipe.training.tokens_per_microbatch, whole_groups=in_pairs):
        # Rows keep the order of completions, so each row's tokens are one slice of the flat arrays.
        tokens = slice(starts[row.completions[0]], starts[row.completions[-1] + 1])
        device = policy.head.device
        flat: dict[str, Any] = {
            name: torch.tensor(values[tokens], device=device) for name, values in per_token.items()
        }
        micro = Microbatch(row.to(device), **flat)
        if pairs is not None:
            own = pairs[np.isin(pairs[:, 0], row.completions)]
            micro.pairs = torch.tensor(own, device=device)
            micro.pair_weight = 1.0 / max(1, len(pairs))
        parts.append(micro)
    return parts


def _kept(samples: Samples, recipe: Recipe) -> np.ndarray:
    """bool [samples]: False where the recipe leaves a completion that was cut out of the loss.

    It is judged as any other: the gate and the figures are of all that was sampled.
    """
    cut = np.array([sample.finish_reason == "length" for sample in samples])
    return ~cut if recipe.task.overlong == "mask" else np.ones(len(samples), bool)
