"""Online DPO: of two completions of a prompt, the one with the better reward is preferred.

Rafailov et al., "Direct Preference Optimization", 2023, arXiv:2305.18290, eq. 7; Azar et al. (IPO), 2023,
arXiv:2310.12036, eq. 17; online: Guo et al., 2024, arXiv:2402.04792. Log-probabilities are sums over a
completion, at the temperature that it was drawn at, on both sides.

A tie says nothing of what is better and is no pair. TRL's online DPO takes the first of two equal ones as
chosen, and so learns from chance.
"""

from typing import Literal

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from lockstep.objectives.base import LossInputs, LossOutputs


def dpo(inputs: LossInputs, *, beta: float, kind: Literal["sigmoid", "ipo"]) -> LossOutputs:
    """``−log σ(β·h)`` or, IPO, ``(h − 1/2β)²``, mean over the minibatch's pairs.

    h = (now − reference) of the chosen − (now − reference) of the rejected.
    """
    assert inputs.reference_logprobs is not None
    assert inputs.pairs is not None
    moved = inputs.of_each_sequence(inputs.logprobs - inputs.reference_logprobs)
    chosen, rejected = moved[inputs.places_of(inputs.pairs)].unbind(1)
    h = chosen - rejected
    losses = -logsigmoid(beta * h) if kind == "sigmoid" else (h - 1 / (2 * beta)).square()
    paired = torch.isin(inputs.sequence_ids, inputs.pairs)
    return LossOutputs(
        # A sample in no pair teaches nothing, as a token does that is clipped.
        loss=inputs.pair_weight * losses.sum(),
        clipped=~paired & inputs.loss_mask,
        margins=h.detach(),
    )


def pairs_of(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """Which samples are held against which: the best of a group with its worst, the second with the last but
    one, and so on, as long as their rewards differ.

    Args:
        rewards: float [S], groups one after the other.

    Returns:
        int64 [P, 2]: chosen and rejected sample of each pair; a sample is in one at most.
    """
    found = []
    for first in range(0, len(rewards), group_size):
        # Stable: of equal rewards the earlier sample comes first, in every run alike.
        order = first + np.argsort(-rewards[first : first + group_size], kind="stable")
        pairs = np.stack([order[: group_size // 2], order[::-1][: group_size // 2]], axis=1)
        found.append(pairs[rewards[pairs[:, 0]] > rewards[pairs[:, 1]]])
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)
