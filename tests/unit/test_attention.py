"""Packed attention against the plain definition, block by block, and against eager attention in a model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lockstep.policy.attention import NAME, altered, packed_attention
from lockstep.policy.model import EAGER, load_policy
from lockstep.policy.packing import Block, pack
from lockstep.records.samples import Group

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
MODULE = nn.Identity()


def plain(query, key, value, seen, scale):
    """softmax(scale · q kᵀ) v written out, in double, where ``seen`` is True."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(repeat, 1) for t in (key, value))
    scores = (query.double() @ key.mT * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).float()


def tensors(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, n, WIDTH, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]


def random_tree(n, rng):
    """A mask of paths: each token's parent is some token before it."""
    seen = torch.eye(n, dtype=torch.bool)
    for at in range(1, n):
        seen[at] |= seen[int(rng.integers(0, at))]
    return seen


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 14)),
    trees=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_block_attends_as_if_it_were_alone(lengths, window, trees, seed):
    rng = np.random.default_rng(seed)
    starts = np.r_[0, np.cumsum(lengths)]
    query, key, value = tensors(int(starts[-1]), seed)
    blocks, expected = [], []
    for start, n in zip(starts, lengths, strict=False):
        tree = random_tree(n, rng) if trees else None
        blocks.append(Block(int(start), int(start + n), tree))
        seen = torch.ones(n, n, dtype=torch.bool).tril() if tree is None else tree
        if window is not None:
            place = seen.sum(-1)  # its own path's length: a token's position
            seen = seen & (place[:, None] - place < window)
        rows = slice(start, start + n)
        expected.append(plain(query[:, :, rows], key[:, :, rows], value[:, :, rows], seen, 0.3))
    found, none = packed_attention(
        MODULE, query, key, value, None, 0.3, blocks=tuple(blocks), sliding_window=window
    )
    assert none is None
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


def test_what_would_silently_be_another_attention_is_refused():
    query, key, value = tensors(4)
    with pytest.raises(NotImplementedError, match="without blocks"):
        packed_attention(MODULE, query, key, value, None)
    with pytest.raises(NotImplementedError, match=r"softcap=50\.0"):
        packed_attention(MODULE, query, key, value, None, blocks=(Block(0, 4, None),), softcap=50.0)


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load_policy(tiny_model_dir, "float32", "float32")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def ids(rng, n):
    return rng.integers(3, 97, n).astype(np.int32)


def eager_hidden(policy, sequence):
    """The body's output for one sequence by itself, under transformers' own attention."""
    policy.model.set_attn_implementation(EAGER)
    try:
        with torch.no_grad():
            row = torch.from_numpy(sequence.astype(np.int64))[None]
            return policy.model.base_model(input_ids=row, use_cache=False).last_hidden_state[0]
    finally:
        policy.model.set_attn_implementation(NAME)


def test_several_blocks_and_shared_prompts_give_the_hidden_states_of_each_sequence_alone(policy, rng):
    trunk = ids(rng, 20)
    groups = [
        Group(np.r_[trunk, ids(rng, 3)], [ids(rng, 5), ids(rng, 1), ids(rng, 7)]),
        Group(np.r_[trunk, ids(rng, 6)], [ids(rng, 4), ids(rng, 2)]),
        Group(ids(rng, 9), [ids(rng, 6)]),
    ]
    (row,) = pack(groups, 4096)
    assert len(row.blocks) == 2, "the two that share their beginning, and the other"
    hidden = policy.hidden_of(groups)
    sequences = [(g.prompt, c) for g in groups for c in g.completions]
    assert len(hidden) == len(sequences) == 6
    for found, (prompt, completion) in zip(hidden, sequences, strict=True):
        alone = eager_hidden(policy, np.r_[prompt, completion])[len(prompt) - 1 : -1]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_gradients_of_packed_rows_are_those_of_eager_attention(policy, rng):
    group = Group(ids(rng, 12), [ids(rng, 5), ids(rng, 4)])
    weight = policy.model.model.layers[0].self_attn.k_proj.weight

    def gradient(logprobs):
        (found,) = torch.autograd.grad(logprobs, weight)
        return found

    (row,) = policy.rows([group], 4096)
    packed = gradient(policy.scores(row, 1.0).logprobs.sum())
    policy.model.set_attn_implementation(EAGER)
    try:
        total = torch.zeros(())
        for completion in group.completions:
            whole = torch.from_numpy(np.r_[group.prompt, completion].astype(np.int64))[None]
            logits = policy.model(input_ids=whole, use_cache=False).logits[0].log_softmax(-1)
            at = torch.arange(len(group.prompt) - 1, whole.shape[1] - 1)
            total = total + logits[at, whole[0, at + 1]].sum()
        eager = gradient(total)
    finally:
        policy.model.set_attn_implementation(NAME)
    torch.testing.assert_close(packed, eager, rtol=1e-3, atol=1e-4 * float(eager.abs().max()))


def test_another_sides_attention_is_held_and_put_back(policy, rng):
    groups = [Group(ids(rng, 30), [ids(rng, 4)])]
    (before,) = policy.score(groups, 1.0)
    with altered(window=64):
        np.testing.assert_array_equal(
            policy.score(groups, 1.0)[0], before, "a window that is longer than the row"
        )
    for change in ({"window": 4}, {"scale": 1.5}, {"kept": lambda t: t.to(torch.float8_e5m2).to(t.dtype)}):
        with altered(**change):
            assert np.abs(policy.score(groups, 1.0)[0] - before).max() > 1e-4
    with pytest.raises(KeyboardInterrupt), altered(scale=math.inf):
        raise KeyboardInterrupt
    np.testing.assert_array_equal(policy.score(groups, 1.0)[0], before)
