"""Files of logged rollouts: what they hold is read into flat arrays.

What cannot be used is one error that names where.
"""

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lockstep.errors import UsageError
from lockstep.logged.columns import LARGEST_ID
from lockstep.logged.file import read_logged
from lockstep.records.tokens import SamplingParams

SHARP = SamplingParams(max_tokens=16, temperature=0.25)
GOOD = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "logprobs": [-0.5, -1.0]}


def read(tmp_path, *rows):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_logged(path, SHARP)


def read_parquet(tmp_path, **columns):
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    return read_logged(tmp_path / "x.parquet", SHARP)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no row"),
        ('{"completion_ids": [1], "logprobs": [-1]}', "prompt_token_ids"),
        (
            '{"prompt_ids": [1], "completion_ids": [1, 2], "logprobs": [-1]}',
            "row 1, column logprobs: got 1 log-probabilities, expected one for each of 2",
        ),
        (
            '{"prompt_ids": [], "completion_ids": [1], "logprobs": [-1]}',
            "row 1, column prompt_ids: got no prompt",
        ),
        (
            '{"prompt_ids": "What is 1 + 1?", "completion_ids": [1], "logprobs": [-1]}',
            "got str 'What is 1 [+] 1[?]'",
        ),
        ('{"prompt_ids": [1], "completion_ids": [1], "logprobs": ["-1"]}', "row 1"),
        ('{"prompt_ids": [1], "completion_ids": [1], "logprobs": [-1], "top_p": 1.5}', "<= 1"),
        ('{"prompt_ids": [1], "completion_ids": [], "logprobs": []}', "no token"),
        ("{", "one JSON object a line"),
    ],
)
def test_a_file_that_cannot_be_used_is_usage(tmp_path, content, says):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=says):
        read_logged(path, SHARP)
    with pytest.raises(UsageError, match="no such file"):
        read_logged(tmp_path / "absent.parquet", SHARP)


def test_vllms_word_for_no_top_k_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt_ids": [1], "completion_ids": [1], "logprobs": [-1], "top_k": -1}')
    (sampling,) = read_logged(path, SHARP).samplings
    assert not sampling.truncates


