"""Logs with tokens that were not sampled, or right numbers for some alone: told, named, or left out."""

import numpy as np
import pytest
from msgspec.structs import replace

from lockstep.errors import UsageError
from lockstep.parity.pair import draw
from lockstep.parity.probes import probe_prompts
from tests.faults.conftest import SHARP, T, named, verdicts_of

FIRST, TOOL, EOS = 8, 6, 1
ROWS = 11
"""One of twelve prompts is too long for a second turn, another begins with the id that pads."""
PASSED = ["PASS", "NOT_RUN", "NOT_RUN", "PASS", "NOT_RUN"]


@pytest.fixture(scope="module")
def turns(session, recipe, log):
    """Rows of two turns, and between them a tool's output that the second was drawn after.

    0.0 beside the tool's tokens.
    """
    session.pair.recipe = replace(recipe)
    rows = [row for row in log() if len(row["prompt_ids"]) < 64]
    random = np.random.default_rng(1)
    assert len(rows) == ROWS
    for row in rows:
        del row["completion_ids"][FIRST:], row["logprobs"][FIRST:]
        row["completion_ids"] += random.integers(3, 97, TOOL).tolist()
        row["logprobs"] += [0.0] * TOOL
    prompts = [np.array(row["prompt_ids"] + row["completion_ids"], np.int32) for row in rows]
    for row, drawn in zip(rows, draw(session.pair, prompts, SHARP, 7), strict=True):
        row["completion_ids"] += drawn.token_ids.tolist()
        row["logprobs"] += drawn.engine_logprobs.tolist()
    return rows


def with_mask(rows, name, kind, inside, prompt=None):
    """1 for what was sampled, or (``inside``) for what was not.

    Over prompt and completion where ``prompt`` is its value.
    """
    found = []
    for row in rows:
        n = len(row["completion_ids"])
        mask = [kind(inside if FIRST <= at < FIRST + TOOL else 1 - inside) for at in range(n)]
        found.append(row | {name: mask if prompt is None else [kind(prompt)] * len(row["prompt_ids"]) + mask})
    return found


def test_a_tools_output_without_a_mask_is_named(tmp_path, pair, turns):
    verdicts = verdicts_of(tmp_path, pair, turns, T)
    assert named(verdicts) == ("semantics", "tokens_not_sampled")
    evidence = verdicts[0].findings[0].evidence
    assert "66 of 330 tokens in 11 of 11 completions carry the number 0" in evidence
    assert "runs of up to 6" in evidence


@pytest.mark.parametrize(
    ("name", "kind", "prompt"),
    [
        ("response_mask", int, None),
        ("completion_mask", bool, None),
        ("loss_mask", float, 0),
        ("action_mask", int, None),
    ],
)
def test_a_mask_leaves_a_tools_output_out_and_in_the_context(tmp_path, pair, turns, name, kind, prompt):
    verdicts = verdicts_of(tmp_path, pair, with_mask(turns, name, kind, 0, prompt), T)
    assert [v.status for v in verdicts] == PASSED
    assert verdicts[3].figures["gap_abs_max_nats"] < 1e-4
    assert verdicts[0].n_tokens == verdicts[3].n_tokens == ROWS * (FIRST + 16)
    assert f"66 tokens left out by {name}" in verdicts[0].summary


def test_numbers_that_are_missing_where_nothing_was_sampled_are_not_missed(tmp_path, pair, turns):
    rows = with_mask(turns, "response_mask", int, 0)
    rows = [row | {"logprobs": [x or None for x in row["logprobs"]]} for row in rows]
    assert [v.status for v in verdicts_of(tmp_path, pair, rows, T)] == PASSED


@pytest.mark.parametrize("inside", [0, 1])
def test_a_tool_mask_is_read_the_way_the_numbers_say(tmp_path, pair, turns, inside):
    verdicts = verdicts_of(tmp_path, pair, with_mask(turns, "tool_mask", int, inside), T)
    assert [v.status for v in verdicts] == PASSED
    assert "66 tokens left out by tool_mask" in verdicts[0].summary
    assert ("read as 1 for what was not sampled" in verdicts[0].summary) == bool(inside)


