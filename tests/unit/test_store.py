"""Rollouts on disk: read back exactly, whole or refused, and under the name that says what may be done with them."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lockstep.errors import RunError
from lockstep.records.tokens import FLOAT32, INT32, Completion
from lockstep.records.versions import VersionSpan
from lockstep.rollout import store
from lockstep.rollout.collect import Rollouts
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import read_rollouts


def rollouts(step=7, n_prompts=2, group_size=2, reward=0.5):
    """Two spans a completion, a NaN among the numbers, tokens the engine counted otherwise than we do."""
    completions = [
        Completion(
            prompt_index=p,
            sample_index=s,
            token_ids=np.array([5 + p, 6 + s, 7], INT32).tobytes(),
            logprobs=np.array([-0.1 * (p + 1), np.nan, -1.5 - s], FLOAT32).tobytes(),
            finish_reason="stop" if s else "length",
            version_spans=(VersionSpan(0, 1, step - 1), VersionSpan(1, 3, step)),
            missing=1,
            prompt_tokens=11 + p,
        )
        for p in range(n_prompts)
        for s in range(group_size)
    ]
    n = len(completions)
    return Rollouts(
        step=step,
        group_size=group_size,
        items=[step * n_prompts + p for p in range(n_prompts)],
        prompts=[np.arange(3 + p, dtype=np.int32) for p in range(n_prompts)],
        completions=completions,
        texts=[f"answer {i} «é»\n\x00" for i in range(n)],
        rewards=np.full(n, reward),
        advantages=np.linspace(-1, 1, n).astype(np.float32),
        sample_s=1.25,
        reward_s=0.1 + 0.2,
    )


def assert_same(found, expected):
    assert found.completions == expected.completions  # bytes for bytes: a NaN's bits are its own
    assert (found.step, found.group_size, found.texts) == (expected.step, expected.group_size, expected.texts)
    assert (found.sample_s, found.reward_s) == (expected.sample_s, expected.reward_s)
    assert list(found.items) == list(expected.items)
    for name in ("rewards", "advantages"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert all(prompt.dtype == np.int32 for prompt in found.prompts)
    for got, wanted in zip(found.prompts, expected.prompts, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_every_version_span_and_the_engines_prompt_length_come_back(tmp_path):
    written = rollouts()
    store.save(tmp_path / "a.parquet", written)
    found = store.load(tmp_path / "a.parquet", 2)
    assert [c.version_spans for c in found.completions] == [(VersionSpan(0, 1, 6), VersionSpan(1, 3, 7))] * 4
    assert [c.prompt_tokens for c in found.completions] == [11, 11, 12, 12]
    assert_same(found, written)


def test_what_was_drawn_comes_back_unscored_and_then_scored_under_the_same_name(tmp_path):
    layout = RunLayout(tmp_path)
    drawn = rollouts(reward=np.nan)
    drawn.advantages = np.full(4, np.nan, np.float32)
    store.save(layout.drawn(7), drawn)
    found = store.load(layout.drawn(7), 2)
    assert_same(found, drawn)
    assert not found.scored
    store.save(layout.drawn(7), rollouts())
    assert store.load(layout.drawn(7), 2).scored


SPANS = st.lists(st.builds(VersionSpan, *[st.integers(0, 2**40)] * 3), max_size=3).map(tuple)
NUMBERS = arrays(FLOAT32, st.integers(0, 5), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


@st.composite
def any_rollouts(draw):
    group_size, n_prompts = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    n = group_size * n_prompts
    completions = []
    for i in range(n):
        logprobs = draw(NUMBERS)
        ids = draw(arrays(INT32, len(logprobs), elements=st.integers(-(2**31), 2**31 - 1)))
        reason = draw(st.sampled_from(["stop", "length", "abort"]))
        numbers = draw(st.tuples(st.integers(0, 9), st.integers(0, 2**20)))
        completions.append(
            Completion(i // group_size, i % group_size, ids.tobytes(), logprobs.tobytes(), reason, draw(SPANS), *numbers)
        )
    return Rollouts(
        draw(st.integers(0, 10**9)),
        group_size,
        draw(st.lists(st.integers(0, 2**40), min_size=n_prompts, max_size=n_prompts)),
        [draw(arrays(np.int32, st.integers(0, 4))) for _ in range(n_prompts)],
        completions,
        [draw(st.text(max_size=5)) for _ in range(n)],
        draw(arrays(np.float64, n, elements=st.floats())),
        draw(arrays(np.float32, n, elements=st.floats(width=32))),
        draw(st.floats(0, 1e6)),
        draw(st.floats(0, 1e6)),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_rollouts())
def test_whatever_is_saved_is_loaded(tmp_path, written):
    store.save(tmp_path / "a.parquet", written)
    assert_same(store.load(tmp_path / "a.parquet", written.group_size), written)


def test_files_of_several_steps_can_be_read_as_one_table(tmp_path):
    from pyarrow import dataset

    layout = RunLayout(tmp_path)
    unscored = rollouts(3, reward=np.nan)
    unscored.completions = [Completion(0, 0, b"", b"", "abort", ())] * 4
    for step in (rollouts(2), unscored, rollouts(4)):
        store.save(layout.rollouts(step.step), step)
    table = dataset.dataset([str(layout.rollouts(step)) for step in (2, 3, 4)]).to_table()
    assert table["step"].to_pylist() == [2] * 4 + [3] * 4 + [4] * 4
    assert table["weight_version"].to_pylist() == [1] * 4 + [-1] * 4 + [3] * 4
    assert table["version_spans"].to_pylist()[0] == [
        {"start": 0, "stop": 1, "version": 1},
        {"start": 1, "stop": 3, "version": 2},
    ]


def test_what_is_refused_is_kept_under_a_name_of_its_own_each_time(tmp_path):
    layout = RunLayout(tmp_path)
    kept = []
    for reward in (1.0, 2.0, 3.0):
        store.save(layout.drawn(7), rollouts(reward=reward))
        kept.append(store.refuse(layout, 7))
        assert not layout.drawn(7).exists()
    assert [path.name for path in kept] == ["step-000007.parquet", "step-000007.2.parquet", "step-000007.3.parquet"]
    assert kept == layout.refusals(7)
    assert kept[0] == layout.refused(7)
    assert [store.load(path, 2).rewards[0] for path in kept] == [1.0, 2.0, 3.0]
    assert not layout.rollouts(7).exists()
    assert layout.refusals(8) == []


def test_what_is_admitted_is_admitted_once(tmp_path):
    layout = RunLayout(tmp_path)
    store.save(layout.drawn(7), rollouts(reward=1.0))
    assert store.admit(layout, 7) == layout.rollouts(7)
    store.save(layout.drawn(7), rollouts(reward=2.0))
    with pytest.raises(RunError, match="admitted before"):
        store.admit(layout, 7)
    assert store.load(layout.rollouts(7), 2).rewards[0] == 1.0
    assert store.load(layout.drawn(7), 2).rewards[0] == 2.0


def _foreign(path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": ["a"], "response": ["b"]}), path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PAR1"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_text("no Parquet"),
        lambda path: path.unlink(),
        _foreign,
    ],
    ids=["empty", "head", "one-byte-cut", "half", "zeros", "text", "missing", "foreign"],
)
def test_a_damaged_file_is_an_error_that_names_it_and_the_way_on(tmp_path, damage):
    layout = RunLayout(tmp_path)
    store.save(layout.rollouts(7), rollouts())
    damage(layout.rollouts(7))
    for read in (lambda path: store.load(path, 2), read_rollouts):
        with pytest.raises(RunError, match=r"step-000007\.parquet") as raised:
            read(layout.rollouts(7))
        assert f"lockstep train --resume {tmp_path}" in raised.value.hint


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "a.parquet"
    written = rollouts()
    store.save(path, written)
    content = path.read_bytes()
    found = 0
    for at in range(4, len(content) // 2, 13):  # the pages; behind them lies the description of the columns
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        try:
            assert_same(store.load(path, 2), written)
        except RunError:
            found += 1
    assert found > 5


def test_groups_of_another_size_are_refused(tmp_path):
    store.save(tmp_path / "a.parquet", rollouts())
    with pytest.raises(RunError, match="groups of 4"):
        store.load(tmp_path / "a.parquet", 4)
