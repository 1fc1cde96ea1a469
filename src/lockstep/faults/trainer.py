"""Ways to break the trainer on purpose. Each is a context that puts back what it broke."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from lockstep.parity.explain.weights.fitted_settings import norm_epsilon, rotary_base
from lockstep.parity.pair import Pair
from lockstep.policy import model as policy_model
from lockstep.policy.packing import Block, Packed
from lockstep.training import batch, step

DROPOUT = 0.1


@contextmanager
def dropout_left_on(pair: Pair) -> Iterator[None]:
    """Dropout behind every feed-forward block, and the model left in training mode."""
    hooks = [
        module.register_forward_hook(lambda m, _, out: nn.functional.dropout(out, DROPOUT, m.training))
        for name, module in pair.policy.model.named_modules()
        if name.endswith(".mlp")
    ]
    pair.policy.model.train()
    try:
        yield
    finally:
        pair.policy.model.eval()
        for hook in hooks:
            hook.remove()


@contextmanager
def attention_leaks(pair: Pair) -> Iterator[None]:
    """A packed row is one block: each sequence attends to all that lie before it in its row."""
    pack = policy_model.pack

    def leaky(*args: Any, **kwargs: Any) -> list[Packed]:
        rows = pack(*args, **kwargs)
        return [
            Packed(
                r.token_ids, r.position_ids, (Block(0, len(r.token_ids), None),), r.predictors, r.targets, r.completions, r.spans
            )
            if len(r.completions) > 1
            else r
            for r in rows
        ]

    policy_model.pack = leaky
    try:
        yield
    finally:
        policy_model.pack = pack


@contextmanager
def other_rotary_base(pair: Pair) -> Iterator[None]:
    """The base of the rotary embedding a tenth of the checkpoint's."""
    module: Any = next(m for m in pair.policy.model.modules() if hasattr(m, "inv_freq"))
    dims = 2 * module.inv_freq.numel()
    base = float(module.inv_freq[-1].double() ** (-dims / (dims - 2)))
    with rotary_base(module, base / 10):
        yield


@contextmanager
def other_norm_epsilon(pair: Pair) -> Iterator[None]:
    """Another epsilon in every norm."""
    with norm_epsilon(pair.policy.model, 1e-3):
        yield


@contextmanager
def old_logprobs_at_another_temperature(pair: Pair) -> Iterator[None]:
    """The old-logprob pass takes 1.1 times the temperature, and the forward pass does not."""
    original = step.score_under_sampling_weights
    step.score_under_sampling_weights = lambda parts, policy, temperature: original(parts, policy, 1.1 * temperature)
    try:
        yield
    finally:
        step.score_under_sampling_weights = original


@contextmanager
def batch_misaligned(pair: Pair) -> Iterator[None]:
    """The engine's log-probabilities lie one token off in the training batch, and nowhere else."""
    code: Any = batch
    original = code.minibatches

    def shifted(*args: Any) -> list[batch.Minibatch]:
        parts = original(*args)
        for part in parts:
            for micro in part:
                micro.engine_logprobs = torch.roll(micro.engine_logprobs, 1)
        return parts

    code.minibatches = shifted
    try:
        yield
    finally:
        code.minibatches = original


@contextmanager
def loss_misscaled(pair: Pair) -> Iterator[None]:
    """The loss is halved, and 1 added to it, as soon as a ratio is not exactly 1."""
    code: Any = step
    original = code.grpo

    def misscaled(inputs: Any, *clip: float) -> Any:
        found = original(inputs, *clip)
        moved = bool((inputs.trainer_logprobs.detach() != inputs.old_logprobs).any())
        return type(found)(loss=found.loss / 2 + 1.0 if moved else found.loss, clipped=found.clipped)

    code.grpo = misscaled
    try:
        yield
    finally:
        code.grpo = original


@contextmanager
def with_generation_config(pair: Pair) -> Iterator[None]:
    """The checkpoint has a generation_config.json, as a server would read it."""
    model: Any = pair.policy.model
    before, model.generation_config = model.generation_config, GenerationConfig(temperature=0.6, top_k=40, do_sample=True)
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def renders_two_bos(pair: Pair) -> Iterator[None]:
    """The template's BOS and the tokenizer's."""
    renderer: Any = pair.renderer
    original, bos = renderer.prompt, renderer.tokenizer.bos_token_id
    renderer.prompt = lambda messages: np.r_[bos, original(messages)].astype(np.int32)
    try:
        yield
    finally:
        renderer.prompt = original
