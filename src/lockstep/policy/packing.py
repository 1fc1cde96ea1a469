"""Sequences as one flat row of tokens, no padding, nothing computed twice that sequences share.

The completions of a group share their prompt, and the prompts of a task share their beginning (system prompt,
solved examples). A *block* is a tree: the common beginning of its prompts (the trunk) once, then each
prompt's rest (a branch), and behind each branch its completions. A mask lets a token see its own path to the
root and nothing else. Blocks follow each other in the row and never see each other::

    tokens      t t t p p a a a b b q q q c c c │ s s d d d d        N = 22
    position    0 1 2 3 4 5 6 7 5 6 3 4 5 6 7 8 │ 0 1 2 3 4 5
    branch      trunk └─ 1 ───────┘ └─ 2 ─────┘ │
    completion          a     b           c     │     d

The last token of a completion predicts nothing and is left out of the row. ``predictors[t]`` is the row index
whose hidden state predicts ``targets[t]``: a prompt's last token predicts the first token of each of its
completions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lockstep.records.samples import Group

MAX_BLOCK_TOKENS = 1024
"""A block's mask costs its length squared; past this a group is split and its prompt computed again."""
MIN_TRUNK_TOKENS = 16
"""Prompts that share less keep to blocks of their own: a larger mask for little saved."""


@dataclass(frozen=True, eq=False)
class Block:
    """Row indices [start, stop) that attend to each other only, under ``mask`` (None: plain causal)."""

    start: int
    stop: int
    mask: Bool[Tensor, "L L"] | None


@dataclass(frozen=True, eq=False)
class Packed:
    """One row of N tokens that scores T target tokens.

    ``spans[i]`` is the slice of [0, T) that belongs to completion ``completions[i]``, counted over all groups
    in order.
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
        blocks = tuple(
            Block(b.start, b.stop, None if b.mask is None else b.mask.to(device)) for b in self.blocks
        )
        moved = [t.to(device) for t in (self.token_ids, self.position_ids, self.predictors, self.targets)]
        return Packed(moved[0], moved[1], blocks, moved[2], moved[3], self.completions, self.spans)


def pack(
    groups: Sequence[Group], max_tokens: int, *, share_prompts: bool = True, whole_groups: bool = False
) -> list[Packed]:
    """Lay groups out in rows of at most ``max_tokens`` (a longer block gets a row of its own), in order.

    Args:
        share_prompts: False computes every completion's prompt anew, each in a block of its own.
        whole_groups: a group is never split, however long its block gets.
    """
    rows: list[list[_Tree]] = []
    room = 0
    for tree in _trees(groups, min(MAX_BLOCK_TOKENS, max_tokens) if share_prompts else 0, whole_groups):
        length = tree.length
        if not rows or length > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(tree)
        room -= length
    return [_lay_out(trees) for trees in rows]


@dataclass(eq=False)
class _Branch:
    prompt: np.ndarray
    completions: list[tuple[int, np.ndarray]]


@dataclass(eq=False)
class _Tree:
    """A block in the making; ``trunk`` is how many first tokens all its prompts share."""

    trunk: int
    branches: list[_Branch] = field(default_factory=list)

    @property
    def length(self) -> int:
        rest = sum(
            len(b.prompt) - self.trunk + sum(len(ids) - 1 for _, ids in b.completions) for b in self.branches
        )
        return self.trunk + rest

    def grown(self, branch: _Branch, max_block: int) -> bool:
        """Take a branch in, if its prompt shares enough and the block does not grow too long."""
        if self.branches:
            # A shorter trunk is computed again in every branch, so the length is asked of the tree as it
            # would be.
            trunk = _common(self.branches[0].prompt[: self.trunk], branch.prompt)
            taller = _Tree(trunk, [*self.branches, branch])
            if trunk < MIN_TRUNK_TOKENS or taller.length > max_block:
                return False
            self.trunk = trunk
        else:
            # Of one branch the whole prompt is trunk; the next one shortens it to what they share.
            self.trunk = len(branch.prompt)
        self.branches.append(branch)
        return True


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def _trees(groups: Sequence[Group], max_block: int, whole_groups: bool) -> Iterator[_Tree]:
    tree = _Tree(0)
    for branch in _branches(groups, max_block, whole_groups):
        if not tree.grown(branch, max_block):
            yield tree
            tree = _Tree(0)
            tree.grown(branch, max_block)
    if tree.branches:
        yield tree


def _branches(groups: Sequence[Group], max_block: int, whole_groups: bool) -> Iterator[_Branch]:
    """Each group's completions, split where prompt and completions together would exceed a block."""
    index = 0
    for group in groups:
        if len(group.prompt) == 0 or any(len(ids) == 0 for ids in group.completions):
            raise ValueError("a group has an empty prompt or completion: nothing predicts its first token")
        branch = _Branch(group.prompt, [])
        length = len(group.prompt)
        for ids in group.completions:
            if branch.completions and not whole_groups and length + len(ids) - 1 > max_block:
                yield branch
                branch = _Branch(group.prompt, [])
                length = len(group.prompt)
            branch.completions.append((index, ids))
            length += len(ids) - 1
            index += 1
        if branch.completions:
            yield branch


