"""The trainer's model: hidden states from transformers, log-probabilities from ``logprobs.py`` alone."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from lockstep.errors import ModelError, UsageError
from lockstep.policy import attention
from lockstep.policy.logprobs import TokenScores, token_logprobs
from lockstep.policy.packing import Packed, pack
from lockstep.policy.parameters import whole
from lockstep.records.samples import Group

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EAGER = "eager"
"""Where packed attention does not fit: transformers' definition, whose faster paths leave out soft caps."""
SELF_TEST_ATOL = 1e-3
"""Logits through our path against the model's own forward, relative to the largest logit: far above fp32
rounding over a few dozen layers (1e-5), far below the effect of a forgotten scale, cap or mask (1e-1)."""
SELF_TEST_COARSE = 20.0
"""Times that in bf16: 2 % of the largest logit, five unit roundoffs; what is forgotten brings 10 %."""


@dataclass(eq=False)
class Policy:
    """A causal language model that scores packed rows.

    ``share_prompts`` is False where the model cannot take our attention; each sequence is then computed on
    its own.
    """

    model: PreTrainedModel
    head: Tensor
    head_bias: Tensor | None
    head_dtype: torch.dtype
    softcap: float | None
    share_prompts: bool
    reason: str
    """Why ``share_prompts`` is what it is; shown in the manifest."""
    placed: str = "where it was made"
    """Why it is on its device; shown in the manifest."""
    alone: bool = False
    """One sequence a row: what a suspected leak between packed sequences is judged against."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        """The body's dtype."""
        return self.model.dtype

    def hidden(self, row: Packed) -> Float[Tensor, "T D"]:
        """The hidden states that predict ``row.targets``, after the final norm."""
        # transformers hands what it does not know down to every attention layer.
        kwargs = {"blocks": row.blocks} if self.share_prompts else {}
        output = self.model.base_model(
            input_ids=row.token_ids[None], position_ids=row.position_ids[None], use_cache=False, **kwargs
        )
        return output.last_hidden_state[0][row.predictors]

    def scores(self, row: Packed, temperature: float, *, with_entropy: bool = False) -> TokenScores:
        """Log-probability of every target at ``temperature``, differentiable; nats, fp32 [T]."""
        return self.project(self.hidden(row), row.targets, temperature, with_entropy=with_entropy)

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Whole distributions, fp32, for the few tokens that a hypothesis needs; training never does."""
        z = hidden.to(self.head_dtype) @ whole(self.head).to(self.head_dtype).T
        z = z.float() if self.head_bias is None else z.float() + self.head_bias
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def rows(self, groups: Sequence[Group], max_tokens: int, *, whole_groups: bool = False) -> list[Packed]:
        """Pack groups the way this model can take them.

        Args:
            whole_groups: keep the completions of a group in one row.

        Raises:
            ModelError: where they are to stay together and this model takes one sequence at a time.
        """
        share = self.share_prompts and not self.alone
        if whole_groups:
            if not share:
                raise ModelError(
                    "recipe, key objective.name",
                    got="an objective over pairs",
                    expected=f"one over single completions: {self.reason}",
                    hint="--set objective.name=grpo",
                )
            return pack(groups, max_tokens, whole_groups=True)
        # 0: a block that is longer gets a row of its own, and each is.
        return pack(groups, max_tokens if share else 0, share_prompts=share)

    @torch.no_grad()
    def score(self, groups: Sequence[Group], temperature: float, max_tokens: int = 4096) -> list[np.ndarray]:
        """Log-probabilities of every completion (score C): float32 [T_i] each, in order over all groups."""
        of_each: list[np.ndarray] = [np.empty(0)] * sum(len(group.completions) for group in groups)
        for row in self.rows(groups, max_tokens):
            logprobs = self.scores(row.to(self.device), temperature).logprobs.numpy(force=True)
            for number, span in zip(row.completions, row.spans, strict=True):
                of_each[number] = logprobs[span]
        return of_each

    @torch.no_grad()
    def hidden_of(self, groups: Sequence[Group], max_tokens: int = 4096) -> list[Float[Tensor, "T D"]]:
        """The hidden states that predict each completion's tokens, in order over all groups."""
        of_each: dict[int, Tensor] = {}
        for row in self.rows(groups, max_tokens):
            hidden = self.hidden(row.to(self.device))
            of_each |= {number: hidden[span] for number, span in zip(row.completions, row.spans, strict=True)}
        return [of_each[number] for number in range(len(of_each))]

    def project(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        *,
        with_entropy: bool = False,
    ) -> TokenScores:
        """From hidden states that predict ``targets`` to scores."""
        return token_logprobs(
            hidden,
            whole(self.head),
            targets,
            temperature=temperature,
            bias=self.head_bias,
            softcap=self.softcap,
            with_entropy=with_entropy,
            head_dtype=self.head_dtype,
        )


