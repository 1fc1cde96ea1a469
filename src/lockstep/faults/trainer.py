"""Ways to break the trainer on purpose. Each is a context that puts back what it broke.

Where code is replaced, it is under the name by which layer 5's rehearsal looks it up.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from lockstep.parity.pair import Pair
from lockstep.policy.variant_settings import DropoutLeftOn, Generating, NormEpsilon, OneBlockRows, RotaryBase
from lockstep.training import batch, beside, step

DROPOUT = 0.1


def dropout_left_on(pair: Pair) -> AbstractContextManager[None]:
    """Dropout behind every feed-forward block, and the model left in training mode."""
    return pair.trainer.holding(DropoutLeftOn(DROPOUT))


def attention_leaks(pair: Pair) -> AbstractContextManager[None]:
    """A packed row is one block: each sequence attends to all that lie before it in its row."""
    return pair.trainer.holding(OneBlockRows())


def other_rotary_base(pair: Pair) -> AbstractContextManager[None]:
    """The base of the rotary embedding a tenth of the checkpoint's."""
    return pair.trainer.holding(RotaryBase(pair.trainer.rotary_base / 10))


def other_norm_epsilon(pair: Pair) -> AbstractContextManager[None]:
    """Another epsilon in every norm."""
    return pair.trainer.holding(NormEpsilon(1e-3))


@contextmanager
def old_logprobs_at_another_temperature(pair: Pair) -> Iterator[None]:
    """The old-logprob pass takes 1.1 times the temperature, and the forward pass does not."""
    code: Any = beside
    original = code.score_under_sampling_weights
    code.score_under_sampling_weights = lambda parts, policy, temperature, *others: original(
        parts, policy, 1.1 * temperature, *others
    )
    try:
        yield
    finally:
        code.score_under_sampling_weights = original


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
    original = code.loss_of

    def misscaled(objective: Any, inputs: Any) -> Any:
        outputs = original(objective)(inputs)
        moved = bool((inputs.logprobs.detach() != inputs.old_logprobs).any())
        return type(outputs)(loss=outputs.loss / 2 + 1.0 if moved else outputs.loss, clipped=outputs.clipped)

    code.loss_of = lambda objective: partial(misscaled, objective)
    try:
        yield
    finally:
        code.loss_of = original


def with_generation_config(pair: Pair) -> AbstractContextManager[None]:
    """The checkpoint has a generation_config.json, as a server would read it."""
    return pair.trainer.holding(Generating({"temperature": 0.6, "top_k": 40, "do_sample": True}))


@contextmanager
def renders_two_bos(pair: Pair) -> Iterator[None]:
    """The template's BOS and the tokenizer's."""
    renderer: Any = pair.renderer
    original = renderer.prompt
    bos = renderer.tokenizer.bos_token_id
    renderer.prompt = lambda messages: np.r_[bos, original(messages)].astype(np.int32)
    try:
        yield
    finally:
        renderer.prompt = original
