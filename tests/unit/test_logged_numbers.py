"""Numbers of a log that are none of their tokens, on constructed logs.

What each is called, and what is left alone.
"""

from pathlib import Path

import numpy as np
import pytest

from lockstep.logged.numbers import (
    Gaps,
    corrupted,
    foreign,
    not_greedy,
    of_all,
    of_few,
    placeholders,
    some_rows,
)
from lockstep.logged.rows import Collected
from lockstep.parity.tolerances import NOISE
from lockstep.records.samples import Samples
from lockstep.records.tokens import CLAMPED_LOGPROB, SamplingParams
from tests.unit.bag_pair import bag_pair

FP32 = NOISE["torch.float32"]
ROWS, TOKENS = 12, 10
SAMPLING = SamplingParams(max_tokens=TOKENS)


@pytest.fixture(scope="module")
def pair():
    return bag_pair()


@pytest.fixture(scope="module")
def rollouts(pair):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 48, n).astype(np.int32) for n in range(4, 4 + ROWS)]
    params = [SamplingParams(max_tokens=TOKENS, seed=row) for row in range(ROWS)]
    return Samples.of(prompts, pair.engine.sample(prompts, params), SAMPLING)


def logged_of(rollouts, numbers=None, tokens=None, sampled=None):
    """A log of the rollouts, by row: its numbers, its tokens, which of them the model drew."""
    collected = Collected([])
    for row, sample in enumerate(rollouts):
        ids = sample.token_ids if tokens is None else tokens[row]
        said = sample.engine_logprobs if numbers is None else numbers[row]
        collected.add(
            row + 1, sample.prompt_ids, ids, said.astype(np.float64), {}, 0, (slice(None), slice(None))
        )
    logged = collected.done(Path("x.jsonl"), [SAMPLING], padded=False)
    if sampled is not None:
        logged.sampled = np.concatenate(sampled)
    return logged


def gaps_of(pair, logged):
    rows = logged.usable()
    return of_all(logged, rows, np.concatenate(list(logged.gaps(pair.trainer, rows, 1.0))))


def numbers_of(rollouts):
    return [sample.engine_logprobs.copy() for sample in rollouts]


# ── the file in memory ──────────────────────────────────────────────────────────────────────────────────────


def test_a_log_that_is_right_has_no_gap_and_nothing_is_said_of_it(pair, rollouts):
    logged = logged_of(rollouts)
    gaps = gaps_of(pair, logged)
    assert np.abs(gaps.gap).max() < 1e-5
    np.testing.assert_allclose(gaps.trainer, np.concatenate([s.engine_logprobs for s in rollouts]), atol=1e-5)
    assert placeholders(gaps, FP32) is None
    assert some_rows(pair, logged, logged.usable(), gaps) is None
    assert corrupted(pair, logged, logged.usable(), gaps) is None
    few = of_few(rollouts, rollouts.scored(pair.trainer))
    np.testing.assert_allclose(few.gap, gaps.gap, atol=1e-6)
    np.testing.assert_array_equal(few.places, gaps.places)


def test_tokens_that_the_model_did_not_sample_are_read_and_not_judged(pair, rollouts):
    sampled = [np.ones(TOKENS, bool) for _ in rollouts]
    sampled[2][3:6] = False
    sampled[5][:] = False
    numbers = numbers_of(rollouts)
    numbers[2][3:6], numbers[5][:] = np.nan, np.nan
    logged = logged_of(rollouts, numbers, sampled=sampled)
    np.testing.assert_array_equal(logged.usable(), np.delete(np.arange(ROWS), 5))
    gaps = gaps_of(pair, logged)
    assert gaps.gap.size == (ROWS - 1) * TOKENS - 3
    assert np.abs(gaps.gap).max() < 1e-5, "what follows a tool's tokens was drawn after them"
    of_third = gaps.owners == 2
    np.testing.assert_array_equal(gaps.places[of_third], [0, 1, 2, 6, 7, 8, 9])
    assert gaps.lengths[2] == TOKENS