class Placed(NamedTuple):
    """Where a model computes."""

    device: torch.device
    why: str
    """Why it is that one."""


def place(asked: str) -> Placed:
    """The device of a recipe's ``model.device``.

    Raises:
        UsageError: for one that this machine, or this build of torch, does not have.
    """
    has_cuda = torch.cuda.is_available()
    if asked == "auto":
        if has_cuda:
            return Placed(torch.device("cuda"), "auto: CUDA is there")
        return Placed(torch.device("cpu"), "auto: no CUDA here")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
        raise UsageError(
            "recipe, key model.device",
            got=f"{asked!r}: {str(error).splitlines()[0]}",
            expected="auto, cpu, cuda or cuda:N, as this machine has them",
            hint="--set model.device=auto",
        ) from error
    return Placed(device, "as the recipe says")


def load_policy(path: Path, dtype: str, head_dtype: str, device: str = "cpu") -> Policy:
    """Load a checkpoint for training, on ``device`` (:func:`place`).

    Raises:
        UsageError: for a device that is not there.
        ModelError: when it is no causal language model, or its logits are not head · hidden (a scale that is
            not known here).
    """
    attention.register()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"model {path}",
            got=str(error).splitlines()[0],
            expected="a Hugging Face causal LM in safetensors",
            hint=f"ls {path}",
        ) from error
    placed, why = place(device)
    model.to(placed)
    model.eval()  # dropout off on the trainer's side too: an engine has none
    head = model.get_output_embeddings()
    policy = Policy(
        model=model,
        head=head.weight,
        head_bias=getattr(head, "bias", None),
        head_dtype=DTYPES[head_dtype],
        softcap=getattr(config.get_text_config(), "final_logit_softcapping", None),
        share_prompts=True,
        reason="the model takes lockstep's packed attention",
        placed=why,
    )
    expected = _own_logits(model)
    for share in (True, False):
        policy.share_prompts = share
        error = _self_test(policy, expected)
        if error <= SELF_TEST_ATOL:
            return policy
        policy.reason = (
            "each sequence is computed on its own: packed attention does not reproduce this model's logits"
        )
    raise ModelError(
        f"model {path}, {type(model).__name__}",
        got=f"logits that differ from head · hidden by {error:.1e} of the largest logit",
        expected=f"at most {SELF_TEST_ATOL:g}: a plain projection, or one with final_logit_softcapping",
        hint=(
            "this architecture scales its logits in a way that policy/model.py does not know; "
            "please report it"
        ),
    )


def recompute_layers(model: PreTrainedModel) -> None:
    """Have each layer keep its inputs alone for the backward pass, and compute the rest again in it.

    transformers does so in training mode only, where dropout is on too: so the mode is set on the layers
    themselves and not on the modules inside them.

    Raises:
        ModelError: where the model's layers cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"recipe, key training.gradient_checkpointing, {type(model).__name__}",
            got="true",
            expected="a model of transformers that supports it",
            hint="--set training.gradient_checkpointing=false",
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


_PROBE = torch.tensor([[3, 11, 7, 5, 2, 13]])


@torch.no_grad()
def _own_logits(model: PreTrainedModel) -> Float[Tensor, "T V"]:
    with attention_of(model, EAGER):
        return model(input_ids=_PROBE.to(model.device), use_cache=False).logits[0].float().cpu()


@torch.no_grad()
def _self_test(policy: Policy, expected: Float[Tensor, "T V"]) -> float:
    """Largest deviation of our log-probabilities from the model's own, relative to the largest logit.

    Two completions share a prompt, so that a model that ignores the blocks is found out.
    """
    policy.model.set_attn_implementation(attention.NAME if policy.share_prompts else EAGER)
    ids = _PROBE[0].numpy()
    group = Group(ids[:2], [ids[2:4][::-1].copy(), ids[2:]])
    try:
        scored = policy.score([group], 1.0)[1]
    except (NotImplementedError, TypeError):
        return float("inf")
    own = expected.log_softmax(-1)[1:-1].gather(1, _PROBE[0, 2:, None])[:, 0]
    times = 1.0 if policy.model.dtype == torch.float32 else SELF_TEST_COARSE
    return float((torch.from_numpy(scored) - own).abs().max() / expected.abs().max() / times)


@contextlib.contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with another implementation of its attention."""
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
