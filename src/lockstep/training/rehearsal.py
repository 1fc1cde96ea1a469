"""What the training code makes of rollouts at lag 0.

Old-logprob pass, forward and backward, without an optimizer step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.policy.model import Policy
from lockstep.records.samples import Samples
from lockstep.training import batch, beside, step
from lockstep.training.tokens import StepTokens


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """Before any optimizer step, of the tokens that the model sampled; float32 [N]."""

    gap: np.ndarray
    """Log-probabilities of the old-logprob pass − the engine's."""
    log_ratio: np.ndarray
    """Forward pass − old-logprob pass."""
    clip_fraction: float
    loss: float
    """The loss with the trainer's old log-probabilities."""
    loss_borrowed: float
    """The loss with the engine's log-probabilities in their place."""
    owners: np.ndarray
    """The sample of each token, int [N]."""


def rehearse(rollouts: Samples, policy: Policy, recipe: Recipe) -> Rehearsal:
    """The real code on ``rollouts``; gradients are thrown away.

    Raises:
        DivergenceError: for a loss that is no number.
    """
    parts = batch.minibatches(rollouts, policy, recipe)
    beside.score_under_sampling_weights(parts, policy, recipe.sampling.temperature)
    sampled = step.at_sampling(parts, rollouts)
    tokens, loss = _losses(policy, parts, recipe, "trainer")
    # A pass of its own, though its log-probabilities are the ones of the pass before: to share them the step
    # would have to take two objectives at once, for this alone, and what is judged here is the very code that
    # trains. Without gradients, which would show nothing that the first loss's did not, it is the cheapest.
    with torch.no_grad():
        _, borrowed = _losses(policy, parts, recipe, "engine")
    return Rehearsal(
        gap=sampled.sampling_logprobs - sampled.engine_logprobs,
        log_ratio=np.concatenate(tokens.log_ratio),
        clip_fraction=float(np.concatenate(tokens.clipped).mean()),
        loss=loss,
        loss_borrowed=borrowed,
        owners=sampled.owners,
    )


def _losses(
    policy: Policy, parts: list[batch.Minibatch], recipe: Recipe, old: str
) -> tuple[StepTokens, float]:
    """As in training, uncorrected: a correction hides what is judged here."""
    own = replace(recipe, objective=replace(recipe.objective, old_logprobs=old, correction="none"))
    tokens = StepTokens()
    try:
        loss = sum(step.accumulate(part, policy, own, tokens, on_sampling_weights=False) for part in parts)
        step.refuse_divergence(loss)
    finally:
        policy.model.zero_grad(set_to_none=True)
    return tokens, loss
