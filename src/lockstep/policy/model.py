"""The trainer's model: hidden states from transformers, log-probabilities from ``logprobs.py`` alone."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from lockstep.errors import ModelError
from lockstep.policy import attention
from lockstep.policy.logprobs import TokenScores, token_logprobs
from lockstep.policy.packing import Group, Packed, pack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EAGER = "eager"
"""Where packed attention does not fit: transformers' own definition. Its faster paths leave out soft-capped scores."""
SELF_TEST_ATOL = 1e-3
"""Logits through our path against the model's own forward, relative to the largest logit: far above fp32 rounding over a few
dozen layers (1e-5), far below the effect of a forgotten scale, cap or mask (1e-1)."""


@dataclass(eq=False)
class Policy:
    """A causal language model that scores packed rows.

    ``share_prompts`` is False where the model cannot take our attention; each sequence is then computed on its own.
    """

    model: PreTrainedModel
    head: nn.Parameter
    head_bias: Tensor | None
    head_dtype: torch.dtype
    softcap: float | None
    share_prompts: bool
    reason: str
    """Why ``share_prompts`` is what it is; shown in the manifest."""
    alone: bool = False
    """One sequence a row: what a suspected leak between packed sequences is judged against."""

    @property
    def tied(self) -> bool:
        """True when the head is the input embedding."""
        return self.head is self.model.get_input_embeddings().weight

    def hidden(self, row: Packed) -> Float[Tensor, "T D"]:
        """The hidden states that predict ``row.targets``, after the final norm."""
        kwargs = {"blocks": row.blocks} if self.share_prompts else {}
        output = self.model.base_model(
            input_ids=row.token_ids[None], position_ids=row.position_ids[None], use_cache=False, **kwargs
        )
        return output.last_hidden_state[0][row.predictors]

    def scores(self, row: Packed, temperature: float, *, with_entropy: bool = False) -> TokenScores:
        """Log-probability of every target at ``temperature``, differentiable; nats, fp32 [T]."""
        return self.project(self.hidden(row), row.targets, temperature, with_entropy=with_entropy)

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Whole distributions, fp32, for the few tokens that a hypothesis needs them for; training never does."""
        z = hidden.to(self.head_dtype) @ self.head.to(self.head_dtype).T
        z = z.float() if self.head_bias is None else z.float() + self.head_bias
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def rows(self, groups: Sequence[Group], max_tokens: int) -> list[Packed]:
        """Pack groups the way this model can take them."""
        share = self.share_prompts and not self.alone
        return pack(groups, max_tokens if share else 0, share_prompts=share)

    @torch.no_grad()
    def score(self, groups: Sequence[Group], temperature: float, max_tokens: int = 4096) -> list[np.ndarray]:
        """Log-probabilities of every completion (score C): float32 [T_i] each, in order over all groups."""
        return self.score_at(groups, (temperature,), max_tokens)[0]

    @torch.no_grad()
    def score_at(
        self,
        groups: Sequence[Group],
        temperatures: Sequence[float],
        max_tokens: int = 4096,
        *,
        head: Tensor | None = None,
    ) -> list[list[np.ndarray]]:
        """:meth:`score` at several temperatures for one pass of the body.

        Args:
            head: scores through another head than the model's own (a hypothesis of layer 3).
        """
        n = sum(len(group.completions) for group in groups)
        found: list[list[np.ndarray]] = [[np.empty(0)] * n for _ in temperatures]
        for row in self.rows(groups, max_tokens):
            row = row.to(self.head.device)
            hidden = self.hidden(row)
            for at, temperature in enumerate(temperatures):
                logprobs = self.project(hidden, row.targets, temperature, head=head).logprobs.numpy(force=True)
                for number, span in zip(row.completions, row.spans, strict=True):
                    found[at][number] = logprobs[span]
        return found

    def project(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        *,
        with_entropy: bool = False,
        head: Tensor | None = None,
    ) -> TokenScores:
        """From hidden states that predict ``targets`` to scores, through the model's head or another."""
        return token_logprobs(
            hidden,
            self.head if head is None else head,
            targets,
            temperature=temperature,
            bias=self.head_bias,
            softcap=self.softcap,
            with_entropy=with_entropy,
            head_dtype=self.head_dtype,
        )


def load_policy(path: Path, dtype: str, head_dtype: str) -> Policy:
    """Load a checkpoint for training.

    Raises:
        ModelError: when it is no causal language model, or its logits are not head · hidden (a scale that is not known here).
    """
    attention.register()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"model {path}",
            got=str(error).splitlines()[0],
            expected="a Hugging Face causal LM in safetensors",
            hint=f"ls {path}",
        ) from error
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
    )
    expected = _own_logits(model)
    for share in (True, False):
        policy.share_prompts = share
        error = _self_test(policy, expected)
        if error <= SELF_TEST_ATOL:
            return policy
        policy.reason = "each sequence is computed on its own: packed attention does not reproduce this model's logits"
    raise ModelError(
        f"model {path}, {type(model).__name__}",
        got=f"logits that differ from head · hidden by {error:.1e} of the largest logit",
        expected=f"at most {SELF_TEST_ATOL:g}: a plain projection, or one with final_logit_softcapping",
        hint="this architecture scales its logits in a way that policy/model.py does not know; please report it",
    )


_PROBE = torch.tensor([[3, 11, 7, 5, 2, 13]])


@torch.no_grad()
def _own_logits(model: PreTrainedModel) -> Float[Tensor, "T V"]:
    with attention_of(model, EAGER):
        return model(input_ids=_PROBE, use_cache=False).logits[0].float()


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
    tolerance = 1.0 if policy.model.dtype == torch.float32 else 20.0
    return float((torch.from_numpy(scored) - own).abs().max() / expected.abs().max() / tolerance)


@contextlib.contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with another implementation of its attention."""
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