def test_lockstep_own_parquet_is_read(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(
        {"prompt_token_ids": [[1, 2]], "token_ids": [[3, 4]], "engine_logprobs": [[-1.0, float("nan")]]}
    )
    parquet.write_table(table, tmp_path / "r.parquet")
    logged = read_logged(tmp_path / "r.parquet", SHARP)
    assert (logged.prompt(0).tolist(), logged.completion(0).tolist()) == ([1, 2], [3, 4])
    assert np.isnan(logged.logprobs).tolist() == [False, True]
    assert [sampling.temperature for sampling in logged.samplings] == [0.25]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("[1, 2]", "row 2: got an array, expected a JSON object"),
        ("7", "row 2: got int 7, expected a JSON object"),
        ("null", "row 2: got NoneType None, expected a JSON object"),
        (
            GOOD | {"prompt_ids": [1, 2**31]},
            "row 2, column prompt_ids: got 2147483648 at place 1, expected a list of ids",
        ),
        (
            GOOD | {"completion_ids": [3, -5]},
            "row 2, column completion_ids: got -5 at place 1, expected a list of ids",
        ),
        (GOOD | {"completion_ids": [3, 2**80]}, "row 2, column completion_ids: got 12089258196146"),
        (GOOD | {"completion_ids": [3, 4.0]}, "row 2, column completion_ids: got 4.0 at place 1"),
        (GOOD | {"completion_ids": [3, None]}, "row 2, column completion_ids: got None at place 1"),
        (GOOD | {"completion_ids": [3, [4]]}, "row 2, column completion_ids: got an array at place 1"),
        (GOOD | {"completion_ids": [3, True]}, "row 2, column completion_ids: got True at place 1"),
        (GOOD | {"logprobs": [-0.5, False]}, "row 2, column logprobs: got False at place 1"),
        (GOOD | {"completion_ids": {"3": 4}}, "row 2, column completion_ids: got dict"),
        (GOOD | {"logprobs": [-0.5, {}]}, "row 2, column logprobs: got an object at place 1"),
        (GOOD | {"logprobs": None}, "row 2, column logprobs: got nothing"),
        (GOOD | {"logprobs": [-0.5, 10**400]}, "row 2, column logprobs: got 10000"),
        (GOOD | {"temperature": [1.0]}, "row 2, column temperature: got an array, expected a number"),
        (GOOD | {"temperature": True}, "row 2, column temperature: got Expected `float`, got `bool`"),
        (GOOD | {"top_k": 2**70}, "row 2, column top_k: got 11805"),
        ("[" * 100_000, "row 2: got values nested too deep"),
        ('{"prompt_ids": ' + "[" * 100_000, "row 2: got values nested too deep"),
        ('{"prompt_ids": NaN, "x": ' + "[" * 100_000, "row 2: got values nested too deep"),
        ('{"prompt_ids": [1], "completion_ids": [1], "logprobs": [nan]}', "row 2: got JSON is malformed"),
        ("\x00\x01", "row 2: got JSON is malformed"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_column(tmp_path, row, says):
    with pytest.raises(UsageError) as raised:
        read(tmp_path, GOOD, row)
    assert says in str(raised.value)
    assert raised.value.hint


def test_a_directory_is_called_one(tmp_path):
    (tmp_path / "rollouts.parquet").mkdir()
    with pytest.raises(UsageError, match=r"got a directory, expected a \.parquet or \.jsonl file"):
        read_logged(tmp_path / "rollouts.parquet", SHARP)


def test_json_that_is_not_quite_json_is_counted_as_missing(tmp_path):
    logged = read(
        tmp_path,
        '{"prompt_ids": [1], "completion_ids": [1, 2, 3, 4], "logprobs": [NaN, -Infinity, Infinity, -0.5]}',
        GOOD,
    )
    assert np.isnan(logged.logprobs).tolist() == [True, True, True, False, False, False]
    assert logged.logprobs[3:].tolist() == [-0.5, -0.5, -1.0]
    assert logged.numbers.tolist() == [1, 2]


def test_rows_lie_flat_and_blank_lines_are_counted(tmp_path):
    logged = read(
        tmp_path, GOOD, "", GOOD | {"completion_ids": [], "logprobs": []}, GOOD | {"prompt_ids": [LARGEST_ID]}
    )
    assert (logged.prompt_ids.tolist(), logged.prompt_spans.tolist()) == (
        [1, 2, LARGEST_ID],
        [[0, 2], [2, 3]],
    )
    assert (logged.token_ids.dtype, logged.logprobs.dtype) == (np.int32, np.float32)
    assert logged.numbers.tolist() == [1, 4]
    assert logged.notes == ["1 rows without a completion left out"]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda value: pa.list_(value, 2)])
def test_parquet_lists_of_every_kind_are_read_alike(tmp_path, kind):
    logged = read_parquet(
        tmp_path,
        prompts=pa.array([[1, 2], [5, 6]], kind(pa.int64())),
        responses=pa.array([[3, 4], [7, 8]], kind(pa.uint16())),
        rollout_log_probs=pa.array([[-0.5, None], [-1.0, float("-inf")]], kind(pa.float32())),
        response_mask=pa.array([[True, False], [True, True]], kind(pa.bool_())),
        temperature=pa.array([0.5, None]),
    )
    assert (logged.prompt(1).tolist(), logged.completion(1).tolist()) == ([5, 6], [7, 8])
    assert np.array_equal(logged.logprobs, np.float32([-0.5, np.nan, -1.0, np.nan]), equal_nan=True)
    assert logged.masks["response_mask"].tolist() == [True, False, True, True]
    assert [logged.samplings[setting].temperature for setting in logged.settings] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"token_ids": [["a"]]}, "column token_ids: got values of type list<"),
        ({"token_ids": [["a"]]}, "expected a list of numbers"),
        ({"token_ids": [[3, None]]}, "row 1, column token_ids: got np.float64(nan) at place 1"),
        ({"token_ids": [[-1, 4]]}, "row 1, column token_ids: got"),
        ({"token_ids": pa.array([None], pa.list_(pa.int32()))}, "row 1, column token_ids: got nothing"),
        ({"temperature": ["hot"]}, "column temperature: got values of type string, expected a number"),
    ],
)
def test_parquet_columns_that_cannot_be_used_are_named(tmp_path, columns, says):
    whole = {"prompt_ids": [[1, 2]], "token_ids": [[3, 4]], "logprobs": [[-0.5, -1.0]]} | columns
    with pytest.raises(UsageError) as raised:
        read_parquet(tmp_path, **whole)
    assert says in str(raised.value)