@dataclass(eq=False)
class _Layout:
    """The parts of a row, gathered tree by tree."""

    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    predictors: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    spans: list[slice] = field(default_factory=list)
    length: int = 0
    n_targets: int = 0

    def add(self, ids: np.ndarray, position: int) -> None:
        """Append tokens that stand at ``position`` and after in their sequence."""
        self.ids.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.length += len(ids)

    def add_completion(self, number: int, ids: np.ndarray, last_of_prompt: int, position: int) -> None:
        """Append a completion's inputs and note who predicts its tokens."""
        n = len(ids)
        # The first token is predicted from the prompt, which may lie far before it in the row.
        self.predictors.append(np.r_[last_of_prompt, self.length : self.length + n - 1])
        self.targets.append(ids)
        self.numbers.append(number)
        self.spans.append(slice(self.n_targets, self.n_targets + n))
        self.n_targets += n
        # The last token predicts nothing.
        self.add(ids[:-1], position)


def _lay_out(trees: list[_Tree]) -> Packed:
    row = _Layout()
    blocks = []
    for tree in trees:
        start = row.length
        row.add(tree.branches[0].prompt[: tree.trunk], 0)
        for branch in tree.branches:
            row.add(branch.prompt[tree.trunk :], tree.trunk)
            # An empty rest leaves the trunk's last token as the prompt's.
            last = row.length - 1 if len(branch.prompt) > tree.trunk else start + tree.trunk - 1
            for number, ids in branch.completions:
                row.add_completion(number, ids, last, len(branch.prompt))
        blocks.append(Block(start, row.length, _mask(tree)))

    tensors = _flat(row.ids), _flat(row.positions), tuple(blocks), _flat(row.predictors), _flat(row.targets)
    return Packed(*tensors, tuple(row.numbers), tuple(row.spans))


def _flat(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _mask(tree: _Tree) -> Bool[Tensor, "L L"] | None:
    """Who sees whom: a token sees what lies before it on its own path.

    0 marks trunk and prompt, which all share.
    """
    # One path: plain causal attention, whose kernel reads no mask.
    if len(tree.branches) == 1 and len(tree.branches[0].completions) == 1:
        return None
    branches, completions = [np.zeros(tree.trunk, np.int64)], [np.zeros(tree.trunk, np.int64)]
    n_completions = 0
    for number, branch in enumerate(tree.branches, 1):
        lengths = [len(branch.prompt) - tree.trunk, *(len(ids) - 1 for _, ids in branch.completions)]
        branches.append(np.full(sum(lengths), number))
        names = np.r_[0, np.arange(n_completions + 1, n_completions + len(lengths))]
        completions.append(np.repeat(names, lengths))
        n_completions += len(branch.completions)
    allowed = torch.ones(tree.length, tree.length, dtype=torch.bool).tril()
    for owner in (torch.from_numpy(np.concatenate(branches)), torch.from_numpy(np.concatenate(completions))):
        # Once for branches and once for completions: a token sees what all share, and its own.
        allowed &= (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
    return allowed
