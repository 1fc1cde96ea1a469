"""Updates under requests in flight: what two replays say of the engine's cache, on constructed ones."""

import numpy as np
import pytest

from lockstep.deep import in_flight
from lockstep.deep.switch import Replayed
from lockstep.parity.tolerances import REPLAY_WRONG_MULTIPLE
from lockstep.records.verdicts import Verdict
from tests.unit.bag_pair import bag_pair

WEIGHTS = Verdict(
    layer="weights", status="PASS", summary="it arrived", n_tokens=10, figures={"shift_abs_mean_nats": 0.3}
)
RIGHT, WRONG = 1e-5, 0.2


def replayed(mode, before=RIGHT, kept=None, recomputed=None, n=20):
    """Of an engine that does what the mode says: the other assumption misses."""
    kept = (RIGHT if mode == "keep" else WRONG) if kept is None else kept
    recomputed = (WRONG if mode == "keep" else RIGHT) if recomputed is None else recomputed
    return Replayed(mode, 3, *(np.full(n, value, np.float32) for value in (before, kept, recomputed)))


def deepened(monkeypatch, without=(), **by_mode):
    pair = bag_pair(without)
    monkeypatch.setattr(
        in_flight, "replay_switch", lambda pair, mode, timed: by_mode.get(mode, replayed(mode))
    )
    return in_flight.deepen(pair, WEIGHTS)


def test_both_modes_proven_are_said_beside_what_was_proven_before(monkeypatch):
    verdict = deepened(monkeypatch)
    assert (verdict.status, verdict.n_tokens) == ("PASS", 10 + 2 * 40)
    assert verdict.summary.startswith(
        "it arrived; in flight, token by token, to 1e-05 (keep) and 1e-05 (recompute)"
    )
    assert verdict.figures["shift_abs_mean_nats"] == 0.3
    assert verdict.figures["in_flight_keep_told_apart"] is True
    assert verdict.figures["in_flight_recompute_wrong_assumption_abs_max_nats"] == pytest.approx(WRONG)


@pytest.mark.parametrize("mode", in_flight.MODES)
@pytest.mark.parametrize("part", ["before", "after"])
def test_tokens_that_no_weights_explain_fail_under_their_mode(monkeypatch, mode, part):
    after = {"kept": 0.05} if mode == "keep" else {"recomputed": 0.05}
    wrong = replayed(mode, **({"before": 0.05} if part == "before" else after))
    verdict = deepened(monkeypatch, **{mode: wrong})
    assert verdict.status == "FAIL"
    (found,) = verdict.findings
    assert found.cause == "in_flight_update"
    assert found.effect_nats == pytest.approx((0.05 + RIGHT) / 2, rel=1e-3)
    assert found.evidence.startswith(f"mode {mode}: ")


def test_an_engine_that_recomputes_where_it_was_to_keep_is_found(monkeypatch):
    """It is the other assumption that fits."""
    verdict = deepened(monkeypatch, keep=replayed("keep", kept=WRONG, recomputed=RIGHT))
    assert [found.cause for found in verdict.findings] == ["in_flight_update"]
    assert verdict.figures["in_flight_keep_told_apart"] is False


@pytest.mark.parametrize(("times", "apart"), [(0.9, False), (1.1, True)])
def test_assumptions_are_told_apart_when_the_other_misses_by_enough(monkeypatch, times, apart):
    other = replayed("keep", recomputed=times * REPLAY_WRONG_MULTIPLE * RIGHT)
    verdict = deepened(monkeypatch, keep=other)
    assert verdict.status == "PASS"
    assert verdict.figures["in_flight_keep_told_apart"] is apart


def test_a_mode_under_which_nothing_spanned_the_switch_is_not_run(monkeypatch):
    verdict = deepened(monkeypatch, recompute=replayed("recompute", n=0))
    assert verdict.status == "NOT_RUN"
    assert verdict.reason.startswith("mode recompute: no completion spanned the switch")
    assert np.isnan(verdict.figures["in_flight_recompute_after_abs_max_nats"])
    assert verdict.figures["in_flight_recompute_told_apart"] is False
    failed = deepened(monkeypatch, keep=replayed("keep", kept=WRONG), recompute=replayed("recompute", n=0))
    assert failed.status == "FAIL", "what was found counts, whatever was not run"


def test_an_engine_that_cannot_is_said_and_the_layer_stays_as_it_was(monkeypatch):
    verdict = deepened(monkeypatch, without=["pause_keep"])
    assert (verdict.status, verdict.n_tokens) == ("PASS", 10)
    assert verdict.summary == "it arrived; updates in flight not run: as the test says"