def test_a_null_is_told_of_its_own_row(tmp_path):
    """One in a list of integers makes floats of the whole column."""
    rows = {
        "prompt_ids": [[1, 2]] * 3,
        "token_ids": [[3, 4], [5, None], [6, 7]],
        "logprobs": [[-0.5, -1.0]] * 3,
    }
    with pytest.raises(UsageError, match=r"row 2, column token_ids: got np.float64\(nan\) at place 1"):
        read_parquet(tmp_path, **rows)
    logged = read_parquet(tmp_path, **rows | {"token_ids": [[3, 4]] * 3, "logprobs": [[-0.5, None]] * 3})
    assert np.isnan(logged.logprobs).tolist() == [False, True] * 3


def test_a_row_of_billions_of_values_in_a_few_bytes_is_refused_before_it_is_read(tmp_path):
    n = (1 << 20) + 1
    zeros = pa.array([np.zeros(n, np.int8)])
    with pytest.raises(UsageError, match="rows of 1,048,577 values"):
        read_parquet(tmp_path, prompt_ids=[[1]], token_ids=zeros, logprobs=zeros)


@pytest.mark.parametrize(
    ("name", "says"),
    [("a" * 300, "File name too long"), ("a\0b", "no such file"), ("x.jsonl.gz", "a file packed by gzip")],
)
def test_a_path_that_is_none_and_a_packed_file_are_usage(tmp_path, name, says):
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    with pytest.raises(UsageError, match=says) as raised:
        read_logged(tmp_path / name, SHARP)
    assert raised.value.hint


@pytest.mark.parametrize("mask", [[0, 1], [False, True], [0.0, 1.0], [1, 1, 0, 1]])
def test_a_mask_is_read_in_every_form(tmp_path, mask):
    logged = read(tmp_path, GOOD | {"loss_mask": mask})
    assert logged.masks["loss_mask"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("mask", "says"),
    [([1], "got 1 values"), ([1, 2], "got 2 at place 1"), ([1, None], "got None at place 1")],
)
def test_a_mask_that_cannot_be_used_is_named(tmp_path, mask, says):
    with pytest.raises(UsageError, match=f"row 1, column tool_mask: {says}"):
        read(tmp_path, GOOD | {"tool_mask": mask})


def test_an_attention_mask_takes_pads_away(tmp_path):
    row = {
        "prompts": [9, 9, 1, 2],
        "responses": [3, 4, 9],
        "logprobs": [-0.5, -1.0, 0.0],
        "attention_mask": [0, 0, 1, 1, 1, 1, 0],
    }
    logged = read(tmp_path, row)
    assert (logged.prompt(0).tolist(), logged.completion(0).tolist()) == ([1, 2], [3, 4])
    assert logged.notes == ["3 pads taken away as the attention mask says"]
    with pytest.raises(UsageError, match="got 0 between 1s, at place 3"):
        read(
            tmp_path,
            row
            | {"attention_mask": [0, 0, 1, 0, 1, 1, 0]}
            | {"prompts": [9, 9, 1, 2, 5], "responses": [3, 4], "logprobs": [-1, -1]},
        )


def test_input_ids_that_hold_the_completion_too_are_read_as_such(tmp_path):
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "responses": [3, 4, 5, 6], "logprobs": [-1.0] * 4}
    logged = read(tmp_path, row, row)
    assert [logged.prompt(at).tolist() for at in (0, 1)] == [[1, 2], [1, 2]]
    assert logged.notes == ["input_ids read as prompt and completion together"]
    with pytest.raises(UsageError, match="row 2, column input_ids"):
        read(tmp_path, row, row | {"input_ids": [1, 2]})
