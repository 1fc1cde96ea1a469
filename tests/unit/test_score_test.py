"""The score test on simulated gaps: false alarms as often as asked for, faults seen and told from others."""

import numpy as np
import pytest

from lockstep.parity.explain.score_test import (
    alike,
    curvature,
    detectable,
    score_test,
    statistic,
    token_weights,
    widths,
)
from lockstep.parity.search_tolerances import SCORE_LEVEL

SEQUENCES, TOKENS, DIRECTIONS = 32, 48, 200
OWNERS = np.repeat(np.arange(SEQUENCES), TOKENS)


@pytest.fixture(scope="module")
def slopes():
    """g_ik: directions that overlap, as those of one model's tensors do; float64 [K, T]."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(12, OWNERS.size))
    return rng.normal(size=(DIRECTIONS, 12)) @ common + rng.normal(size=(DIRECTIONS, OWNERS.size))


def noise(rng, size=OWNERS.size):
    """Symmetric, heavy-tailed, wider for rarer tokens, and of one width for a whole sequence; with the
    tokens' log p."""
    logprobs = -rng.exponential(2.0, size)
    wide = 0.01 * (1.0 - logprobs) * np.exp(rng.normal(0, 0.5, SEQUENCES))[OWNERS]
    return wide * rng.standard_t(3, size), logprobs


def joined(by_token):
    """Sums over each sequence's tokens: [K, S]."""
    return by_token.reshape(len(by_token), SEQUENCES, TOKENS).sum(-1)


def scored_of(slopes, gap, logprobs):
    return score_test(joined(slopes * token_weights(gap, logprobs)))


def test_noise_is_called_a_direction_as_often_as_asked_for(slopes):
    n = 150
    alarms = sum(scored_of(slopes, *noise(np.random.default_rng(seed))).significant for seed in range(n))
    assert alarms <= n * SCORE_LEVEL + 3 * np.sqrt(n * SCORE_LEVEL), alarms


def test_a_fault_far_inside_the_noise_is_seen_and_told_from_the_others(slopes):
    named = []
    for seed in range(20):
        gap, logprobs = noise(np.random.default_rng(seed))
        fault = 0.007 * slopes[7] / slopes[7].std()
        assert np.median(np.abs(fault)) < 0.5 * np.median(np.abs(gap))
        found = scored_of(slopes, gap + fault, logprobs)
        named.append(found.significant and found.best == 7)
    assert np.mean(named) >= 0.9, named


def test_two_names_of_one_direction_are_told_together(slopes):
    rng = np.random.default_rng(1)
    gap, logprobs = noise(rng)
    both = np.concatenate([slopes, -2.5 * slopes[3:4] + 0.1 * rng.normal(size=OWNERS.size)])
    pulls = joined(both * token_weights(gap, logprobs))
    assert alike(pulls, 3).tolist() == [3, DIRECTIONS]
    assert statistic(pulls)[3] == pytest.approx(-statistic(pulls)[DIRECTIONS], rel=0.1, abs=0.1)


def test_tokens_drawn_from_rounded_numbers_are_no_direction():
    """Raw, the mean of such a gap is half its variance above 0."""
    rng = np.random.default_rng(2)
    exact = np.log(rng.dirichlet(np.full(50, 0.5), 20_000))
    rounded = exact + rng.normal(0, 0.3, exact.shape)
    rounded -= np.log(np.exp(rounded).sum(1, keepdims=True))
    drawn = (np.exp(rounded).cumsum(1) > rng.random((len(exact), 1))).argmax(1)
    rows = np.arange(len(exact))
    gap = rounded[rows, drawn] - exact[rows, drawn]
    a = token_weights(gap, exact[rows, drawn])
    error = len(gap) ** -0.5
    assert gap.mean() > 10 * error * gap.std(), "what the factor is for"
    assert abs(a.mean()) < 4 * error * a.std()


def test_widths_follow_the_noise_and_are_blind_to_signs():
    gap, logprobs = noise(np.random.default_rng(3))
    found = widths(gap, logprobs)
    assert (found == widths(-gap, logprobs)).all()
    assert np.median(found[logprobs < -4]) > 2 * np.median(found[logprobs > -1])
    assert (widths(np.zeros(64), np.linspace(-9, 0, 64)) > 0).all()


def test_a_direction_that_nothing_feels_says_nothing():
    found = score_test(np.zeros((3, 8)))
    assert found.t.tolist() == [0, 0, 0]
    assert not found.significant


@pytest.mark.parametrize("common", [0.0, 0.9], ids=["tokens apart", "a sequence's tokens alike"])
def test_what_a_pass_says_it_would_have_seen_is_seen(slopes, common):
    """θ at the size that a clean gap is said to show is called nearly always, at a third of it seldom."""
    slopes = slopes * np.sign(slopes[7])  # a direction that pulls one way, as a temperature does

    def gap_of(seed):
        rng = np.random.default_rng(seed)
        own, logprobs = noise(rng)
        return own + common * 0.01 * rng.normal(size=SEQUENCES)[OWNERS], logprobs

    gap, logprobs = gap_of(0)
    pulls = joined(slopes * token_weights(gap, logprobs))
    signs = np.random.default_rng(1).choice((-1.0, 1.0), gap.size)
    probed = joined(slopes * signs * np.sqrt(curvature(gap, logprobs)))
    size = detectable(pulls, probed, score_test(pulls).critical)[7]

    def called(share):
        found = []
        for seed in range(1, 31):
            gap, logprobs = gap_of(seed)
            scored = scored_of(slopes, gap + share * size * slopes[7], logprobs)
            found.append(scored.significant and scored.t[7] > 0)
        return np.mean(found)

    assert called(1.0) >= 0.9
    assert called(1 / 3) <= 0.5


def test_a_handful_of_sequences_sees_nothing_and_says_so():
    pulls = np.random.default_rng(0).normal(size=(5, 4))
    assert np.isinf(detectable(pulls, pulls, 3.0)).all()