def test_a_mask_that_says_the_reverse_is_named(tmp_path, pair, turns):
    verdicts = verdicts_of(tmp_path, pair, with_mask(turns, "response_mask", int, 1), T)
    assert named(verdicts) == ("semantics", "mask_contradicted")
    assert "1 beside 66 numbers of 0.0 or none in 66" in verdicts[0].findings[0].evidence


def test_a_mask_that_leaves_nothing_is_usage(tmp_path, pair, log):
    rows = [row | {"response_mask": [0] * 16} for row in log()]
    with pytest.raises(UsageError, match="masks and pads that leave no token"):
        verdicts_of(tmp_path, pair, rows, T)


def padded(rows, number, left=112, right=24):
    found = []
    for row in rows:
        ids = row["completion_ids"]
        n = len(row["completion_ids"])
        prompt = [EOS] * (left - len(row["prompt_ids"])) + row["prompt_ids"]
        pads = {
            "responses": ids + [EOS] * (right - n),
            "rollout_log_probs": row["logprobs"] + [number] * (right - n),
        }
        real = [0] * (left - len(row["prompt_ids"])) + [1] * (len(row["prompt_ids"]) + n) + [0] * (right - n)
        found.append(
            {"prompts": prompt, **pads, "input_ids": prompt + pads["responses"], "attention_mask": real}
        )
    return found


def lengths_differ(rows):
    return [
        {
            "prompt_ids": row["prompt_ids"],
            **{name: row[name][: 16 - at] for name in ("completion_ids", "logprobs")},
        }
        for at, row in enumerate(row for row in rows if row["prompt_ids"][0] != EOS)
    ]


@pytest.mark.parametrize("number", [0.0, -1.0, None])
def test_pads_without_a_mask_are_taken_away(tmp_path, pair, log, number):
    rows = padded(lengths_differ(log()), number)
    verdicts = verdicts_of(
        tmp_path, pair, [{k: v for k, v in row.items() if k != "attention_mask"} for row in rows], T
    )
    assert [v.status for v in verdicts] == PASSED
    n = sum(16 - at for at in range(ROWS))
    assert verdicts[3].n_tokens == n
    assert f"{ROWS * 24 - n:,} pads (id 1, " in verdicts[0].summary
    n_prompts = sum(len(row["prompt_ids"]) for row in lengths_differ(log()))
    assert (
        f"{ROWS * 112 - n_prompts:,} pads (id 1) taken from the beginnings of 11 prompts"
        in verdicts[0].summary
    )


@pytest.mark.parametrize("column", ["prompts", "input_ids"])
def test_pads_with_an_attention_mask_are_taken_away(tmp_path, pair, log, column):
    other = {"prompts": "input_ids", "input_ids": "prompts"}[column]
    rows = [{k: v for k, v in row.items() if k != other} for row in padded(lengths_differ(log()), 0.0)]
    verdicts = verdicts_of(tmp_path, pair, rows, T)
    assert [v.status for v in verdicts] == PASSED
    assert verdicts[3].n_tokens == sum(16 - at for at in range(ROWS))


def test_an_id_that_pads_and_was_seen_is_part_of_the_prompt(tmp_path, session, recipe, pair):
    prompts = [
        np.r_[[EOS] * (64 - len(p)), p].astype(np.int32) for p in probe_prompts(pair, 12, 0) if len(p) < 64
    ]
    rows = [
        {
            "prompt_ids": drawn.prompt_ids.tolist(),
            "completion_ids": drawn.token_ids.tolist(),
            "logprobs": drawn.engine_logprobs.tolist(),
        }
        for drawn in draw(pair, prompts, SHARP, 0)
    ]
    verdicts = verdicts_of(tmp_path, pair, rows, T)
    assert [v.status for v in verdicts] == PASSED
    assert "pads" not in verdicts[0].summary


@pytest.mark.parametrize(
    ("at", "says"), [(-1, "the last number of 12 of 12"), (0, "the first number of 12 of 12")]
)
@pytest.mark.parametrize("number", [0.0, -100.0])
def test_a_placeholder_is_named_with_its_place(tmp_path, pair, log, at, says, number):
    rows = log()
    for row in rows:
        row["logprobs"][at] = number
    verdicts = verdicts_of(tmp_path, pair, rows, T)
    assert named(verdicts) == ("semantics", "placeholder_numbers")
    assert says in verdicts[0].findings[0].evidence


