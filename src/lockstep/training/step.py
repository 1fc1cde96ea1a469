"""One training step: every minibatch once, in order, and the figures of what happened."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lockstep.config.recipe import Recipe
from lockstep.errors import DivergenceError
from lockstep.metrics.reduce import mismatch_figures, policy_figures
from lockstep.objectives.base import LossInputs
from lockstep.objectives.corrections import truncated_importance_weights
from lockstep.objectives.grpo import grpo
from lockstep.policy.model import Policy
from lockstep.rollout.collect import Rollouts
from lockstep.training.batch import Microbatch, Minibatch, minibatches
from lockstep.training.optimizer import MasterAdamW


@dataclass
class Tokens:
    """Per-token values of a step, gathered as the microbatches go by."""

    gap: list[np.ndarray] = field(default_factory=list)
    """Of the first minibatch alone: later ones are trained under other weights than those that sampled."""
    log_ratio: list[np.ndarray] = field(default_factory=list)
    clipped: list[np.ndarray] = field(default_factory=list)
    entropy: list[np.ndarray] = field(default_factory=list)


def train(
    rollouts: Rollouts,
    policy: Policy,
    optimizer: MasterAdamW,
    recipe: Recipe,
    step: int,
    gate: Callable[[np.ndarray], None] = lambda gap: None,
) -> dict[str, float]:
    """Train on one step's rollouts. Returns figures by catalog name.

    Args:
        gate: sees the gap of every token scored under the weights that sampled it, float32 [T], before the first optimizer
            step; raises if they must not be trained on.

    Raises:
        DivergenceError: for a non-finite loss or gradient.
    """
    began = time.perf_counter()
    parts = minibatches(rollouts, policy, recipe)
    if recipe.objective.old_logprobs == "trainer":
        score_under_sampling_weights(parts[1:], policy, recipe.sampling.temperature)
    tokens, loss, norms = Tokens(), 0.0, []
    for number, part in enumerate(parts):
        loss += accumulate(part, policy, recipe, tokens, on_sampling_weights=number == 0)
        if number == 0:
            gate(np.concatenate(tokens.gap))
        norms.append(optimizer.step(step * len(parts) + number))
    clip = recipe.objective.clip_low, recipe.objective.clip_high
    return {
        **mismatch_figures(np.concatenate(tokens.gap), *clip),
        **policy_figures(np.concatenate(tokens.log_ratio), *clip),
        "clip_fraction": float(np.concatenate(tokens.clipped).mean()),
        "entropy_mean_nats": float(np.concatenate(tokens.entropy).mean()),
        "loss": loss,
        "grad_norm": float(np.mean(norms)),
        "lr": optimizer.lr_at(step * len(parts)),
        "train_s": time.perf_counter() - began,
    }


@torch.no_grad()
def score_under_sampling_weights(parts: list[Minibatch], policy: Policy, temperature: float) -> None:
    """Fill in ``sampling_logprobs`` before any optimizer step changes the weights (the old-logprob pass)."""
    for part in parts:
        for micro in part:
            micro.sampling_logprobs = policy.scores(micro.row, temperature).logprobs


def accumulate(part: Minibatch, policy: Policy, recipe: Recipe, tokens: Tokens, *, on_sampling_weights: bool) -> float:
    """Forward and backward over a minibatch; gradients add up in the parameters. Returns the loss.

    Under ``torch.no_grad()`` forward alone.

    Args:
        on_sampling_weights: True when no optimizer step has happened since the rollouts: this forward pass is then its own
            old-logprob pass.
    """
    total = 0.0
    for micro in part:
        scores = policy.scores(micro.row, recipe.sampling.temperature, with_entropy=True)
        now = scores.logprobs.detach()
        if on_sampling_weights:
            micro.sampling_logprobs = now
            tokens.gap.append((now - micro.engine_logprobs).numpy(force=True))
        old = _old_logprobs(micro, recipe)
        inputs = LossInputs(scores.logprobs, old, micro.advantages, micro.token_weights * _correction(micro, recipe))
        outputs = grpo(inputs, recipe.objective.clip_low, recipe.objective.clip_high)
        loss = float(outputs.loss.detach())
        if not np.isfinite(loss):
            raise DivergenceError(
                "objective",
                got=f"loss {loss}",
                expected="a finite number",
                hint="lower optimizer.lr; look at rollouts/",
            )
        if torch.is_grad_enabled():
            outputs.loss.backward()
        total += loss
        tokens.log_ratio.append((now - old).numpy(force=True))
        tokens.clipped.append(outputs.clipped.numpy(force=True))
        assert scores.entropy is not None
        tokens.entropy.append(scores.entropy.numpy(force=True))
    return total


def _correction(micro: Microbatch, recipe: Recipe) -> Tensor | float:
    if recipe.objective.correction == "none":
        return 1.0
    assert micro.sampling_logprobs is not None
    return truncated_importance_weights(micro.sampling_logprobs, micro.engine_logprobs, recipe.objective.correction_cap)


def _old_logprobs(micro: Microbatch, recipe: Recipe) -> Tensor:
    """The denominator of the policy ratio; the engine's own numbers are a certificate's dividend (layer 5)."""
    if recipe.objective.old_logprobs == "engine":
        return micro.engine_logprobs
    assert micro.sampling_logprobs is not None
    return micro.sampling_logprobs
