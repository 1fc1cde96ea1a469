"""Rollouts on disk: read back exactly, whole or refused, and under the name that says what they are for."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lockstep.errors import RunError
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import VersionSpan
from lockstep.rollout import store
from lockstep.runs.layout import RunLayout
from lockstep.runs.rollouts import read_table

SAMPLING = SamplingParams(max_tokens=3)


def rollouts(step=7, n_prompts=2, group_size=2, reward=0.5):
    """Two spans a sample, a tool's token, a NaN among the numbers, tokens the engine counted otherwise."""
    samples = [
        Sample(
            group=p,
            sample=s,
            item=step * n_prompts + p,
            prompt_ids=np.arange(3 + p, dtype=np.int32),
            token_ids=np.array([5 + p, 6 + s, 7], np.int32),
            loss_mask=np.array([True, s == 0, True]),
            engine_logprobs=np.array([-0.1 * (p + 1), np.nan, -1.5 - s], np.float32),
            version_spans=(VersionSpan(0, 1, step - 1), VersionSpan(1, 3, step)),
            finish_reason="stop" if s else "length",
            reward=reward,
            advantages=None if np.isnan(reward) else np.array([0.5, 0.25, -p - s], np.float32),
            text=f"answer {p} {s} «é»\n\x00",
            prompt_tokens=11 + p,
        )
        for p in range(n_prompts)
        for s in range(group_size)
    ]
    return Samples(samples, SAMPLING, step=step, sample_s=1.25, reward_s=0.1 + 0.2)


def assert_same(found, expected):
    assert (found.step, found.sampling, len(found)) == (expected.step, expected.sampling, len(expected))
    assert (found.sample_s, found.reward_s) == (expected.sample_s, expected.reward_s)
    for got, wanted in zip(found, expected, strict=True):
        for field in fields(Sample):
            value, other = getattr(got, field.name), getattr(wanted, field.name)
            if isinstance(other, np.ndarray):  # bytes for bytes: a NaN's bits are its own
                assert (field.name, value.dtype, value.tobytes()) == (
                    field.name,
                    other.dtype,
                    other.tobytes(),
                )
            else:
                assert value == other or (field.name == "reward" and np.isnan([value, other]).all()), (
                    field.name
                )


def load(path, group_size=2):
    return store.load(path, group_size, SAMPLING)


def test_every_field_of_a_sample_comes_back(tmp_path):
    written = rollouts()
    store.save(tmp_path / "a.parquet", written)
    found = load(tmp_path / "a.parquet")
    assert [sample.version_spans for sample in found] == [(VersionSpan(0, 1, 6), VersionSpan(1, 3, 7))] * 4
    assert [sample.prompt_tokens for sample in found] == [11, 11, 12, 12]
    assert [sample.missing for sample in found] == [1, 0, 1, 0], "a tool's token is missed by nobody"
    assert read_table(tmp_path / "a.parquet")[0]["missing_logprobs"].to_pylist() == [1, 0, 1, 0]
    assert_same(found, written)


def test_what_was_drawn_comes_back_unrewarded_and_then_rewarded_under_the_same_name(tmp_path):
    layout = RunLayout(tmp_path)
    drawn = rollouts(reward=np.nan)
    store.save(layout.drawn(7), drawn)
    found = load(layout.drawn(7))
    assert_same(found, drawn)
    assert not found.rewarded
    store.save(layout.drawn(7), rollouts())
    assert load(layout.drawn(7)).rewarded


SPANS = st.lists(st.builds(VersionSpan, *[st.integers(0, 2**40)] * 3), max_size=3).map(tuple)


@st.composite
def any_sample(draw, group, sample):
    n = draw(st.integers(0, 5))
    numbers = arrays(np.float32, n, elements=st.floats(width=32, allow_nan=True, allow_infinity=True))
    return Sample(
        group=group,
        sample=sample,
        item=draw(st.integers(0, 2**40)),
        prompt_ids=draw(arrays(np.int32, st.integers(0, 4))),
        token_ids=draw(arrays(np.int32, n, elements=st.integers(-(2**31), 2**31 - 1))),
        loss_mask=draw(arrays(np.bool_, n)),
        engine_logprobs=draw(numbers),
        sampling_logprobs=draw(st.none() | numbers),
        version_spans=draw(SPANS),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        reward=draw(st.floats()),
        advantages=draw(st.none() | numbers),
        text=draw(st.text(max_size=5)),
        prompt_tokens=draw(st.integers(0, 2**20)),
    )


@st.composite
def any_rollouts(draw):
    group_size, n_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    samples = [draw(any_sample(group, sample)) for group in range(n_groups) for sample in range(group_size)]
    seconds = st.floats(0, 1e6)
    return Samples(
        samples, SAMPLING, draw(st.integers(0, 10**9)), sample_s=draw(seconds), reward_s=draw(seconds)
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_rollouts())
def test_whatever_is_saved_is_loaded(tmp_path, written):
    store.save(tmp_path / "a.parquet", written)
    assert_same(load(tmp_path / "a.parquet", written.group_size), written)


