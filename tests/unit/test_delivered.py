"""The share of an update that is missing: what is proven, what is refuted, and how often by accident."""

import numpy as np
import pytest

from lockstep.parity.delivered import Missing, Moves, missing
from lockstep.parity.tolerances import DELIVERED_Z

SEQUENCES, LENGTH = 128, 5


def moves(rng, theta, size, noise=0.03, n=SEQUENCES):
    """Tokens whose updates differ as their probabilities do, under heavy-tailed noise that a sequence shares
    in part."""
    owners = np.repeat(np.arange(n), LENGTH)
    logprobs = -rng.exponential(1.0, owners.size)
    moved = size * rng.standard_t(4, owners.size) * np.minimum(1.0, -logprobs)
    width = noise * np.minimum(1.0, -logprobs + 0.05)
    noisy = width * (0.8 * rng.standard_t(4, owners.size) + 0.4 * rng.normal(size=n)[owners])
    return Moves(noisy - theta * moved, moved, logprobs, owners)


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [0.01, 0.3])
def test_the_share_is_found_with_its_error(theta, size):
    """Updates much smaller than the noise, and much larger."""
    rng = np.random.default_rng(0)
    found = [missing(moves(rng, theta, size)) for _ in range(60)]
    z = DELIVERED_Z * np.array([(one.share - theta) / one.error for one in found])
    assert abs(z.mean()) < 0.5
    assert 0.7 < z.std() < 1.3
    assert np.mean([one.share for one in found]) == pytest.approx(theta, abs=0.03)


def test_an_update_that_arrived_is_proven_and_one_that_did_not_is_refuted_and_neither_by_chance():
    rng = np.random.default_rng(1)
    arrived = [missing(moves(rng, 0.0, 0.03)) for _ in range(60)]
    assert np.mean([one.proven for one in arrived]) > 0.95
    assert not any(one.refuted for one in arrived)
    for theta in (0.5, 1.0):
        lost = [missing(moves(rng, theta, 0.03)) for _ in range(60)]
        assert np.mean([one.refuted for one in lost]) > 0.95
        assert not any(one.proven for one in lost)


def test_an_update_too_small_is_neither_and_the_tokens_it_needs_prove_it():
    rng = np.random.default_rng(2)
    few = missing(moves(rng, 0.0, 0.002))
    assert not few.proven
    assert not few.refuted
    assert few.more_needed > 2 * few.n_tokens
    n = 1.3 * (few.n_tokens + few.more_needed) / LENGTH
    assert missing(moves(rng, 0.0, 0.002, n=int(n))).proven


def test_steps_add_up():
    rng = np.random.default_rng(3)
    parts = [moves(rng, 0.0, 0.006) for _ in range(6)]
    so_far = parts[0]
    errors = [missing(so_far).error]
    for part in parts[1:]:
        so_far = so_far.with_more(part)
        errors.append(missing(so_far).error)
    assert so_far.owners.max() == 6 * SEQUENCES - 1
    assert errors[-1] == pytest.approx(errors[0] / np.sqrt(6), rel=0.3)


def test_tokens_that_say_nothing_prove_nothing():
    rng = np.random.default_rng(4)
    still = moves(rng, 0.0, 0.0)
    assert missing(still) == Missing(0.0, float("inf"), still.gap.size)
    one = moves(rng, 0.0, 1.0)
    lone = Moves(one.gap, np.where(one.owners == 0, one.moved, 0.0), one.logprobs, one.owners)
    assert not missing(lone).proven, "one sequence is no evidence, however far it moved"


def test_exact_scores_are_proven_exactly():
    rng = np.random.default_rng(5)
    exact = moves(rng, 0.0, 0.01, noise=0.0)
    assert missing(exact).proven
    stale = moves(rng, 1.0, 0.01, noise=0.0)
    assert missing(stale).refuted


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-6, 4e-6])
def test_an_update_no_larger_than_the_scores_own_rounding_is_never_refuted(size):
    """As at the end of a schedule: each of the three scores has a rounding of its own."""
    rng = np.random.default_rng(4)
    owners = np.repeat(np.arange(SEQUENCES), LENGTH)
    logprobs = -rng.exponential(1.0, owners.size)
    for _ in range(100):
        moved = size * rng.standard_t(4, owners.size)
        new, old, engine = 4e-6 * rng.normal(size=(3, owners.size))
        found = missing(Moves(engine - new, moved + new - old, logprobs, owners))
        assert not found.refuted
        assert not found.proven
