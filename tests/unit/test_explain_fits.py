"""Fits that name a cause.

Values of a setting, a truncation behind a penalty, rows by themselves, ids of another vocabulary.
"""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.parity.evidence import gather
from lockstep.parity.explain.fitting import Fitted, fitted, miss_of
from lockstep.parity.explain.rows import off, rows_of
from lockstep.parity.explain.semantics.held import (
    FITTED_TOKENS,
    Held,
    every_part,
    spread,
    tokens_of_every_part,
)
from lockstep.parity.explain.semantics.joint import UnderTruncation, hidden_cut
from lockstep.parity.explain.semantics.penalties import Seen, seen_before
from lockstep.parity.explain.semantics.portions import places_of_rows, rows_off, temperatures_of_rows, where
from lockstep.parity.explain.semantics.unasked import unasked
from lockstep.parity.explain.semantics.vocabulary import moved_ids
from lockstep.parity.search import Search
from lockstep.parity.search_tolerances import IMPROVES, TAIL_OVER_MEDIAN
from lockstep.policy.truncation import kept
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import SamplingParams
from tests.unit.bag_pair import VOCABULARY, bag_pair

LIMIT = 1e-4
GRID = np.geomspace(0.05, 4.0, 20).tolist()


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60)
@given(value=st.floats(0.06, 3.5), steep=st.floats(0.1, 10.0))
def test_a_value_between_two_of_the_grid_is_found(value, steep):
    best = fitted(GRID, lambda v: steep * abs(np.log(v / value)), now=100.0)
    assert best.value == pytest.approx(value, rel=1e-4)
    assert best.miss == steep * abs(np.log(best.value / value))


@pytest.mark.parametrize("value", [0.7, 1.5, 0.65, 0.123])
def test_of_values_that_do_alike_the_rounded_one_is_named(value):
    assert fitted(GRID, lambda v: abs(v - value), now=100.0) == Fitted(0.0, value)


def test_nothing_is_refined_where_the_grid_mends_nothing():
    asked = []

    def miss(value):
        asked.append(value)
        return 1.0 - 0.01 * (value == GRID[3])

    best = fitted(GRID, miss, now=1.0)
    assert asked == GRID
    assert best == Fitted(0.99, GRID[3])
    assert best.miss > IMPROVES * 1.0


def test_a_value_at_the_end_of_the_grid_is_no_worse_than_the_end():
    assert fitted(GRID, lambda v: v, now=100.0).value == pytest.approx(GRID[0])


def test_a_fit_stops_when_its_time_is_over():
    search = Search(0.05)
    tried = []

    def look():
        def slow(value):
            tried.append(value)
            time.sleep(0.02)
            return abs(value - 1.0)

        return fitted(GRID, slow, now=100.0)

    assert search.first([("a slow one", look)]) is None
    assert search.not_tried == ["a slow one"]
    assert len(tried) < len(GRID)


def test_a_miss_is_the_median_unless_the_tail_is_worse():
    gap = np.full(100, 1e-3)
    assert miss_of(gap) == pytest.approx(1e-3)
    assert miss_of(-gap) == miss_of(torch.from_numpy(gap)) == miss_of(gap)
    gap[:2] = 0.5  # p99
    assert miss_of(gap) == pytest.approx(0.5 / TAIL_OVER_MEDIAN)
    sure = np.zeros(100)
    sure[:3] = np.inf
    assert miss_of(sure) == np.inf, "a token that is held impossible is no small miss"


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_rows_are_cut_where_owners_change(lengths):
    owners = np.repeat(np.arange(len(lengths)), lengths)
    values = np.random.default_rng(0).normal(size=owners.size)
    rows = rows_of(values, owners)
    assert [len(row) for row in rows] == lengths
    np.testing.assert_array_equal(np.concatenate(rows), values)


def test_rows_agree_in_the_median_and_a_nan_does_not():
    right = np.zeros(5)
    assert not off(right, np.array([0.0, 0.0, 0.05, 9.0, 9.0]), 0.1), "two of five tokens are far off"
    assert off(right, np.array([0.0, 0.0, 9.0, 9.0, 9.0]), 0.1)
    assert off(right, np.full(5, np.nan), 0.1)


# ── tokens that are held ────────────────────────────────────────────────────────────────────────────────────


@given(n=st.integers(1, 3000), most=st.integers(1, 200))
def test_places_are_spread_over_all_of_it(n, most):
    places = spread(n, most)
    assert places[0] == 0
    assert places[-1] == (n - 1 if most > 1 else 0)
    assert len(places) == min(n, most)
    if most > 1 and n > 1:
        assert np.diff(places).max() <= (n - 1) / (min(n, most) - 1) + 1


