"""Sequences as one flat row of tokens, no padding, each group's prompt computed once.

The completions of a group share their prompt. A *block* holds the prompt once and then its completions one after another;
a mask lets each completion see the prompt and itself. Blocks follow each other in the row and never see each other::

    tokens      p p p p a a a b b │ q q c c c c           N = 15
    position    0 1 2 3 4 5 6 4 5 │ 0 1 2 3 4 5
    block       └─ prompt p, completions a, b ─┘ └─ prompt q, completion c ─┘

The last token of a completion predicts nothing and is left out of the row. ``predictors[t]`` is the row index whose hidden
state predicts ``targets[t]``: the prompt's last token predicts the first token of every completion of its block.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

MAX_BLOCK_TOKENS = 1024
"""A block's mask costs its length squared; past this a group is split and its prompt computed again."""


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and its completions: int32 [P] with P ≥ 1, and int32 [T_i] each with T_i ≥ 1."""

    prompt: np.ndarray
    completions: Sequence[np.ndarray]


@dataclass(frozen=True, eq=False)
class Block:
    """Row indices [start, stop) that attend to each other only, under ``mask`` (None: plain causal)."""

    start: int
    stop: int
    mask: Bool[Tensor, "L L"] | None


@dataclass(frozen=True, eq=False)
class Packed:
    """One row of N tokens that scores T target tokens.

    ``spans[i]`` is the slice of [0, T) that belongs to completion ``completions[i]``, counted over all groups in order.
    """

    token_ids: Int[Tensor, "N"]
    position_ids: Int[Tensor, "N"]
    blocks: tuple[Block, ...]
    predictors: Int[Tensor, "T"]
    targets: Int[Tensor, "T"]
    completions: tuple[int, ...]
    spans: tuple[slice, ...]

    def to(self, device: torch.device) -> "Packed":
        """The same row on another device."""
        blocks = tuple(Block(b.start, b.stop, None if b.mask is None else b.mask.to(device)) for b in self.blocks)
        moved = [t.to(device) for t in (self.token_ids, self.position_ids, self.predictors, self.targets)]
        return Packed(moved[0], moved[1], blocks, moved[2], moved[3], self.completions, self.spans)


def pack(groups: Sequence[Group], max_tokens: int, *, share_prompts: bool = True) -> list[Packed]:
    """Lay groups out in rows of at most ``max_tokens`` (a longer block gets a row of its own), in order.

    Args:
        share_prompts: False computes every completion's prompt anew, each in a block of its own.
    """
    rows: list[list[_Plan]] = [[]]
    for plan in _plans(groups, min(MAX_BLOCK_TOKENS, max_tokens) if share_prompts else 0):
        if rows[-1] and sum(p.length for p in rows[-1]) + plan.length > max_tokens:
            rows.append([])
        rows[-1].append(plan)
    return [_lay_out(plans) for plans in rows if plans]


@dataclass(frozen=True, eq=False)
class _Plan:
    prompt: np.ndarray
    completions: list[tuple[int, np.ndarray]]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(ids) - 1 for _, ids in self.completions)


def _plans(groups: Sequence[Group], max_block: int) -> Iterable[_Plan]:
    index = 0
    for group in groups:
        if len(group.prompt) == 0 or any(len(ids) == 0 for ids in group.completions):
            raise ValueError("a group has an empty prompt or completion: nothing predicts its first token")
        plan = _Plan(group.prompt, [])
        for ids in group.completions:
            if plan.completions and plan.length + len(ids) - 1 > max_block:
                yield plan
                plan = _Plan(group.prompt, [])
            plan.completions.append((index, ids))
            index += 1
        if plan.completions:
            yield plan


def _lay_out(plans: list[_Plan]) -> Packed:
    ids, positions, predictors, targets = [], [], [], []
    blocks, numbers, spans = [], [], []
    start, n_targets = 0, 0
    for plan in plans:
        n_prompt = len(plan.prompt)
        ids.append(plan.prompt)
        positions.append(np.arange(n_prompt))
        at = start + n_prompt
        for number, completion in plan.completions:
            n = len(completion)
            ids.append(completion[:-1])
            positions.append(np.arange(n_prompt, n_prompt + n - 1))
            predictors.append(np.r_[start + n_prompt - 1, at : at + n - 1])
            targets.append(completion)
            numbers.append(number)
            spans.append(slice(n_targets, n_targets + n))
            at, n_targets = at + n - 1, n_targets + n
        blocks.append(Block(start, at, _mask(n_prompt, [len(c) - 1 for _, c in plan.completions])))
        start = at

    def flat(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    rows = flat(ids), flat(positions), tuple(blocks), flat(predictors), flat(targets)
    return Packed(*rows, tuple(numbers), tuple(spans))


def _mask(n_prompt: int, lengths: list[int]) -> Bool[Tensor, "L L"] | None:
    if len(lengths) == 1:
        return None
    owner = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([n_prompt, *lengths]))  # 0 is the prompt
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return causal & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))
