"""From rewards to advantages. Numpy, no gradient; each is of one step's samples.

    group                  (R − mean of the group) / its deviation      GRPO, arXiv:2402.03300
    leave_one_out          R − mean of the group's others               RLOO, arXiv:2402.14740
    batch                  R to go, then whitened over the batch        REINFORCE++, arXiv:2501.03262
    group_batch            R − mean of the group, then whitened         REINFORCE++-baseline
    gae                    with a value head's estimates                PPO, arXiv:1506.02438

Tokens that the model did not sample earn nothing, carry nothing and are skipped: what comes after them counts
for what comes before them as if they were not there (verl does so; SkyRL does not).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lockstep.config.objective import AdvantageScale

STD_EPS = 1e-6
"""Keeps a group whose rewards are all equal at advantage 0 instead of 0/0."""
WHITEN_EPS = 1e-8
"""What is added to the variance in whitening, as verl and TRL have it."""


@dataclass(frozen=True, eq=False)
class Rewards:
    """What a step's samples earned."""

    of_samples: np.ndarray
    """float [S]."""
    group_size: int
    """Samples of each group; they follow each other."""
    owners: np.ndarray
    """int [T], ascending: the sample of each token."""
    loss_mask: np.ndarray
    """bool [T]."""
    of_tokens: np.ndarray | None = None
    """float [T]: what a token earns beside its sample's reward, such as a penalty. None: nothing."""

    @property
    def totals(self) -> np.ndarray:
        """float64 [S]: each sample's reward with what its tokens earned."""
        if self.of_tokens is None:
            return self.of_samples
        earned = np.where(self.loss_mask, self.of_tokens, 0.0)
        return self.of_samples + np.bincount(self.owners, earned, minlength=len(self.of_samples))

    def at_tokens(self) -> np.ndarray:
        """float64 [T]: what each token earns; a sample's reward is earned by its last sampled token."""
        earned = np.zeros(len(self.owners))
        if self.of_tokens is not None:
            earned = np.where(self.loss_mask, self.of_tokens, 0.0).astype(np.float64)
        sampled = np.flatnonzero(self.loss_mask)
        last = np.r_[np.flatnonzero(np.diff(self.owners[sampled])), len(sampled) - 1]
        earned[sampled[last]] += self.of_samples[self.owners[sampled[last]]]
        return earned


def group_relative(rewards: Rewards, scale: AdvantageScale) -> np.ndarray:
    """``(R − mean) / std`` of the group; by the batch's deviation; or, undivided, Dr. GRPO's.

    arXiv:2503.20783. The deviation is of the group as it is (TRL, verl and PipelineRL divide by n − 1 in it).
    """
    grouped = rewards.totals.reshape(-1, rewards.group_size)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    if scale == "std":
        centred = centred / (grouped.std(axis=1, keepdims=True) + STD_EPS)
    elif scale == "batch":
        centred = centred / (grouped.std() + STD_EPS)
    return centred.reshape(-1).astype(np.float32)[rewards.owners]


def leave_one_out(rewards: Rewards, scale: AdvantageScale) -> np.ndarray:
    """R less the mean reward of the group's others, which is n / (n − 1) · (R − mean)."""
    n = rewards.group_size
    grouped = rewards.totals.reshape(-1, n)
    others = (grouped.sum(axis=1, keepdims=True) - grouped) / (n - 1)
    return _scaled((grouped - others).reshape(-1), scale)[rewards.owners]


def batch_whitened(rewards: Rewards, scale: AdvantageScale) -> np.ndarray:
    """What is still to be earned, whitened over the batch's sampled tokens."""
    return whitened(_to_go(rewards), rewards.loss_mask)


def group_batch_whitened(rewards: Rewards, scale: AdvantageScale) -> np.ndarray:
    """R less the group's mean, whitened over the batch's sampled tokens: long answers weigh more in it."""
    centred = group_relative(rewards, "none")
    return whitened(centred, rewards.loss_mask)


ESTIMATORS: dict[str, Callable[[Rewards, AdvantageScale], np.ndarray]] = {
    "group": group_relative,
    "leave_one_out": leave_one_out,
    "batch": batch_whitened,
    "group_batch": group_batch_whitened,
}
"""Name → float32 [T]. ``gae`` needs values, and is :func:`gae`."""


@dataclass(frozen=True, eq=False)
class Gae:
    """What generalised advantage estimation gives."""

    advantages: np.ndarray
    """float32 [T], not whitened; 0 where the model did not sample."""
    returns: np.ndarray
    """float32 [T]: advantage plus value, what the value head is to learn."""


def gae(rewards: Rewards, values: np.ndarray, gamma: float, lam: float) -> Gae:
    """``A_t = δ_t + γλ A_t+1``, ``δ_t = r_t + γ V_t+1 − V_t`` over each sample's own tokens.

    Args:
        values: float [T], of the state in which each token was drawn.
    """
    sampled = np.flatnonzero(rewards.loss_mask)
    rows = rewards.owners[sampled]
    columns = np.arange(len(sampled)) - np.searchsorted(rows, rows)  # how many of its sample come before it
    n_rows = len(rewards.of_samples)
    n_columns = int(columns.max()) + 1
    # A column more than any sample has: behind its last token a sample is worth 0.
    earned, value, inside = (np.zeros((n_rows, n_columns + 1)) for _ in range(3))
    earned[rows, columns] = rewards.at_tokens()[sampled]
    value[rows, columns] = values[sampled]
    inside[rows, columns] = 1.0
    found = np.zeros((n_rows, n_columns + 1))
    for t in reversed(range(n_columns)):
        delta = earned[:, t] + gamma * value[:, t + 1] - value[:, t]
        found[:, t] = inside[:, t] * (delta + gamma * lam * found[:, t + 1])
    advantages = np.zeros(len(rewards.owners))
    advantages[sampled] = found[rows, columns]
    returns = np.where(rewards.loss_mask, advantages + values, 0.0)
    return Gae(advantages.astype(np.float32), returns.astype(np.float32))


def whitened(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 (by n − 1) over the masked; 0 elsewhere; float32 [T]."""
    inside = values[mask].astype(np.float64)
    spread = inside.var(ddof=1) if inside.size > 1 else 0.0
    return np.where(mask, (values - inside.mean()) / np.sqrt(spread + WHITEN_EPS), 0.0).astype(np.float32)


def _to_go(rewards: Rewards) -> np.ndarray:
    """float64 [T]: what each token and those after it in its sample earn."""
    earned = rewards.at_tokens()
    totals = np.bincount(rewards.owners, earned, minlength=len(rewards.of_samples))
    before = np.cumsum(earned) - earned
    first = np.searchsorted(rewards.owners, np.arange(len(totals)))
    return totals[rewards.owners] - (before - before[first][rewards.owners])


def _scaled(values: np.ndarray, scale: AdvantageScale) -> np.ndarray:
    return (values / (values.std() + STD_EPS) if scale == "batch" else values).astype(np.float32)
