"""Attention over packed rows, registered with transformers as ``lockstep_packed``.

Each block of the row (``packing.py``) is one call of scaled-dot-product attention, so no work is spent
between blocks and no sequence can see its neighbour. The blocks travel as a keyword argument of the model's
forward, which transformers hands down to every attention layer (transformers/modeling_utils.py,
``AttentionInterface``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lockstep.policy.packing import Block

NAME = "lockstep_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, N, d]
    key: Tensor,  # [1, key heads, N, d]
    value: Tensor,  # [1, key heads, N, d]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    blocks: tuple[Block, ...] = (),
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each block only. Returns ([1, N, heads, d], None).

    Raises:
        NotImplementedError: for what would silently be another attention (no blocks, soft-capped scores).
    """
    if not blocks or softcap is not None:
        raise NotImplementedError(
            f"packed attention without blocks or with softcap={softcap} in {type(module).__name__}"
        )
    parts = []
    for block in blocks:
        rows = slice(block.start, block.stop)
        mask = _windowed(block, sliding_window, query.device)
        parts.append(
            nn.functional.scaled_dot_product_attention(
                query[:, :, rows],
                key[:, :, rows],
                value[:, :, rows],
                attn_mask=mask,
                # The kernel without a mask is another one, and the faster.
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    # [1, N, heads, d], contiguous: the layers join heads and d by a reshape, which then copies nothing.
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _windowed(block: Block, window: int | None, device: torch.device) -> Tensor | None:
    length = block.stop - block.start
    if window is None or length <= window:
        return block.mask
    seen = (
        torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if block.mask is None
        else block.mask
    )
    # A token sees its own path from the root on, so what it sees counts where it stands.
    position = seen.sum(-1)
    return seen & (position[:, None] - position < window)


@contextmanager
def altered(
    window: int | None = None, kept: Callable[[Tensor], Tensor] | None = None, scale: float = 1.0
) -> Iterator[None]:
    """Packed attention as another side may have it.

    Under a window, over keys and values as a cache kept them, with the scores scaled.
    """

    def other(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if kept is not None:
            key, value = kept(key), kept(value)
        if window is not None:
            kwargs["sliding_window"] = window
        return packed_attention(module, query * scale, key, value, *args, **kwargs)

    # transformers' registry is global; a variant is held by one thread at a time, so nothing else is scored
    # meanwhile.
    AttentionInterface.register(NAME, other)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, packed_attention)


def register() -> None:
    """Make ``attn_implementation="lockstep_packed"`` known to transformers; it builds no mask of its own."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
