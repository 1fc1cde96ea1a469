"""The canary's truth table, and that it tells what an engine did with an update."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lockstep.parity.canary import SEQUENCE_TOKENS, Canary, CanaryResult
from lockstep.parity.evidence import gather
from lockstep.parity.tolerances import CANARY_FLOOR, CANARY_MULTIPLE
from lockstep.policy.variants import Perturbed
from tests.unit.bag_pair import bag_pair

LIMIT = 1e-3
NAN = float("nan")
UNDER, OVER = 0.5 * LIMIT, 2.0 * LIMIT


def result(gap=UNDER, shift=OVER, to_previous=OVER, moved=True, sent=None):
    sent = shift > 0.0 if sent is None else sent
    return CanaryResult(gap, 2 * gap, shift, to_previous, sent, moved, LIMIT, 8)


@pytest.mark.parametrize(
    ("gap", "shift", "moved", "refuted", "proven"),
    [
        (UNDER, OVER, True, False, True),  # it serves them, and a lost update would have shown
        (UNDER, UNDER, True, False, False),  # too small an update to be seen
        (LIMIT, OVER, True, False, True),  # at the limit
        (UNDER, LIMIT, True, False, False),
        (OVER, OVER, True, True, False),  # it serves something else
        (OVER, UNDER, True, True, False),
        (UNDER, OVER, False, True, False),  # the very numbers of before: the update was not there
        (UNDER, UNDER, False, True, False),  # however small it was
        (UNDER, 0.0, False, False, False),  # nothing changed, and nothing moved
        (UNDER, 0.0, True, False, False),
        (OVER, 0.0, False, True, False),
        (UNDER, NAN, True, False, False),  # nothing was measured before
        (UNDER, NAN, False, False, False),
        (NAN, OVER, True, True, False),
        (NAN, NAN, True, True, False),
    ],
)
def test_what_is_refuted_and_what_is_proven(gap, shift, moved, refuted, proven):
    found = result(gap, shift, moved=moved)
    assert (found.refuted, found.proven) == (refuted, proven)


@pytest.mark.parametrize("moved", [True, False])
def test_no_update_is_no_lost_update_though_arithmetic_moved_the_trainers_scores(moved):
    assert not result(UNDER, 0.1 * LIMIT, UNDER, moved, sent=False).refuted
    wrong = result(OVER, 0.1 * LIMIT, OVER, moved, sent=False)
    assert wrong.refuted, "what the engine serves is another thing, whatever was sent"
    assert not wrong.not_delivered


def test_nothing_is_ever_both_and_no_nan_gap_is_neither():
    values = (0.0, UNDER, LIMIT, OVER, NAN)
    for gap, shift, previous, moved in itertools.product(values, values, values, (True, False)):
        found = result(gap, shift, previous, moved, sent=previous == OVER)
        assert not (found.refuted and found.proven)
        assert found.refuted or not np.isnan(gap)


@pytest.mark.parametrize(
    ("to_previous", "gap", "moved", "not_delivered"),
    [
        (UNDER, OVER, True, True),
        (OVER, UNDER, True, False),
        (OVER, OVER, False, True),
        (NAN, OVER, True, False),
    ],
)
def test_an_update_that_never_came_is_told_from_one_that_came_wrong(to_previous, gap, moved, not_delivered):
    assert result(gap, OVER, to_previous, moved).not_delivered is not_delivered


@pytest.fixture
def pair():
    return bag_pair()


@pytest.fixture
def canary(pair):
    canary = Canary.of(gather(pair).neutral, 32)
    canary.measure(pair)
    canary.clean_gap_nats = 1e-7
    return canary


def updated(pair, canary, mend=lambda sent, held: sent):
    """What the canary says after every weight moved, and the engine did with it as ``mend`` says."""
    pair.engine.weights = mend
    with pair.trainer.holding(Perturbed(pair.trainer.snapshot(), 0.02, 1)):
        pair.sync(1)
        return canary.measure(pair)


def test_an_update_that_arrived_is_proven(pair, canary):
    found = updated(pair, canary)
    assert found.proven
    assert not found.not_delivered
    assert found.limit_nats == CANARY_MULTIPLE * CANARY_FLOOR, (
        "a clean gap below the floor counts as the floor"
    )


def test_one_that_did_not_is_refuted_and_named(pair, canary):
    found = updated(pair, canary, lambda sent, held: held)
    assert found.refuted
    assert found.not_delivered
    assert not found.engine_moved
    assert found.gap_abs_mean_nats == pytest.approx(found.shift_abs_mean_nats, rel=1e-3)


def test_half_of_it_is_refuted_and_not_called_lost(pair, canary):
    found = updated(
        pair, canary, lambda sent, held: sent | {"layers.1.mix.weight": held["layers.1.mix.weight"]}
    )
    assert found.refuted
    assert not found.not_delivered


def test_each_measurement_is_held_against_the_one_before_it(pair, canary):
    first = canary.scores.copy()
    again = canary.measure(pair)
    assert again.shift_abs_mean_nats == 0.0
    assert not again.trainer_moved
    assert not again.engine_moved
    assert not again.refuted
    side = canary.trainer_side(pair)
    other_threads = canary.measure(pair, replace(side, scores=side.scores + np.float32(1e-6)))
    assert other_threads.shift_abs_mean_nats > 0.0
    assert not other_threads.trainer_moved, "scores that move do not mean that weights did"
    assert not other_threads.refuted
    found = updated(pair, canary)
    assert found.shift_abs_mean_nats == pytest.approx(np.abs(canary.scores - first).mean(), rel=1e-6)
    fresh = replace(canary, scores=np.empty(0, np.float32), served=np.empty(0, np.float32))
    unmeasured = fresh.measure(pair)
    assert np.isnan(unmeasured.shift_abs_mean_nats)
    assert np.isnan(unmeasured.gap_to_previous_abs_mean_nats)
    assert unmeasured.engine_moved


@pytest.mark.parametrize("n_tokens", [8, 20, 64, 500])
def test_known_tokens_are_the_last_of_a_few_sequences(pair, n_tokens):
    sampled = gather(pair).neutral
    canary = Canary.of(sampled, n_tokens)
    assert len(canary.groups) == min(len(sampled), max(1, n_tokens // SEQUENCE_TOKENS))
    for group, sequence in zip(canary.groups, sampled.sequences, strict=False):
        kept = np.r_[group.prompt, group.completions[0]]
        np.testing.assert_array_equal(kept, sequence[-len(kept) :])
        assert len(group.prompt) == 1
    n = canary.measure(pair).n_tokens
    assert n == canary.owners.size
    assert n <= n_tokens
