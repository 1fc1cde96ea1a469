"""Rollouts of other frameworks: what they were logged with wrong is named, on a tiny model whose numbers are known."""

import json

import msgspec
import numpy as np
import pytest

from lockstep.config.recipe import parse_overrides
from lockstep.errors import UsageError
from lockstep.parity.hypotheses import candidate_logprobs, candidates_of
from lockstep.parity.logged import judge, read_logged
from lockstep.policy.model import load_policy
from lockstep.policy.packing import Group
from lockstep.records.tokens import SamplingParams

NEUTRAL = {"model": {"path": "m"}, "task": {"name": "t"}, "sampling": {"max_tokens": 1}, "training": {"steps": 1}}


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load_policy(tiny_model_dir, "float32", "float32")


def rows_of(policy, sampling, reported, n=12):
    """Rows as a framework logs them; ``reported`` is the distribution that its engine reports."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(n):
        prompt, ids = rng.integers(0, 97, 4), rng.integers(0, 97, 10)
        group = Group(prompt.astype(np.int32), [ids.astype(np.int32)])
        (values,) = candidate_logprobs(policy, group, sampling, [reported])
        rows.append({"prompt_ids": prompt.tolist(), "completion_ids": ids.tolist(), "logprobs": values.tolist()})
    return rows


def verdicts_of(tmp_path, policy, rows, *sets):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
    recipe = parse_overrides(NEUTRAL, list(sets), "test")
    return judge(read_logged(path, recipe.sampling), policy, recipe)


HOT = SamplingParams(max_tokens=1, temperature=0.7)


def tempered(sampling):
    return next(c for c in candidates_of(sampling) if c.temperature != 1.0 and not c.penalised and not c.truncated)


def raw(sampling):
    return next(c for c in candidates_of(sampling) if c.distribution == "model")


def test_an_honest_log_passes_what_can_be_judged_and_the_rest_is_not_run(tmp_path, policy):
    verdicts = verdicts_of(tmp_path, policy, rows_of(policy, HOT, tempered(HOT)), "sampling.temperature=0.7")
    assert [v.status for v in verdicts] == ["PASS", "NOT_RUN", "NOT_RUN", "PASS", "NOT_RUN"]
    assert verdicts[0].n_tokens == verdicts[3].n_tokens == 120
    assert verdicts[3].figures["gap_abs_p999_nats"] < 1e-5


def test_raw_numbers_at_another_temperature_are_named(tmp_path, policy):
    rows = [row | {"temperature": 0.7} for row in rows_of(policy, HOT, raw(HOT))]
    first, *rest = verdicts_of(tmp_path, policy, rows)
    assert (first.status, first.findings[0].cause) == ("FAIL", "raw_logprobs")
    assert first.findings[0].effect_nats > 0.05
    assert {v.status for v in rest} == {"NOT_RUN"}


def test_numbers_one_token_late_are_named(tmp_path, policy):
    rows = rows_of(policy, HOT, tempered(HOT))
    for row in rows:
        row["logprobs"] = [-0.1, *row["logprobs"][:-1]]
    first = verdicts_of(tmp_path, policy, rows, "sampling.temperature=0.7")[0]
    assert first.findings[0].cause == "shifted_logprobs"
    assert "late" in first.findings[0].evidence


def test_another_models_numbers_are_unexplained(tmp_path, policy):
    rows = rows_of(policy, HOT, tempered(HOT))
    rng = np.random.default_rng(1)
    for row in rows:
        row["logprobs"] = (-3 * rng.random(10)).tolist()
    assert verdicts_of(tmp_path, policy, rows, "sampling.temperature=0.7")[0].findings[0].cause == "unexplained_semantics"


def test_a_truncating_sampler_fails_though_its_numbers_are_whole(tmp_path, policy):
    rows = rows_of(policy, HOT, tempered(HOT))
    first = verdicts_of(tmp_path, policy, rows, "sampling.temperature=0.7", "sampling.top_p=0.9999999")[0]
    assert first.findings[0].cause == "truncation_unmodelled"


@pytest.mark.parametrize("bad", [None, -9999.0])
def test_a_missing_value_is_counted_and_nothing_is_filled_in(tmp_path, policy, bad):
    rows = rows_of(policy, HOT, tempered(HOT))
    rows[3]["logprobs"][2] = bad
    first = verdicts_of(tmp_path, policy, rows, "sampling.temperature=0.7")[0]
    assert first.findings[0].cause == "missing_logprobs"
    assert "1 of 120" in first.findings[0].evidence


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no row"),
        ('{"completion_ids": [1], "logprobs": [-1]}', "prompt_token_ids"),
        ('{"prompt_ids": [1], "completion_ids": [1, 2], "logprobs": [-1]}', "1 log-probabilities in row 1"),
        ("{", "one JSON object a line"),
    ],
)
def test_a_file_that_cannot_be_used_is_usage(tmp_path, content, says):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=says):
        read_logged(path, HOT)
    with pytest.raises(UsageError, match="no such file"):
        read_logged(tmp_path / "absent.parquet", HOT)


def test_lockstep_own_parquet_is_read(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"prompt_token_ids": [[1, 2]], "token_ids": [[3, 4]], "engine_logprobs": [[-1.0, float("nan")]]})
    parquet.write_table(table, tmp_path / "r.parquet")
    (part,) = read_logged(tmp_path / "r.parquet", HOT)
    assert part.groups[0].completions[0].tolist() == [3, 4]
    assert np.isnan(part.logprobs).tolist() == [False, True]
    assert json.loads(msgspec.json.encode(part.sampling))["temperature"] == 0.7