def test_one_placeholder_in_a_row_that_no_hypothesis_is_tried_on_is_named(tmp_path, pair, log):
    rows = log() * 4
    rows[45]["logprobs"] = [*rows[45]["logprobs"][:5], 0.0, *rows[45]["logprobs"][6:]]
    assert named(verdicts_of(tmp_path, pair, rows, T)) == ("semantics", "placeholder_numbers")


def test_numbers_of_another_request_in_some_rows_are_named(tmp_path, session, recipe, pair, log):
    rows = log() * 3
    other = draw(pair, probe_prompts(pair, 2, 99), SHARP, 5)[1]
    rows[34] = rows[34] | {"logprobs": other.engine_logprobs.tolist()}
    verdicts = verdicts_of(tmp_path, pair, rows, T)
    assert named(verdicts) == ("semantics", "foreign_logprobs")
    assert "the numbers of 1 of 36 completions" in verdicts[0].findings[0].evidence
    assert "cache" not in verdicts[0].findings[0].fix


def test_numbers_of_two_rows_that_changed_places_are_swapped(tmp_path, pair, log):
    rows = log()
    rows[3]["logprobs"], rows[7]["logprobs"] = rows[7]["logprobs"], rows[3]["logprobs"]
    assert named(verdicts_of(tmp_path, pair, rows, T)) == ("semantics", "rows_swapped")


def test_greedy_is_claimed_of_what_was_drawn_at_one(tmp_path, pair, log):
    rows = [row | {"temperature": 0.0} for row in log(replace(SHARP, temperature=1.0))]
    verdicts = verdicts_of(tmp_path, pair, rows)
    assert named(verdicts) == ("semantics", "temperature_altered")
    assert "temperature of about 1" in verdicts[0].findings[0].evidence


@pytest.mark.parametrize("asked", [{}, {"top_p": 0.9}])
def test_greedy_rows_pass_whatever_they_were_not_cut_by(tmp_path, pair, log, asked):
    rows = [row | {"temperature": 0.0} | asked for row in log(replace(SHARP, temperature=0.0))]
    verdicts = verdicts_of(tmp_path, pair, rows)
    assert [v.status for v in verdicts] == PASSED


@pytest.mark.parametrize(("move", "first"), [(1, 41), (-1, 40), (-2, 80)])
def test_ids_of_another_vocabulary_are_moved_back(tmp_path, pair, log, move, first):
    """A token left out (or added) in the middle: ids above it are one less (or more) than the model's."""
    taken = range(97 - move, 97) if move > 0 else range(first + move, first)
    rows = [
        row
        for row in log(replace(SHARP, temperature=1.0))
        if not {*row["prompt_ids"], *row["completion_ids"]} & {*taken}
    ]
    assert len(rows) > 4
    for row in rows:
        for column in ("prompt_ids", "completion_ids"):
            row[column] = [max(token + move, 0) if token >= first else token for token in row[column]]
    verdicts = verdicts_of(tmp_path, pair, rows)
    assert named(verdicts) == ("semantics", "vocabulary_shifted")
    assert f"read as {abs(move)} {'less' if move > 0 else 'more'}" in verdicts[0].findings[0].evidence


def test_of_a_long_file_so_many_rows_are_measured_and_said(tmp_path, pair, log):
    verdicts = verdicts_of(tmp_path, pair, log(), T, most_rows=4)
    assert [v.status for v in verdicts] == PASSED
    assert verdicts[3].n_tokens == 4 * 16
    assert "measured on 4 of 12 completions" in verdicts[0].summary
    assert "4 of 12 completions" in verdicts[3].summary


def test_more_tokens_than_the_model_has_positions_are_usage(tmp_path, pair, log):
    rows = log()
    rows[5]["prompt_ids"] *= 200
    with pytest.raises(
        UsageError,
        match=r"row 6: got [\d,]+ tokens of prompt and completion, expected at most the model's 512",
    ):
        verdicts_of(tmp_path, pair, rows, T)


def test_an_id_of_a_prompt_that_the_model_does_not_have_is_told_as_one(tmp_path, pair, log):
    rows = log()
    rows[5]["prompt_ids"][1] = 500
    with pytest.raises(
        UsageError, match="row 6, prompt: got id 500 at place 1, expected ids below the model's 97"
    ):
        verdicts_of(tmp_path, pair, rows, T)
