"""One training step: every minibatch once, in order, and the figures of what happened."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lockstep.cluster.ranks import ONE, Ranks
from lockstep.config.recipe import Objective, Recipe
from lockstep.errors import DivergenceError
from lockstep.metrics.reduce import mismatch_figures
from lockstep.objectives.base import LossInputs
from lockstep.objectives.corrections.registry import correction_of
from lockstep.objectives.registry import loss_of
from lockstep.objectives.regularisers import regulariser
from lockstep.policy.logprobs import TokenScores
from lockstep.policy.model import Policy
from lockstep.policy.packing import Packed
from lockstep.policy.values import ValueHead
from lockstep.records.samples import Samples
from lockstep.training.batch import Microbatch, Minibatch, minibatches
from lockstep.training.beside import Beside, prepare
from lockstep.training.optimizer import MasterAdamW
from lockstep.training.tokens import StepTokens
from lockstep.training.versions import Before


@dataclass(frozen=True, eq=False)
class AtSampling:
    """Every audited token of a step that the model sampled, as both sides score it.

    Under the weights that drew it; float32 [N], nats.
    """

    sampling_logprobs: np.ndarray
    """The trainer's scores."""
    engine_logprobs: np.ndarray
    owners: np.ndarray
    """int [N]: the sample each token belongs to."""


ALONE = Beside()
Admission = Callable[[AtSampling], None]
"""Raises where a step must not be trained on. Called once a step, before its first optimizer update."""


def train(
    rollouts: Samples,
    policy: Policy,
    optimizer: MasterAdamW,
    recipe: Recipe,
    step: int,
    gate: Admission,
    beside: Beside = ALONE,
    before: Before | None = None,
    ranks: Ranks = ONE,
) -> dict[str, float]:
    """Train on one step's rollouts: the only way to an optimizer update. Returns figures by catalog name.

    ::

        prepare: old-logprob pass over minibatches 2 … n ─► forward and backward of minibatch 1
            ─► gate(all tokens) ─► update 1 ─► …

    The first minibatch's own forward pass is on the step's first weights, so only the others need a pass for
    the gate; of some objectives all do (``beside.py``). Tokens that earlier weights drew were scored
    ``before``; None: the weights of now drew every token.

    Raises:
        DivergenceError: for a non-finite loss or gradient.
        Exception: the gate's, before any weight has changed; no gradient is left behind.
    """
    began = time.perf_counter()
    parts = minibatches(rollouts, policy, recipe, before)
    prepare(parts, rollouts, policy, beside, recipe)
    tokens = StepTokens()
    first, *rest = parts
    own = {"policy": policy, "recipe": recipe, "tokens": tokens, "value_head": beside.value_head}
    learn = partial(accumulate, **own, ranks=ranks)
    losses = [learn(first, on_sampling_weights=True)]
    sampled = at_sampling(parts, rollouts)
    try:
        gate(sampled)
        refuse_divergence(losses[0])
    except BaseException:
        optimizer.forget_gradients()
        raise
    # Numbered by the step, never counted up: a run that goes on finds its place in the schedule.
    norms = [optimizer.step(step * len(parts))]
    for number, part in enumerate(rest, 1):
        losses.append(learn(part, on_sampling_weights=False))
        refuse_divergence(losses[-1])
        norms.append(optimizer.step(step * len(parts) + number))
    clip = recipe.objective.clip_low, recipe.objective.clip_high
    return {
        **mismatch_figures(sampled.sampling_logprobs - sampled.engine_logprobs, *clip),
        **tokens.figures(recipe.objective),
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
    audited = np.concatenate([micro.audited.numpy(force=True) for micro in micros])
    sampled = rollouts.loss_mask & audited
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


def accumulate(
    part: Minibatch,
    policy: Policy,
    recipe: Recipe,
    tokens: StepTokens,
    *,
    on_sampling_weights: bool,
    value_head: ValueHead | None = None,
    ranks: Ranks = ONE,
) -> float:
    """Forward and backward over a minibatch; gradients add up in the parameters. Returns the loss.

    Under ``torch.no_grad()`` forward alone. A non-finite loss is the caller's to refuse, after the gate, for
    numbers far off make one.

    Args:
        on_sampling_weights: True before the step's first optimizer update: this forward pass is then its own
            old-logprob pass, of the tokens that no earlier weights drew.
        ranks: share the microbatches out; each gets every number, and sends its own ones' gradient back.
    """
    total = 0.0
    objective = recipe.objective
    temperature = recipe.sampling.temperature
    correct = correction_of(objective)
    for turn in ranks.turns(part):
        own = _numbers(policy, ranks.own(turn).row, temperature, value_head)
        losses = []
        for micro, (logprobs, entropy, *values) in zip(turn, ranks.shared(turn, own), strict=True):
            if on_sampling_weights:
                micro.scored(logprobs.detach())
            inputs = loss_inputs(micro, TokenScores(logprobs, entropy), objective, *values)
            correction = correct(inputs) if correct is not None else None
            if correction is not None:
                inputs = replace(inputs, corrections=correction.weights)
            outputs = loss_of(objective)(inputs)
            beside = regulariser(inputs, objective)
            losses.append(outputs.loss if beside is None else outputs.loss + beside)
            total += float(losses[-1].detach())
            tokens.add(inputs, outputs, correction)
        if torch.is_grad_enabled():
            ranks.owed(losses, own).backward()
    if value_head is not None and torch.is_grad_enabled():
        ranks.add_up([parameter.grad for parameter in value_head.parameters()])
    return total


def _numbers(
    policy: Policy, row: Packed, temperature: float, value_head: ValueHead | None
) -> tuple[Tensor, ...]:
    """What the model says of a row's targets, differentiable, float32 [T] each.

    Log-probability and entropy; where there is a value head the value too.
    """
    hidden = policy.hidden(row)
    scores = policy.project(hidden, row.targets, temperature, with_entropy=True)
    assert scores.entropy is not None
    values = () if value_head is None else (value_head(hidden),)
    return scores.logprobs, scores.entropy, *values


def loss_inputs(
    micro: Microbatch, scores: TokenScores, objective: Objective, values: Tensor | None = None
) -> LossInputs:
    """What the objective is given of a microbatch, once its sampling log-probabilities are known.

    Args:
        scores: under the weights now, differentiable; float32 [T], nats.
        values: the value head's.
    """
    assert micro.sampling_logprobs is not None
    assert micro.step_logprobs is not None
    # Where the model sampled nothing the engine has no number: a NaN there would outlive its weight of 0.
    engine = torch.where(micro.loss_mask, micro.engine_logprobs, micro.sampling_logprobs)
    return LossInputs(
        logprobs=scores.logprobs,
        # The engine's own numbers as old log-probabilities are a certificate's dividend (layer 5).
        old_logprobs=engine if objective.old_logprobs == "engine" else micro.sampling_logprobs,
        engine_logprobs=engine,
        sampling_logprobs=micro.sampling_logprobs,
        step_logprobs=micro.step_logprobs,
        advantages=micro.advantages,
        token_weights=micro.token_weights,
        corrections=torch.ones_like(micro.token_weights),
        loss_mask=micro.loss_mask,
        sequence_ids=micro.sequence_ids,
        entropy=scores.entropy,
        reference_logprobs=micro.reference_logprobs,
        values=values,
        old_values=micro.old_values,
        returns=micro.returns,
        pairs=micro.pairs,
        pair_weight=micro.pair_weight,
    )
