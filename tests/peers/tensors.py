"""One set of tensors for everybody: padded [B, L] as the peers take them, flat as Lockstep does; float64.

Six completions in two groups, one to seven tokens long, two tokens of one of them put there by a tool. Ratios
from .3 to 5, so that both sides of every clip are reached with advantages of either sign.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lockstep.config.objective import Objective
from lockstep.objectives.aggregation import token_weights
from lockstep.objectives.base import LossInputs
from lockstep.objectives.corrections.registry import correction_of
from lockstep.objectives.registry import loss_of
from lockstep.objectives.regularisers import regulariser

LENGTHS = (7, 1, 4, 5, 6, 2)
LONGEST = 7
GROUP = 3
TOOL = (4, 2), (4, 3)
"""Tokens that the model did not sample: (completion, place)."""


@dataclass(frozen=True, eq=False)
class Tensors:
    """float64 [B, L] each unless said otherwise."""

    now: Tensor
    old: Tensor
    engine: Tensor
    reference: Tensor
    values: Tensor
    mask: Tensor
    """1 for the model's own tokens."""
    there: Tensor
    """bool: any token at all; the rest is padding."""
    rewards: Tensor
    """[B]."""
    advantages: Tensor

    @classmethod
    def made(cls, *, tool: bool) -> "Tensors":
        """The tensors; with or without what a tool put there, for peers that have no mask for it."""
        generator = torch.Generator().manual_seed(11)
        shape = len(LENGTHS), LONGEST

        def drawn(low: float, high: float, size: tuple[int, ...] = shape) -> Tensor:
            return low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)

        old = drawn(-3.5, -0.05)
        there = torch.arange(LONGEST)[None, :] < torch.tensor(LENGTHS)[:, None]
        mask = there.double()
        for at in TOOL if tool else ():
            mask[at] = 0.0
        rewards = torch.tensor([1.0, 0.0, 0.3, 0.0, 2.0, 0.5], dtype=torch.float64)
        centred = rewards - rewards.reshape(-1, GROUP).mean(1).repeat_interleave(GROUP)
        return cls(
            now=(old + drawn(-1.2, 1.6)).clamp(max=-1e-3),
            old=old,
            engine=old + drawn(-0.9, 0.9),
            reference=old + drawn(-0.8, 0.8),
            values=drawn(-1.0, 1.0),
            mask=mask,
            there=there,
            rewards=rewards,
            advantages=centred[:, None].expand(shape).clone(),
        )

    def flat(self, padded: Tensor) -> Tensor:
        """[B, L] without its padding, [T]."""
        return padded[self.there]

    @property
    def owners(self) -> Tensor:
        """int64 [T]."""
        return torch.arange(len(LENGTHS))[:, None].expand(-1, LONGEST)[self.there]


@dataclass(frozen=True, eq=False)
class Found:
    """A loss and its gradient at each of the model's tokens, [B, L], 0 elsewhere."""

    loss: float
    gradient: Tensor

    @classmethod
    def of(cls, loss: Tensor, now: Tensor, tensors: Tensors) -> "Found":
        """From a loss over ``now``, [B, L]."""
        (gradient,) = torch.autograd.grad(loss, now)
        return cls(float(loss.detach()), gradient * tensors.mask)

    def apart(self, other: "Found") -> float:
        """The largest difference, of loss and gradient."""
        return max(abs(self.loss - other.loss), float((self.gradient - other.gradient).abs().max()))


def correction_weights(tensors: Tensors, objective: Objective) -> Tensor:
    """What a recipe's correction makes of each token, [T]."""
    correct = correction_of(objective)
    assert correct is not None
    return correct(inputs_of(tensors, objective, tensors.now)).weights


def inputs_of(tensors: Tensors, objective: Objective, now: Tensor, **others: Tensor) -> LossInputs:
    """The tensors as an objective is given them."""
    mask = tensors.flat(tensors.mask).bool()
    flat = tensors.flat
    own = flat(now)
    weights = token_weights(mask.numpy(), np.array(LENGTHS), objective.aggregation, LONGEST)
    where = lambda values: torch.where(mask, flat(values), own.detach())  # noqa: E731
    return LossInputs(
        logprobs=own,
        old_logprobs=where(tensors.old),
        engine_logprobs=where(tensors.engine),
        sampling_logprobs=where(tensors.old),
        step_logprobs=where(tensors.old),
        advantages=flat(tensors.advantages) * mask,
        token_weights=torch.from_numpy(weights).double(),
        corrections=torch.ones_like(own),
        loss_mask=mask,
        sequence_ids=tensors.owners,
        reference_logprobs=where(tensors.reference),
        **others,
    )


def ours(tensors: Tensors, objective: Objective, **others: Tensor) -> Found:
    """What Lockstep's own code makes of the tensors under a recipe's objective.

    Args:
        others: further fields of the inputs, flat or not per token.
    """
    now = tensors.now.clone().requires_grad_()
    inputs = inputs_of(tensors, objective, now, **others)
    correct = correction_of(objective)
    if correct is not None:
        inputs = replace(inputs, corrections=correct(inputs).weights)
    beside = regulariser(inputs, objective)
    loss = loss_of(objective)(inputs).loss
    return Found.of(loss if beside is None else loss + beside, now, tensors)
