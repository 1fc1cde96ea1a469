"""Figures that rollouts alone give."""

import numpy as np

from lockstep.records.samples import Samples


def rollout_figures(rollouts: Samples, version: int) -> dict[str, float]:
    """What can be said of rollouts before the weights ``version`` are trained on them, by catalog name."""
    lengths = rollouts.lengths
    rewards = rollouts.rewards.reshape(-1, rollouts.group_size)
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "flat_group_fraction": float((rewards.std(axis=1) == 0.0).mean()),
        "completion_tokens_mean": float(lengths.mean()),
        "truncated_fraction": float(np.mean([sample.finish_reason == "length" for sample in rollouts])),
        "n_tokens": float(lengths.sum()),
        "n_samples": float(len(lengths)),
        "missing_logprobs": float(rollouts.missing + rollouts.left_out),
        "lag_steps": float((version - rollouts.versions).mean()),
        "sample_s": rollouts.sample_s,
        "reward_s": rollouts.reward_s,
    }
