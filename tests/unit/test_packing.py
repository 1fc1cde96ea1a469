"""No sequence sees its neighbour: a tiny real model gives each sequence the same scores packed and alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.policy.packing import MIN_TRUNK_TOKENS, pack
from lockstep.records.samples import Group

VOCAB = 97
ATOL = 2e-5  # fp32 over 2 layers: 1e-6 of rounding on logits of order 1, with an order to spare


def ids(draw, low, high):
    return np.array(draw(st.lists(st.integers(0, VOCAB - 1), min_size=low, max_size=high)), np.int32)


@st.composite
def many_groups(draw):
    trunk = ids(draw, 0, 2 * MIN_TRUNK_TOKENS)
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        start = trunk if draw(st.booleans()) else ids(draw, 0, 5)
        prompt = np.r_[start, ids(draw, 0 if len(start) else 1, 6)].astype(np.int32)
        groups.append(Group(prompt, [ids(draw, 1, 6) for _ in range(draw(st.integers(1, 4)))]))
    return groups


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    from lockstep.policy.model import load_policy

    return load_policy(tiny_model_dir, "float32", "float32")


@given(groups=many_groups(), max_tokens=st.sampled_from([8, 40, 4096]))
@settings(max_examples=20)
def test_packed_scores_are_those_of_each_sequence_alone(policy, groups, max_tokens):
    packed = policy.score(groups, 0.8, max_tokens)
    n = 0
    for group in groups:
        for completion in group.completions:
            whole = torch.from_numpy(np.r_[group.prompt, completion].astype(np.int64))[None]
            with torch.no_grad():
                policy.model.set_attn_implementation("sdpa")
                logits = policy.model(input_ids=whole[:, :-1], use_cache=False).logits[0]
                policy.model.set_attn_implementation("lockstep_packed")
            alone = (logits / 0.8).log_softmax(-1).gather(1, whole[0, 1:, None])[len(group.prompt) - 1 :, 0]
            torch.testing.assert_close(torch.from_numpy(packed[n]), alone, rtol=0, atol=ATOL)
            n += 1
    assert n == len(packed)


@given(groups=many_groups())
@settings(max_examples=20)
def test_every_target_is_scored_once_and_no_row_is_padded(groups):
    rows = pack(groups, 64)
    numbers = [number for row in rows for number in row.completions]
    assert numbers == list(range(sum(len(g.completions) for g in groups)))
    targets = np.concatenate([row.targets.numpy() for row in rows])
    assert np.array_equal(targets, np.concatenate([c for g in groups for c in g.completions]))
    for row in rows:
        assert row.blocks[0].start == 0
        assert row.blocks[-1].stop == len(row.token_ids)
        assert all(a.stop == b.start for a, b in zip(row.blocks, row.blocks[1:], strict=False))


def test_changing_one_sequence_changes_no_other(policy):
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, VOCAB, MIN_TRUNK_TOKENS + 4)

    def groups(changed):
        prompts = [
            np.r_[trunk, rng2.integers(0, VOCAB, 3)].astype(np.int32)
            for rng2 in map(np.random.default_rng, (1, 2))
        ]
        completions = [
            [np.random.default_rng([g, c]).integers(0, VOCAB, 5).astype(np.int32) for c in range(3)]
            for g in range(2)
        ]
        if changed:
            completions[0][1] = (completions[0][1] + 1) % VOCAB
        return [Group(p, c) for p, c in zip(prompts, completions, strict=True)]

    before, after = policy.score(groups(False), 1.0), policy.score(groups(True), 1.0)
    assert not np.array_equal(before[1], after[1])
    for i in (0, 2, 3, 4, 5):
        np.testing.assert_array_equal(before[i], after[i])


def test_shared_beginnings_are_computed_once():
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, VOCAB, 90)
    groups = [
        Group(
            np.r_[trunk, [g], rng.integers(0, VOCAB, 9)].astype(np.int32),
            [rng.integers(0, VOCAB, 4).astype(np.int32)] * 8,
        )
        for g in range(8)
    ]
    (row,) = pack(groups, 4096)
    assert len(row.token_ids) == 90 + 8 * (10 + 8 * 3)


def test_an_empty_completion_is_refused():
    with pytest.raises(ValueError, match="empty"):
        pack([Group(np.array([1], np.int32), [np.array([], np.int32)])], 64)
