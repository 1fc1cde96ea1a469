"""TRL's own losses: ``GRPOTrainer._compute_loss`` and online DPO's ``training_step``, with a model's place
taken by given log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl.experimental.online_dpo.online_dpo_trainer import OnlineDPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

from tests.peers.tensors import GROUP, LENGTHS, LONGEST, Found, Tensors


def one_process() -> SimpleNamespace:
    """An accelerator of one process."""
    same = lambda value, **_: value  # noqa: E731
    return SimpleNamespace(
        num_processes=1,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
        sync_gradients=True,
        backward=lambda loss: None,
    )


def grpo_loss(tensors: Tensors, **settings: Any) -> Found:
    """``GRPOTrainer._compute_loss``.

    Args:
        settings: the trainer's own attributes, over those of its defaults.
    """
    now = tensors.now.clone().requires_grad_()
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    args = SimpleNamespace(delta=settings.pop("delta", None), use_bias_correction_kl=False)
    args.steps_per_generation = 1
    importance = settings.pop("importance_sampling_ratio", None)
    attributes = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": importance is not None,
        "vllm_importance_sampling_correction": importance is not None,
        "loss_type": "dapo",
        "max_completion_length": LONGEST,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "args": args,
        "accelerator": one_process(),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "model": SimpleNamespace(training=True),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (now, torch.zeros_like(now), None),
    }
    trainer.__dict__.update(attributes | settings)
    ids = torch.ones(len(LENGTHS), LONGEST, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": tensors.there.double(),
        "tool_mask": tensors.mask,
        "advantages": tensors.advantages[:, 0],
        "old_per_token_logps": tensors.old,
        "ref_per_token_logps": tensors.reference,
        "num_items_in_batch": tensors.mask.sum(),
        "importance_sampling_ratio": importance,
    }
    return Found.of(trainer._compute_loss(None, inputs), now, tensors)


def grpo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Its lines 2765 to 2787 of 1.16, which stand in the middle of generation."""
    grouped = rewards.reshape(-1, GROUP)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-4)).reshape(-1)


def online_dpo_loss(tensors: Tensors, rewards: torch.Tensor, loss_type: str, beta: float) -> Found:
    """``OnlineDPOTrainer.training_step`` on half of the completions against the other half."""
    now = tensors.now.clone().requires_grad_()
    half = len(LENGTHS) // 2
    kept: list[torch.Tensor] = []
    accelerator = one_process()
    accelerator.backward = lambda loss, **_: kept.append(loss)
    policy, reference = object(), object()
    ids = torch.ones(len(LENGTHS), LONGEST, dtype=torch.long)
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=loss_type,
            torch_empty_cache_steps=None,
            optim="adamw_torch",
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        beta=beta,
        eos_token_ids=[0],
        ref_model=reference,
        reward_funcs=[None],
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: ["" for _ in ids]),
        stats=defaultdict(list),
        accelerator=accelerator,
        state=SimpleNamespace(global_step=1),
        _generate=lambda *_: (ids[:, :1], ids[:, :1], ids, tensors.there.long(), None),
        _forward=lambda model, *_: tensors.reference if model is reference else now,
        _calculate_rewards_from_functions=lambda **_: rewards,
    )
    model = SimpleNamespace(train=lambda: None)
    policy = model
    OnlineDPOTrainer.training_step(trainer, policy, {"prompt": ["p"] * half})
    return Found.of(kept[0], now, tensors)
