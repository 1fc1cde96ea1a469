"""One training step: every minibatch once, in order, and the figures of what happened."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lockstep.config.recipe import Objective, Recipe
from lockstep.errors import DivergenceError
from lockstep.metrics.reduce import mismatch_figures, policy_figures
from lockstep.objectives.base import LossInputs
from lockstep.objectives.corrections import truncated_importance_weights
from lockstep.objectives.registry import loss_of
from lockstep.policy.model import Policy
from lockstep.records.samples import Samples
from lockstep.training.batch import Microbatch, Minibatch, minibatches
from lockstep.training.optimizer import MasterAdamW


@dataclass(frozen=True, eq=False)
class AtSampling:
    """Every token of a step that the model sampled, as both sides score it.

    Under the weights that drew it; float32 [N], nats.
    """

    sampling_logprobs: np.ndarray
    """The trainer's."""
    engine_logprobs: np.ndarray
    owners: np.ndarray
    """int [N]: the sample each token belongs to."""


Gate = Callable[[AtSampling], None]
"""Raises where a step must not be trained on. Called once a step, before its first optimizer update."""


@dataclass
class Tokens:
    """Per-token values of a step's sampled tokens, gathered as the microbatches go by."""

    log_ratio: list[np.ndarray] = field(default_factory=list)
    clipped: list[np.ndarray] = field(default_factory=list)
    entropy: list[np.ndarray] = field(default_factory=list)

    def add(self, sampled: Tensor, log_ratio: Tensor, clipped: Tensor, entropy: Tensor) -> None:
        """A microbatch's, [T] each."""
        self.log_ratio.append(log_ratio[sampled].numpy(force=True))
        self.clipped.append(clipped[sampled].numpy(force=True))
        self.entropy.append(entropy[sampled].numpy(force=True))


def train(
    rollouts: Samples,
    policy: Policy,
    optimizer: MasterAdamW,
    recipe: Recipe,
    step: int,
    gate: Gate,
) -> dict[str, float]:
    """Train on one step's rollouts: the only way to an optimizer update. Returns figures by catalog name.

    ::

        old-logprob pass over minibatches 2 … n ─► forward and backward of minibatch 1
            ─► gate(all tokens) ─► update 1 ─► …

    The first minibatch's own forward pass is on the weights that sampled, so only the others need a pass for
    the gate.

    Raises:
        DivergenceError: for a non-finite loss or gradient.
        Exception: the gate's, before any weight has changed; no gradient is left behind.
    """
    began = time.perf_counter()
    parts = minibatches(rollouts, policy, recipe)
    score_under_sampling_weights(parts[1:], policy, recipe.sampling.temperature)
    tokens, first, *rest = Tokens(), *parts
    losses = [accumulate(first, policy, recipe, tokens, on_sampling_weights=True)]
    sampled = at_sampling(parts, rollouts)
    try:
        gate(sampled)
        refuse_divergence(losses[0])
    except BaseException:
        optimizer.forget_gradients()
        raise
    norms = [optimizer.step(step * len(parts))]
    for number, part in enumerate(rest, 1):
        losses.append(accumulate(part, policy, recipe, tokens, on_sampling_weights=False))
        refuse_divergence(losses[-1])
        norms.append(optimizer.step(step * len(parts) + number))
    clip = recipe.objective.clip_low, recipe.objective.clip_high
    return {
        **mismatch_figures(sampled.sampling_logprobs - sampled.engine_logprobs, *clip),
        **policy_figures(np.concatenate(tokens.log_ratio), *clip),
        "clip_fraction": float(np.concatenate(tokens.clipped).mean()),
        "entropy_mean_nats": float(np.concatenate(tokens.entropy).mean()),
        "loss": float(sum(losses)),
        "grad_norm": float(np.mean(norms)),
        "lr": optimizer.lr_at(step * len(parts)),
        "train_s": time.perf_counter() - began,
    }


def at_sampling(parts: list[Minibatch], rollouts: Samples) -> AtSampling:
    """Both sides' numbers as the objective gets them, in the order of the samples.

    The samples get to keep the trainer's.
    """
    micros = [micro for part in parts for micro in part]
    scored = [micro.sampling_logprobs for micro in micros if micro.sampling_logprobs is not None]
    rollouts.fill(sampling_logprobs=np.concatenate([values.numpy(force=True) for values in scored]))
    sampled = rollouts.loss_mask
    return AtSampling(
        sampling_logprobs=rollouts.sampling_logprobs[sampled],
        engine_logprobs=np.concatenate([micro.engine_logprobs.numpy(force=True) for micro in micros])[
            sampled
        ],
        owners=rollouts.owners[sampled],
    )


def refuse_divergence(loss: float) -> None:
    """Stop at a loss that is no number.

    Raises:
        DivergenceError: for one.
    """
    if not np.isfinite(loss):
        raise DivergenceError(
            "objective",
            got=f"loss {loss}",
            expected="a finite number",
            hint="lower optimizer.lr; look at rollouts/",
        )


@torch.no_grad()
def score_under_sampling_weights(parts: list[Minibatch], policy: Policy, temperature: float) -> None:
    """Fill in ``sampling_logprobs`` before any optimizer step changes the weights (the old-logprob pass)."""
    for part in parts:
        for micro in part:
            micro.sampling_logprobs = policy.scores(micro.row, temperature).logprobs


def accumulate(
    part: Minibatch, policy: Policy, recipe: Recipe, tokens: Tokens, *, on_sampling_weights: bool
) -> float:
    """Forward and backward over a minibatch; gradients add up in the parameters. Returns the loss.

    Under ``torch.no_grad()`` forward alone. A non-finite loss is the caller's to refuse, after the gate, for
    numbers far off make one.

    Args:
        on_sampling_weights: True when no optimizer step has happened since the rollouts: this forward pass is
            then its own old-logprob pass.
    """
    total = 0.0
    for micro in part:
        scores = policy.scores(micro.row, recipe.sampling.temperature, with_entropy=True)
        now = scores.logprobs.detach()
        if on_sampling_weights:
            micro.sampling_logprobs = now
        inputs = loss_inputs(micro, scores.logprobs, recipe.objective)
        outputs = loss_of(recipe.objective)(inputs)
        if torch.is_grad_enabled():
            outputs.loss.backward()
        total += float(outputs.loss.detach())
        assert scores.entropy is not None
        tokens.add(micro.loss_mask, now - inputs.old_logprobs, outputs.clipped, scores.entropy)
    return total


def loss_inputs(micro: Microbatch, logprobs: Tensor, objective: Objective) -> LossInputs:
    """What the objective is given of a microbatch, once its sampling log-probabilities are known.

    Args:
        logprobs: under the weights now, differentiable; float32 [T], nats.
    """
    assert micro.sampling_logprobs is not None
    # Where the model sampled nothing the engine has no number: a NaN there would outlive its weight of 0.
    engine = torch.where(micro.loss_mask, micro.engine_logprobs, micro.sampling_logprobs)
    # The engine's own numbers as old log-probabilities are a certificate's dividend (layer 5).
    old = engine if objective.old_logprobs == "engine" else micro.sampling_logprobs
    corrections = torch.ones_like(micro.token_weights)
    if objective.correction == "tis":
        corrections = truncated_importance_weights(micro.sampling_logprobs, engine, objective.correction_cap)
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        engine_logprobs=engine,
        sampling_logprobs=micro.sampling_logprobs,
        advantages=micro.advantages,
        token_weights=micro.token_weights,
        corrections=corrections,
        loss_mask=micro.loss_mask,
        sequence_ids=micro.sequence_ids,
    )
