"""Layer 1: tokens with their whole distributions, to which many settings are fitted without another pass."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lockstep.parity.explain.fitting import miss_of
from lockstep.records.samples import Group
from lockstep.training.trainer import Trainer

FITTED_TOKENS = 128
"""Whole distributions that are held at once for a fit."""
SCREENED_TOKENS = 24
"""What a hypothesis is fitted on, before it is proven on the others of those."""


class Held(NamedTuple):
    """Tokens out of every part of a sample, with their whole distributions."""

    logits: Tensor
    """float32 [N, V]."""
    ids: Tensor
    """What was drawn, int64 [N]."""
    engine: Tensor
    """What was reported for it, float32 [N]."""

    def screened(self) -> "Held":
        """A few of them, of every part."""
        at = spread(len(self.ids), SCREENED_TOKENS)
        return Held(self.logits[at], self.ids[at], self.engine[at])

    def left(self, z: Tensor) -> float:
        """How far the numbers are from those of processed logits: float32 [N, V] (``fitting.miss_of``)."""
        return miss_of(z.log_softmax(-1).gather(1, self.ids[:, None])[:, 0] - self.engine)


def spread(n: int, most: int) -> np.ndarray:
    """``most`` of ``n`` places, evenly: int [N]."""
    return np.unique(np.linspace(0, n - 1, most).astype(int))


def every_part(n_tokens: int) -> np.ndarray:
    """Which tokens are held for a fit, int [N]."""
    return spread(n_tokens, FITTED_TOKENS)


def tokens_of_every_part(
    trainer: Trainer,
    groups: Sequence[Group],
    engine: np.ndarray,
    at: np.ndarray | None = None,
    hidden: Sequence[Tensor] | None = None,
) -> Held:
    """Tokens of a sample with their distributions.

    Args:
        groups: one completion each.
        engine: what the engine reported, float32 [T].
        at: which tokens, int [N]; None for those of :func:`every_part`.
        hidden: the body's output for the groups, where it is known already.
    """
    at = every_part(len(engine)) if at is None else at
    ids = np.concatenate([group.completions[0] for group in groups])[at]
    hidden = trainer.hidden(groups) if hidden is None else hidden
    with torch.no_grad():
        logits = trainer.logits(torch.cat(list(hidden))[torch.from_numpy(at)])
    device = logits.device
    return Held(
        logits,
        torch.as_tensor(ids.astype(np.int64), device=device),
        torch.as_tensor(engine[at], device=device),
    )
