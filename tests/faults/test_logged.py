"""Rollouts of other frameworks: what they were logged with wrong is named.

Drawn by the transformers engine from a tiny model.
"""

from contextlib import ExitStack

import numpy as np
import pytest
from msgspec.structs import replace

from lockstep.errors import UsageError
from lockstep.faults import trainer as planted_trainer
from lockstep.parity.explain.semantics.transforms import BASES
from lockstep.policy.parameters import named_weights
from lockstep.policy.variants import InDtype
from lockstep.records.samples import Group
from tests.faults.conftest import SHARP, T, named, verdicts_of


@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_an_honest_log_passes_what_can_be_judged_and_the_rest_is_not_run(tmp_path, pair, log, temperature):
    rows = log(replace(SHARP, temperature=temperature))
    verdicts = verdicts_of(tmp_path, pair, rows, f"sampling.temperature={temperature}")
    assert [v.status for v in verdicts] == ["PASS", "NOT_RUN", "NOT_RUN", "PASS", "NOT_RUN"]
    assert verdicts[0].n_tokens == verdicts[3].n_tokens == 12 * 16
    assert verdicts[3].figures["gap_abs_p999_nats"] < 1e-4


def numbers(rows, edit):
    return [row | {"logprobs": np.asarray(edit(np.array(row["logprobs"]))).tolist()} for row in rows]


def prompts(rows, edit):
    return [row | {"prompt_ids": edit(row["prompt_ids"])} for row in rows]


def swapped(rows, *columns):
    return [row | {column: rows[i ^ 1][column] for column in columns} for i, row in enumerate(rows)]


def rescored(pair, rows, temperature):
    for row in rows:
        group = [np.asarray(row["completion_ids"], np.int32)]
        (scores,) = pair.trainer.score([Group(np.asarray(row["prompt_ids"], np.int32), group)], temperature)
        row["logprobs"] = scores.tolist()
    return rows


def edited(rows, at):
    for row in rows:
        row["completion_ids"][at] = (row["completion_ids"][at] + 40) % 97
    return rows


@pytest.mark.parametrize(
    ("cause", "edit"),
    [
        ("shifted_logprobs", lambda rows: numbers(rows, lambda x: np.r_[-0.1, x[:-1]])),
        ("shifted_logprobs", lambda rows: numbers(rows, lambda x: np.r_[x[1:], -0.1])),
        ("logprobs_transformed", lambda rows: numbers(rows, lambda x: x * BASES["log10"])),
        ("logprobs_transformed", lambda rows: numbers(rows, np.cumsum)),
        ("rows_swapped", lambda rows: swapped(rows, "completion_ids", "logprobs")),
        ("rows_swapped", lambda rows: swapped(rows, "logprobs")),
        ("tokens_edited", lambda rows: edited(rows, 3)),
        ("prompt_edited", lambda rows: prompts(rows, lambda ids: [*ids, 5])),
        ("prompt_edited", lambda rows: prompts(rows, lambda ids: [5, 6, *ids])),
        ("unexplained_semantics", lambda rows: prompts(rows, lambda ids: ids[2:])),
        ("bos_doubled", lambda rows: prompts(rows, lambda ids: [0, 0, *ids[1:]])),
        (
            "unexplained_semantics",
            lambda rows: numbers(rows, lambda x: -3 * np.random.default_rng(len(x)).random(len(x))),
        ),
    ],
)
def test_what_was_logged_wrong_is_named(tmp_path, pair, log, cause, edit):
    assert named(verdicts_of(tmp_path, pair, edit(log()), T)) == ("semantics", cause)


@pytest.mark.parametrize("off", [-20.0, 9.0])
def test_one_number_that_nothing_explains_gets_no_cause_and_its_row_is_told(tmp_path, pair, log, off):
    rows = log()
    rows[7]["logprobs"][4] += off
    verdicts = verdicts_of(tmp_path, pair, rows, T, "parity.search_s=5")
    assert named(verdicts) == ("numerics", "unexplained_numerics")
    assert "lies in 1 of 12 completions, in the file's row 8" in verdicts[3].findings[0].evidence


