"""verl's own ``core_algos`` and ``rollout_corr_helper``."""

from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig

from tests.peers.tensors import GROUP, LENGTHS, Found, Tensors

INDEX = np.repeat(np.arange(len(LENGTHS) // GROUP), GROUP)


def policy_loss(tensors: Tensors, name: str, aggregation: str, **settings: Any) -> Found:
    """A registered policy loss.

    Args:
        settings: of its actor's configuration; ``weights``: rollout correction weights.
    """
    now = tensors.now.clone().requires_grad_()
    weights = settings.pop("weights", None)
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **settings)
    loss, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=tensors.old,
        log_prob=now,
        advantages=tensors.advantages,
        response_mask=tensors.mask,
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=weights,
    )
    return Found.of(loss, now, tensors)


def at_last(tensors: Tensors) -> torch.Tensor:
    """[B, L]: each completion's reward at its last own token."""
    found = torch.zeros_like(tensors.mask)
    for row, mask in enumerate(tensors.mask):
        found[row, int(mask.nonzero().max())] = tensors.rewards[row]
    return found


def advantages(tensors: Tensors, name: str) -> torch.Tensor:
    """A registered estimator's, [B, L]."""
    estimate = core_algos.get_adv_estimator_fn(name)
    return estimate(
        token_level_rewards=at_last(tensors),
        response_mask=tensors.mask,
        index=INDEX,
        config=OmegaConf.create({"gamma": 1.0}),
    )[0]


def gae(tensors: Tensors, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Whitened advantages and returns, [B, L]."""
    return core_algos.compute_gae_advantage_return(at_last(tensors), tensors.values, tensors.mask, gamma, lam)


def value_loss(tensors: Tensors, values: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """A scalar."""
    return core_algos.compute_value_loss(values, returns, tensors.values, tensors.mask, clip)[0]


def kl(tensors: Tensors, estimator: str) -> Found:
    """The mean over tokens."""
    now = tensors.now.clone().requires_grad_()
    estimate = core_algos.kl_penalty(now, tensors.reference, estimator)
    return Found.of((estimate * tensors.mask).sum() / tensors.mask.sum(), now, tensors)


def correction_weights(tensors: Tensors, level: str, threshold: Any) -> torch.Tensor:
    """[B, L]."""
    return rollout_corr_helper.compute_rollout_correction_weights(
        tensors.old - tensors.engine, tensors.mask, level, threshold
    )[0]


def rejection_mask(tensors: Tensors, option: str, threshold: str) -> torch.Tensor:
    """[B, L]."""
    return rollout_corr_helper.compute_rollout_rejection_mask(
        tensors.old - tensors.engine, tensors.mask, option, threshold
    )[0]