def test_a_turn_is_what_was_sampled_on_end_after_all_that_stands_before_it(rollouts):
    sampled = [np.ones(TOKENS, bool) for _ in rollouts]
    sampled[1][:2], sampled[1][6] = False, False
    logged = logged_of(rollouts, sampled=sampled)
    turns = logged.turns(np.array([1, 4]), 8)
    first, second = turns
    np.testing.assert_array_equal(first.prompt_ids, np.r_[rollouts[1].prompt_ids, rollouts[1].token_ids[:2]])
    np.testing.assert_array_equal(first.token_ids, rollouts[1].token_ids[2:6])
    np.testing.assert_array_equal(first.engine_logprobs, rollouts[1].engine_logprobs[2:6])
    np.testing.assert_array_equal(second.token_ids, rollouts[4].token_ids[:8])
    assert [turn.item for turn in turns] == [2, 5], "where they stand in the file"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, CLAMPED_LOGPROB, -1e300])
def test_what_stands_for_a_missing_number_is_one_thing(rollouts, value):
    numbers = [row.astype(np.float64) for row in numbers_of(rollouts)]
    numbers[0][4] = value
    logged = logged_of(rollouts, numbers)
    assert np.isnan(logged.logprobs[4])
    assert np.isnan(logged.logprobs).sum() == 1


def test_pads_move_a_span_and_are_counted(rollouts):
    collected = Collected(["mask"])
    ids, prompt = rollouts[0].token_ids, rollouts[0].prompt_ids
    mask = {"mask": np.arange(TOKENS) % 2 == 0}
    collected.add(7, prompt, ids, np.zeros(TOKENS), mask, 0, (slice(2, None), slice(0, 6)))
    logged = collected.done(Path("x"), [SAMPLING], padded=True)
    np.testing.assert_array_equal(logged.prompt(0), prompt[2:])
    np.testing.assert_array_equal(logged.completion(0), ids[:6])
    assert logged.notes == [f"{2 + TOKENS - 6} pads taken away as the attention mask says"]
    np.testing.assert_array_equal(logged.masks["mask"], mask["mask"])


# ── numbers that are none ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("place", "value", "where"),
    [
        (-1, 0.0, "the last number of 12 of 12"),
        (0, 0.0, "the first number of 12 of 12"),
        (-1, -1.0, "the last number of"),
    ],
)
def test_one_value_in_one_place_is_a_placeholder(pair, rollouts, place, value, where):
    numbers = numbers_of(rollouts)
    for row in numbers:
        row[place] = value
    found = placeholders(gaps_of(pair, logged_of(rollouts, numbers)), FP32)
    assert found.cause == "placeholder_numbers"
    assert found.evidence.startswith(where)
    assert f"{ROWS} tokens carry the number {value:g}" in found.evidence


def test_runs_of_one_value_are_tokens_that_nobody_sampled(pair, rollouts):
    numbers = numbers_of(rollouts)
    for row in (1, 4, 6):
        numbers[row][3:8] = 0.0
    found = placeholders(gaps_of(pair, logged_of(rollouts, numbers)), FP32)
    assert found.cause == "tokens_not_sampled"
    assert "15 of 120 tokens in 3 of 12 completions" in found.evidence
    assert "runs of up to 5" in found.evidence


def test_values_that_differ_are_no_placeholder_and_neither_is_a_floor(pair, rollouts):
    numbers = numbers_of(rollouts)
    for row in numbers:
        row[-1] -= 0.5
    assert placeholders(gaps_of(pair, logged_of(rollouts, numbers)), FP32) is None
    floored = [np.maximum(row, -3.0) for row in numbers_of(rollouts)]
    assert placeholders(gaps_of(pair, logged_of(rollouts, floored)), FP32) is None, "a floor is another cause"


def test_one_row_of_a_value_is_a_placeholder_only_where_the_value_is_0(pair, rollouts):
    numbers = numbers_of(rollouts)
    numbers[3][2] = numbers[3][7] = -0.25
    assert placeholders(gaps_of(pair, logged_of(rollouts, numbers)), FP32) is None
    numbers = numbers_of(rollouts)
    numbers[3][2] = numbers[3][7] = 0.0
    assert placeholders(gaps_of(pair, logged_of(rollouts, numbers)), FP32).cause == "placeholder_numbers"


