"""How much probability a truncating sampler keeps, from the trainer's own logits.

Follows vLLM's order (vllm/v1/sample: min-p, then top-k, then top-p on what is left) with its ties: every
token as likely as the k-th is kept, and top-p keeps the token that crosses the threshold.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lockstep.records.tokens import SamplingParams

CHUNK = 64
"""Positions whose full-vocabulary logits are held at once."""


@torch.no_grad()
def kept_log_mass(
    logits: Callable[[Tensor], Tensor], hidden: Float[Tensor, "T D"], sampling: SamplingParams
) -> Float[Tensor, "T"]:
    """log of the probability, at the sampling temperature, of the tokens that can be drawn; nats, ≤ 0.

    Args:
        logits: from hidden states [L, D] to whole distributions [L, V], fp32.
    """
    parts = []
    for rows in hidden.split(CHUNK):
        logprobs = (logits(rows) / sampling.temperature).log_softmax(-1)
        parts.append(logprobs.masked_fill(~kept(logprobs, sampling), float("-inf")).logsumexp(-1))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def kept(logprobs: Float[Tensor, "T V"], sampling: SamplingParams) -> Bool[Tensor, "T V"]:
    """Which tokens min-p, top-k and top-p leave."""
    keep = torch.ones_like(logprobs, dtype=torch.bool)
    if sampling.min_p > 0.0:
        keep &= logprobs >= logprobs.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log()
    if 0 < sampling.top_k < logprobs.shape[-1]:
        keep &= logprobs >= logprobs.topk(sampling.top_k).values[:, -1:]
    if sampling.top_p < 1.0:
        left = logprobs.masked_fill(~keep, float("-inf")).softmax(-1)
        ordered, order = left.sort(-1)
        dropped = ordered.cumsum(-1) <= 1.0 - sampling.top_p
        dropped[:, -1] = False
        keep &= ~torch.zeros_like(dropped).scatter(-1, order, dropped)
    return keep
