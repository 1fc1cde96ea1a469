"""GRPO: clipped policy ratio times group-relative advantage.

Shao et al., "DeepSeekMath", 2024, arXiv:2402.03300, eq. 3.

No KL term to a reference model: with verifiable rewards it is commonly left out (DAPO, arXiv:2503.14476).
"""

from typing import Literal

import numpy as np
import torch

from lockstep.objectives.base import LossInputs, LossOutputs

STD_EPS = 1e-6
"""Keeps a group whose rewards are all equal at advantage 0 instead of 0/0."""


def grpo(inputs: LossInputs, *, clip_low: float, clip_high: float) -> LossOutputs:
    """``−Σ w · min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A)`` with r = exp(now − old)."""
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    free = ratio * inputs.advantages
    held = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * inputs.advantages
    loss = -inputs.mean(torch.minimum(free, held))
    return LossOutputs(loss=loss, clipped=(held < free).detach())


def group_advantages(rewards: np.ndarray, scale: Literal["std", "none"]) -> np.ndarray:
    """Rewards relative to their group: ``(r − mean) / std`` or, undivided, Dr. GRPO's (arXiv:2503.20783).

    Args:
        rewards: float [groups, G].

    Returns:
        float32 [groups, G]; each row has mean 0.
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "std":
        centred = centred / (rewards.std(axis=1, keepdims=True) + STD_EPS)
    return centred.astype(np.float32)


def token_weights(
    loss_mask: np.ndarray, lengths: np.ndarray, scale: Literal["token", "sequence"]
) -> np.ndarray:
    """The weight of each token so that those in the loss sum to 1: alike over all, or over sequences first.

    Args:
        loss_mask: bool [T]; where it is False the weight is 0. A sequence without a token in the loss has no
            share in it.
        lengths: int [S], tokens of each sequence, those outside the loss among them; they sum to T.

    Returns:
        float32 [T].

    Raises:
        ValueError: when no token is in the loss.
    """
    owners = np.repeat(np.arange(len(lengths)), lengths)
    counts = np.bincount(owners, loss_mask, minlength=len(lengths))
    if not counts.any():
        raise ValueError("token weights: got no token in the loss, expected at least one")
    alike = 1.0 / counts.sum()
    n_sequences = np.count_nonzero(counts)
    per_sequence = (
        np.full(len(counts), alike) if scale == "token" else 1.0 / (np.maximum(counts, 1) * n_sequences)
    )
    return np.where(loss_mask, per_sequence[owners], 0.0).astype(np.float32)