def swapped(rollouts, rows):
    numbers = numbers_of(rollouts)
    taken = [numbers[row] for row in rows]
    for row, other in zip(rows, taken[1:] + taken[:1], strict=True):
        numbers[row] = other
    return numbers


def some_of(pair, logged):
    gaps = gaps_of(pair, logged)
    return gaps, some_rows(pair, logged, logged.usable(), gaps)


def test_numbers_of_other_rows_of_the_file_are_found_there(pair, rollouts):
    gaps, some = some_of(pair, logged_of(rollouts, swapped(rollouts, [2, 5, 9])))
    np.testing.assert_array_equal(some.rows, [2, 5, 9])
    assert (some.plausible, some.related) == (True, False)
    found = foreign(pair, gaps, some)
    assert found.cause == "rows_swapped"
    assert "3 of 3 that were looked for are another row's" in found.evidence


def test_numbers_of_rows_that_are_not_in_the_file_are_foreign(pair, rollouts):
    rng = np.random.default_rng(5)
    numbers = numbers_of(rollouts)
    for row in (2, 5, 9):
        numbers[row] = -rng.gamma(1.0, 3.0, TOKENS).astype(np.float32)
    gaps, some = some_of(pair, logged_of(rollouts, numbers))
    found = foreign(pair, gaps, some)
    assert found.cause == "foreign_logprobs"
    assert "0 of 3 that were looked for" in found.evidence


def test_numbers_that_go_with_their_tokens_are_not_called_anothers(pair, rollouts):
    numbers = numbers_of(rollouts)
    for row in (2, 5):
        numbers[row] = (numbers[row] * np.float32(1.2)).astype(np.float32)
    gaps, some = some_of(pair, logged_of(rollouts, numbers))
    assert some.related
    assert foreign(pair, gaps, some) is None


def test_tokens_that_are_no_draws_of_the_model_are_told(pair, rollouts):
    """The least likely token at each place: nothing that a sampler gives."""
    tokens = [sample.token_ids for sample in rollouts]
    unlikely = []
    for _ in range(TOKENS):
        z = pair.engine.model.logits(np.r_[rollouts[3].prompt_ids, unlikely].astype(np.int64))[-1]
        unlikely.append(int(z.argmin()))
    tokens[3] = np.array(unlikely, np.int32)
    gaps, some = some_of(pair, logged_of(rollouts, tokens=tokens))
    np.testing.assert_array_equal(some.rows, [3])
    assert not some.plausible
    assert foreign(pair, gaps, some) is None


def test_where_most_rows_are_off_it_is_no_matter_of_some(pair, rollouts):
    numbers = [row - np.float32(0.5) for row in numbers_of(rollouts)]
    assert some_of(pair, logged_of(rollouts, numbers))[1] is None


def test_absurd_tokens_are_shown_with_the_text_of_their_rows(pair, rollouts):
    logged = logged_of(rollouts)
    gaps = gaps_of(pair, logged)
    gap = gaps.gap.copy()
    gap[(gaps.owners == 8) & (gaps.places >= 7)] -= 8.0
    found = corrupted(
        pair, logged, logged.usable(), Gaps(gaps.engine, gap, gaps.owners, gaps.places, gaps.lengths)
    )
    assert (found.rows, found.n_rows, found.n_tokens) == ([8], ROWS, 3)
    assert found.text == ascii(pair.renderer.text(rollouts[8].token_ids))


def test_draws_at_a_temperature_are_not_what_temperature_0_draws(pair, rollouts):
    greedy = []
    for sample in rollouts:
        ids = []
        for _ in range(4):
            ids.append(
                int(pair.engine.model.logits(np.r_[sample.prompt_ids, ids].astype(np.int64))[-1].argmax())
            )
        greedy.append(np.array(ids, np.int32))
    likeliest = logged_of(rollouts, [np.zeros(4, np.float32)] * ROWS, tokens=greedy)
    assert not_greedy(pair.trainer, likeliest.turns(np.arange(ROWS), 4), FP32) == ""
    told = not_greedy(pair.trainer, rollouts, FP32)
    assert told.startswith("temperature 0 draws the likeliest token, and ")
    assert "at a temperature of about" in told
