"""Figures that rollouts alone give."""

from dataclasses import replace

import numpy as np

from lockstep.metrics.reduce import quantiles_abs
from lockstep.records.samples import Samples


def rollout_figures(rollouts: Samples, version: int) -> dict[str, float]:
    """What can be said of rollouts before the weights ``version`` are trained on them, by catalog name."""
    n_samples = len(rollouts)
    n_tokens = float(rollouts.loss_mask.sum() + rollouts.left_out)
    rewards = rollouts.rewards.reshape(-1, rollouts.group_size)
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "flat_group_fraction": float((rewards.std(axis=1) == 0.0).mean()),
        "completion_tokens_mean": n_tokens / n_samples,
        "truncated_fraction": float(np.mean([sample.finish_reason == "length" for sample in rollouts])),
        "n_tokens": n_tokens,
        "n_samples": float(n_samples),
        "missing_logprobs": float(rollouts.missing + rollouts.left_out),
        "lag_steps": float((version - rollouts.versions).mean()),
        "sample_s": rollouts.sample_s,
        "reward_s": rollouts.reward_s,
    } | rollouts.figures


def lag_0_figures(rollouts: Samples, version: int) -> dict[str, float]:
    """A standing canary: of completions that ``version``, the one trained, drew whole; by catalog name.

    Nothing is stale there and nothing was scored under other weights: what is off is the backend's. Without
    such a completion there are no gaps.
    """
    fresh = [sample for sample in rollouts if [span.version for span in sample.version_spans] == [version]]
    share = {"lag_0_fraction": len(fresh) / len(rollouts)}
    slice_ = replace(rollouts, samples=fresh)
    gap = (slice_.sampling_logprobs - slice_.engine_logprobs)[slice_.loss_mask]
    if not gap.size:
        return share
    found = quantiles_abs(gap)
    return share | {"lag_0_gap_abs_p50_nats": found["p50"], "lag_0_gap_abs_max_nats": found["max"]}