def test_files_of_several_steps_can_be_read_as_one_table(tmp_path):
    from pyarrow import dataset

    layout = RunLayout(tmp_path)
    unrewarded = rollouts(3, reward=np.nan)
    unrewarded.samples = [replace(sample, version_spans=()) for sample in unrewarded]
    for step in (rollouts(2), unrewarded, rollouts(4)):
        store.save(layout.rollouts(step.step), step)
    table = dataset.dataset([str(layout.rollouts(step)) for step in (2, 3, 4)]).to_table()
    assert table["step"].to_pylist() == [2] * 4 + [3] * 4 + [4] * 4
    assert table["weight_version"].to_pylist() == [1] * 4 + [-1] * 4 + [3] * 4
    assert table["version_spans"].to_pylist()[0] == [
        {"start": 0, "stop": 1, "version": 1},
        {"start": 1, "stop": 3, "version": 2},
    ]


def of_schema_1(path, rewarded):
    """A file as it was written before there were masks, with its columns written out."""
    import pyarrow as pa
    from pyarrow import parquet

    def required(name, of):
        return pa.field(name, of, nullable=False)

    def many(of):
        return pa.list_(required("element", of))

    span = pa.struct([required(name, pa.int64()) for name in ("start", "stop", "version")])
    nan = float("nan")
    columns = {
        "step": (pa.int64(), [7] * 4),
        "item": (pa.int64(), [14, 14, 15, 15]),
        "sample": (pa.int64(), [0, 1, 0, 1]),
        "prompt_token_ids": (many(pa.int32()), [[3, 4], [3, 4], [5], [5]]),
        "prompt_tokens": (pa.int64(), [2, 2, 1, 1]),
        "token_ids": (many(pa.int32()), [[8, 9], [8], [7, 6, 5], [4]]),
        "engine_logprobs": (many(pa.float32()), [[-0.5, nan], [-0.25], [-1.0, -2.0, -3.0], [-0.125]]),
        "missing_logprobs": (pa.int64(), [1, 0, 0, 0]),
        "weight_version": (pa.int64(), [6] * 4),
        "version_spans": (many(span), [[{"start": 0, "stop": 1, "version": 6}]] * 4),
        "finish_reason": (pa.string(), ["stop"] * 4),
        "text": (pa.string(), list("abcd")),
        "reward": (pa.float64(), [1.0, 0.0, 0.5, 0.5] if rewarded else [nan] * 4),
        "advantage": (pa.float32(), [1.0, -1.0, 0.25, -0.25] if rewarded else [nan] * 4),
    }
    about = b'{"schema":"lockstep.rollouts/1","step":7,"group_size":2,"sample_s":1.5,"reward_s":0.25}'
    schema = pa.schema([required(name, of) for name, (of, _) in columns.items()]).with_metadata(
        {b"lockstep": about}
    )
    table = pa.table({name: pa.array(values, of) for name, (of, values) in columns.items()}, schema=schema)
    parquet.write_table(table, path, write_page_checksum=True)


@pytest.mark.parametrize("rewarded", [True, False])
def test_a_file_from_before_there_were_masks_is_read_as_what_it_says(tmp_path, rewarded):
    of_schema_1(tmp_path / "a.parquet", rewarded)
    found = load(tmp_path / "a.parquet")
    assert found.rewarded is rewarded
    assert [(sample.group, sample.sample, sample.item) for sample in found] == [
        (0, 0, 14),
        (0, 1, 14),
        (1, 0, 15),
        (1, 1, 15),
    ]
    assert found.loss_mask.all()
    assert found.lengths.tolist() == [2, 1, 3, 1]
    assert [prompt.tolist() for prompt in found.prompts] == [[3, 4], [3, 4], [5], [5]]
    np.testing.assert_array_equal(
        found.engine_logprobs, np.array([-0.5, np.nan, -0.25, -1, -2, -3, -0.125], np.float32)
    )
    advantages = [1, 1, -1, 0.25, 0.25, 0.25, -0.25] if rewarded else [np.nan] * 7
    np.testing.assert_array_equal(found.advantages, np.array(advantages, np.float32))
    store.save(tmp_path / "b.parquet", found)
    assert_same(load(tmp_path / "b.parquet"), found)


def test_what_is_refused_is_kept_under_a_name_of_its_own_each_time(tmp_path):
    layout = RunLayout(tmp_path)
    kept = []
    for reward in (1.0, 2.0, 3.0):
        store.save(layout.drawn(7), rollouts(reward=reward))
        kept.append(store.refuse(layout, 7))
        assert not layout.drawn(7).exists()
    assert [path.name for path in kept] == [
        "step-000007.parquet",
        "step-000007.2.parquet",
        "step-000007.3.parquet",
    ]
    assert kept == layout.refusals(7)
    assert kept[0] == layout.refused(7)
    assert [load(path).rewards[0] for path in kept] == [1.0, 2.0, 3.0]
    assert not layout.rollouts(7).exists()
    assert layout.refusals(8) == []


def test_what_is_admitted_is_admitted_once(tmp_path):
    layout = RunLayout(tmp_path)
    store.save(layout.drawn(7), rollouts(reward=1.0))
    assert store.admit(layout, 7) == layout.rollouts(7)
    store.save(layout.drawn(7), rollouts(reward=2.0))
    with pytest.raises(RunError, match="admitted before"):
        store.admit(layout, 7)
    assert load(layout.rollouts(7)).rewards[0] == 1.0
    assert load(layout.drawn(7)).rewards[0] == 2.0


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
    for read in (load, read_table):
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
            assert_same(load(path), written)
        except RunError:
            found += 1
    assert found > 5


def test_groups_of_another_size_are_refused(tmp_path):
    store.save(tmp_path / "a.parquet", rollouts())
    with pytest.raises(RunError, match="groups of 4"):
        load(tmp_path / "a.parquet", 4)