def test_tokens_are_held_with_their_own_distributions():
    pair = bag_pair(
        sampling={"max_tokens": 12, "temperature": 0.7}, parity={"probe_prompts": 16, "probe_tokens": 12}
    )
    sample = gather(pair).own
    held = tokens_of_every_part(pair.trainer, sample.groups, sample.engine_logprobs)
    at = every_part(sample.token_ids.size)
    assert len(at) == FITTED_TOKENS
    np.testing.assert_array_equal(held.ids, sample.token_ids[at])
    assert held.left(held.logits / 0.7) < 1e-5
    assert held.left(held.logits) > 0.05
    assert held.screened().left(held.screened().logits / 0.7) < 1e-5


# ── a truncation behind another setting ─────────────────────────────────────────────────────────────────────


def drawn_under(setting, seed=0, n=96, temperature=1.0):
    """Tokens drawn from truncated logits, with what a sampler reports of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 400, generator=generator) * torch.linspace(1.0, 4.0, n)[:, None]
    z = logits / temperature
    logprobs = z.masked_fill(~kept(z.log_softmax(-1), setting), float("-inf")).log_softmax(-1)
    ids = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
    return Held(logits, ids, logprobs.gather(1, ids[:, None])[:, 0])


@pytest.mark.parametrize("k", [2, 7, 40])
def test_every_top_k_is_tried_at_once(k):
    held = drawn_under(SamplingParams(max_tokens=1, top_k=k))
    cut = UnderTruncation(*held)
    miss, name = cut.best()
    assert (name, miss < LIMIT) == (f"top-k {k}", True)
    assert cut.top_k(k) == miss
    assert min(cut.top_k(k - 1), cut.top_k(k + 1)) > 10 * LIMIT


@pytest.mark.parametrize("p", [0.5, 0.9, 0.95])
def test_the_least_kept_mass_gives_the_top_p(p):
    miss, name = UnderTruncation(*drawn_under(SamplingParams(max_tokens=1, top_p=p))).best()
    assert (name, miss < LIMIT) == (f"top-p {p:g}", True)


def test_a_token_that_a_truncation_leaves_out_is_impossible_under_it():
    held = drawn_under(SamplingParams(max_tokens=1, top_k=40))
    assert UnderTruncation(*held).top_k(1) == np.inf


def seen_of(n):
    rng = np.random.default_rng(1)
    ids = [torch.from_numpy(np.unique(rng.integers(0, 400, 12))) for _ in range(n)]
    return Seen(ids, [torch.from_numpy(rng.integers(0, 3, len(row))) for row in ids])


def test_a_temperature_with_a_truncation_is_fitted_together_and_neither_alone():
    held = drawn_under(SamplingParams(max_tokens=1, top_k=20), temperature=0.6)
    found = hidden_cut(held, seen_of(len(held.ids)), 1.0, LIMIT)
    assert (found.cause, found.name) == ("hidden_truncation", "temperature 0.6 with top-k 20")
    assert found.miss <= LIMIT
    assert hidden_cut(drawn_under(SamplingParams(max_tokens=1)), seen_of(96), 1.0, LIMIT) is None, (
        "nothing is hidden"
    )
    noisy = held._replace(
        engine=held.engine + 0.1 * torch.randn(96, generator=torch.Generator().manual_seed(0))
    )
    assert hidden_cut(noisy, seen_of(96), 1.0, LIMIT) is None


# ── rows by themselves ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pair():
    return bag_pair(parity={"probe_prompts": 8, "probe_tokens": 20})


@pytest.fixture
def sample(pair):
    return gather(pair).neutral


def scored_at(pair, sample, temperatures):
    """``sample`` with numbers at a temperature for each row."""
    rows = [pair.trainer.score([group], t)[0] for group, t in zip(sample.groups, temperatures, strict=True)]
    sample.fill(engine_logprobs=np.concatenate(rows))
    return sample


def test_rows_with_a_fifth_of_their_numbers_off_are_told(sample):
    gap = np.zeros(sample.owners.size, np.float32)
    for row, count in {1: 3, 2: 5, 6: 20}.items():
        gap[np.flatnonzero(sample.owners == row)[:count]] = 1.0
    gap[sample.owners == 7] = np.nan
    np.testing.assert_array_equal(rows_off(sample, gap, 0.5), [2, 6, 7])


def test_which_rows_they_are_is_told_by_lengths_where_these_tell_them():
    def row(n_prompt, n):
        ids = np.arange(n, dtype=np.int32)
        mask = np.ones(n, bool)
        values = np.zeros(n, np.float32)
        prompt = np.arange(n_prompt, dtype=np.int32)
        return Sample(
            group=0,
            sample=0,
            item=0,
            prompt_ids=prompt,
            token_ids=ids,
            loss_mask=mask,
            engine_logprobs=values,
            version_spans=(),
            finish_reason="stop",
        )

    rows = Samples([row(*shape) for shape in [(4, 9), (8, 3), (6, 5), (9, 4)]], SamplingParams(max_tokens=9))
    assert where(rows, np.arange(4)) == "all 4 rows"
    assert where(rows, np.array([1, 3])) == "2 of 4 rows, those with prompts of 8 tokens or more"
    assert where(rows, np.array([0, 2])) == "2 of 4 rows, those with prompts of 6 tokens or fewer"
    assert where(rows, np.array([0])) == "1 of 4 rows, those with prompts of 4 tokens or fewer"
    assert where(rows, np.array([0, 3])) == "2 of 4 rows (1, 4)"
    twelve = Samples([row(4, 3) for _ in range(12)], rows.sampling)
    assert where(twelve, np.arange(10)) == "10 of 12 rows (1, 2, 3, 4, 5, 6, 7, 8, …)"


def test_rows_at_temperatures_of_their_own_are_told_apart(pair, sample):
    scored_at(pair, sample, [1.0, 0.5, 1.0, 0.5, 1.0, 1.0, 0.5, 1.0])
    at = places_of_rows(sample)
    held = tokens_of_every_part(pair.trainer, sample.groups, sample.engine_logprobs, at)
    found = temperatures_of_rows(sample, held, sample.owners[at], LIMIT)
    assert found.cause == "temperature_altered"
    assert found.name == "temperature 0.5 in 3 of 8 rows (2, 4, 7)"


@pytest.mark.parametrize("temperatures", [[1.0] * 8, [0.5] * 8, np.linspace(0.4, 2.0, 8).tolist()])
def test_one_temperature_or_a_different_one_for_each_row_is_not_that(pair, sample, temperatures):
    scored_at(pair, sample, temperatures)
    at = places_of_rows(sample)
    held = tokens_of_every_part(pair.trainer, sample.groups, sample.engine_logprobs, at)
    assert temperatures_of_rows(sample, held, sample.owners[at], LIMIT) is None


def test_a_setting_of_the_rows_that_are_off_is_named_with_them(pair, sample):
    scored_at(pair, sample, [1.0, 1.0, 1.0, 1.0, 1.0, 0.6, 0.6, 0.6])
    found = unasked(pair, sample, LIMIT)
    assert found.cause == "temperature_altered"
    assert "temperature 0.6" in found.name
    assert "3 of 8 rows" in found.name
    assert pair.search.tried[0] == "another temperature", "all rows are tried first, the cheap ones before"


def test_a_setting_of_all_rows_is_named_without_a_word_of_rows(pair, sample):
    scored_at(pair, sample, [0.6] * 8)
    found = unasked(pair, sample, LIMIT)
    assert (found.cause, found.name) == ("temperature_altered", "temperature 0.6")


def test_a_penalty_that_nobody_asked_for_is_named(pair, sample):
    from lockstep.parity.explain.semantics.hypotheses import scored_under
    from lockstep.records.semantics import LogprobSemantics

    asked = SamplingParams(max_tokens=20, presence_penalty=0.8)
    drawn = LogprobSemantics.of("sampler", asked)
    sample.fill(engine_logprobs=scored_under(pair.trainer, sample.groups, asked, [drawn])[0])
    found = unasked(pair, sample, LIMIT)
    assert (found.cause, found.name) == ("hidden_penalties", "presence penalty 0.8")
    assert all(len(row) == len(set(row.tolist())) for row in seen_before(sample).ids)


def test_right_numbers_and_mere_noise_are_not_explained(pair, sample):
    assert unasked(pair, sample, LIMIT) is None
    noise = np.random.default_rng(0).normal(0, 0.2, sample.owners.size).astype(np.float32)
    sample.fill(engine_logprobs=sample.engine_logprobs + noise)
    assert unasked(pair, sample, LIMIT) is None


# ── another vocabulary ──────────────────────────────────────────────────────────────────────────────────────


def moved(sample, at, by):
    """The same text in the ids of a vocabulary with ``by`` tokens more (or fewer) below ``at``."""

    def read(ids):
        return np.where(ids >= at, ids + by, ids).astype(np.int32)

    rows = [replace(s, prompt_ids=read(s.prompt_ids), token_ids=read(s.token_ids)) for s in sample]
    return replace(sample, samples=rows)


@pytest.mark.parametrize(
    ("at", "by", "told"), [(20, 1, "1 less"), (20, 2, "2 less"), (12, -1, "1 more"), (30, -2, "2 more")]
)
def test_ids_of_another_vocabulary_are_read_back(pair, sample, at, by, told):
    inside = [s for s in sample if max(s.prompt_ids.max(), s.token_ids.max()) + by < VOCABULARY]
    assert inside, "rows that the larger vocabulary's ids leave within this one"
    found = moved_ids(pair, moved(replace(sample, samples=inside), at, by))
    assert found is not None
    assert found.cause == "vocabulary_shifted"
    assert f"read as {told}" in found.evidence


def test_right_ids_and_unrelated_ones_are_no_move(pair, sample):
    assert moved_ids(pair, sample) is None
    rng = np.random.default_rng(0)
    other = [replace(s, token_ids=rng.permutation(s.token_ids)) for s in sample]
    assert moved_ids(pair, replace(sample, samples=other)) is None