@pytest.mark.parametrize(
    ("cause", "drawn"),
    [
        ("hidden_truncation", {"top_k": 10}),
        ("hidden_truncation", {"top_p": 0.7}),
        ("temperature_altered", {"temperature": 0.4}),
        ("hidden_penalties", {"repetition_penalty": 1.5}),
        ("hidden_logit_bias", {"logit_bias": {7: 1.5, 12: -100.0}}),
    ],
)
def test_settings_that_the_log_does_not_tell_are_fitted(tmp_path, pair, log, cause, drawn):
    assert named(verdicts_of(tmp_path, pair, log(replace(SHARP, **drawn)), T)) == ("semantics", cause)


def test_numbers_and_draws_of_another_temperature_than_the_log_says_are_named(tmp_path, pair, log):
    rows = [row | {"temperature": 0.5} for row in log(replace(SHARP, temperature=1.0))]
    assert named(verdicts_of(tmp_path, pair, rows)) == ("semantics", "temperature_altered")


def test_raw_numbers_of_draws_at_another_temperature_are_named(tmp_path, pair, log):
    rows = rescored(pair, log(), 1.0)
    assert named(verdicts_of(tmp_path, pair, rows, T)) == ("semantics", "raw_logprobs")


def test_draws_that_are_truncated_behind_whole_numbers_are_noticed(tmp_path, pair, log):
    rows = rescored(pair, log(replace(SHARP, temperature=1.0, top_k=3)), 1.0)
    assert named(verdicts_of(tmp_path, pair, rows)) == ("semantics", "draws_differ")


@pytest.mark.parametrize("plant", [planted_trainer.other_rotary_base, planted_trainer.other_norm_epsilon])
def test_another_model_configuration_is_numerics(tmp_path, pair, log, plant):
    rows = log()
    with plant(pair):
        assert named(verdicts_of(tmp_path, pair, rows, T)) == ("numerics", "model_config_differs")


def test_another_checkpoint_is_numerics_where_one_scale_explains_it(tmp_path, pair, log):
    rows = log()
    tensor = named_weights(pair.trainer._policy.model)["model.layers.1.mlp.down_proj.weight"]
    with ExitStack() as stack:
        tensor.data.mul_(1.1)
        stack.callback(tensor.data.div_, 1.1)
        assert named(verdicts_of(tmp_path, pair, rows, T)) == ("numerics", "tensor_scaled")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_nobody_said_an_engine_computes_in_is_unknown_and_a_narrower_body_is_named(
    tmp_path, pair, log, dtype
):
    rows = log()
    with pair.trainer.holding(InDtype(dtype, "float32")):
        rescored(pair, rows, SHARP.temperature)
    verdicts = verdicts_of(tmp_path, pair, rows, T)
    assert named(verdicts) == ("numerics", "body_precision")
    (found,) = verdicts[3].findings
    assert "the engine does not say what it computes in" in found.evidence
    assert found.fix.startswith("say what it ran in: --set engine.dtype=")
    said = verdicts_of(tmp_path, pair, rows, T, f"engine.dtype={dtype}")
    assert [v.status for v in said] == ["PASS", "NOT_RUN", "NOT_RUN", "PASS", "NOT_RUN"]


def test_corrupted_completions_are_shown(tmp_path, pair, log):
    rows = log()
    rows[4]["completion_ids"][8:] = np.random.default_rng(0).integers(0, 97, 8).tolist()
    rows[4]["logprobs"][8:] = [12.0 - 12.05] * 8
    verdicts = verdicts_of(tmp_path, pair, rows, T)
    assert named(verdicts) == ("path", "corrupted_completions")


def test_a_truncating_sampler_fails_though_its_numbers_are_whole(tmp_path, pair, log):
    first = verdicts_of(tmp_path, pair, log(), T, "sampling.top_p=0.9999999")[0]
    assert first.findings[0].cause == "truncation_unmodelled"


@pytest.mark.parametrize("bad", [None, -9999.0])
def test_a_missing_value_is_counted_and_nothing_is_filled_in(tmp_path, pair, log, bad):
    rows = log()
    rows[3]["logprobs"][2] = bad
    first = verdicts_of(tmp_path, pair, rows, T)[0]
    assert first.findings[0].cause == "missing_logprobs"
    assert "1 of 192" in first.findings[0].evidence


def test_ids_of_another_vocabulary_are_usage(tmp_path, pair, log):
    rows = log()
    rows[2]["completion_ids"][0] = 97
    with pytest.raises(UsageError, match="row 3, completion: got id 97 at place 0"):
        verdicts_of(tmp_path, pair, rows, T)
