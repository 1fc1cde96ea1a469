"""Layer 3 on a pair without a model: what an engine may do to the weights it is sent, each by its name."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from msgspec.structs import replace as changed

from lockstep.parity import perturbation
from lockstep.parity.canary import Canary
from lockstep.parity.delivered import Missing
from lockstep.parity.evidence import gather
from lockstep.parity.explain.numerics.systematic import Direction
from lockstep.parity.layers import weights
from lockstep.parity.left_behind import Look, TensorLeft
from lockstep.parity.perturbation import PROBE_VERSION
from lockstep.records.versions import LoadReceipt, VersionSpan
from tests.unit.bag_pair import Bag, bag_pair

MIX = "layers.1.mix.weight"


class Sides:
    """A pair whose first sync has been measured, and the verdict on what its engine does since."""

    def __init__(self, **sections):
        self.pair = bag_pair(**sections)
        self.sample = gather(self.pair).neutral
        self.canary = Canary.of(self.sample, 64)
        self.canary.clean_gap_nats = 1e-7

    def judged(self):
        before = self.pair.trainer.weights()
        verdict = weights.judge(self.pair, self.canary, self.sample)
        after = self.pair.trainer.weights()
        assert all(torch.equal(before[name], after[name]) for name in before), (
            "whatever is found, the trainer is as it was"
        )
        return verdict


@pytest.fixture
def sides():
    return Sides()


def cause(verdict):
    assert verdict.status == "FAIL", verdict.summary
    (found,) = verdict.findings
    return found.cause


def keeping(*names):
    """An engine that leaves some tensors as they were."""
    return lambda sent, held: sent | {name: held[name] for name in names}


def test_weights_that_arrive_and_go_back_pass_with_what_a_lost_update_would_have_shown(sides):
    verdict = sides.judged()
    assert verdict.status == "PASS"
    assert verdict.figures["judged_by"] == "scores"
    assert verdict.figures["residue_all_new_abs_mean_nats"] < 1e-6
    assert verdict.figures["residue_none_delivered_abs_mean_nats"] == pytest.approx(
        verdict.figures["shift_abs_mean_nats"], rel=1e-3
    )
    assert "no stale tensor or head, no stale prefix cache" in verdict.summary
    assert sides.pair.engine.version == sides.pair.version
    assert all(
        torch.equal(p, sides.pair.trainer.weights()[name])
        for name, p in sides.pair.engine.model.named_parameters()
    )


def test_an_engine_that_keeps_what_it_has_was_not_reached(sides):
    sides.pair.engine.weights = lambda sent, held: held
    verdict = sides.judged()
    assert cause(verdict) == "not_delivered"
    assert verdict.findings[0].effect_nats == pytest.approx(verdict.figures["shift_abs_mean_nats"], rel=1e-3)


def test_an_engine_that_serves_each_update_one_sync_late_is_told_from_one_that_serves_none(sides):
    waiting = [{name: value.clone() for name, value in sides.pair.engine.model.state_dict().items()}]

    def late(sent, held):
        waiting.append(sent)
        return waiting.pop(0)

    sides.pair.engine.weights = late
    assert cause(sides.judged()) == "one_version_behind"


def test_a_packed_copy_of_the_head_is_named(sides):
    sides.pair.engine.weights = keeping("head")
    verdict = sides.judged()
    assert cause(verdict) == "stale_head"
    assert verdict.figures["residue_head_old_abs_mean_nats"] < 1e-6


@pytest.mark.parametrize(
    ("names", "label"),
    [((MIX,), MIX), (("embed",), "embed"), (("layers.0.mix.weight", MIX), "mix.weight of layers 0 to 1")],
)
def test_tensors_that_are_old_are_named_and_no_others(sides, names, label):
    sides.pair.engine.weights = keeping(*names)
    verdict = sides.judged()
    assert cause(verdict) == "stale_tensors"
    assert verdict.summary.endswith(f"{label} is old")


def test_a_scale_that_is_folded_in_twice_is_fitted(sides):
    sides.pair.engine.weights = lambda sent, held: sent | {MIX: sent[MIX] * 1.25}
    verdict = sides.judged()
    assert cause(verdict) == "altered_on_load"
    assert verdict.summary.endswith(f"{MIX} is times 1.25")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_way_through_a_coarser_dtype_is_named(sides, dtype):
    sides.pair.engine.weights = lambda sent, held: {
        name: v.to(getattr(torch, dtype)).float() for name, v in sent.items()
    }
    verdict = sides.judged()
    assert cause(verdict) == "altered_on_load"
    assert f"every tensor is rounded to {dtype}" in verdict.summary


def test_weights_that_are_neither_old_nor_new_are_left_unexplained(sides):
    other = dict(Bag(seed=5).named_parameters())
    sides.pair.engine.weights = lambda sent, held: {name: value.detach() for name, value in other.items()}
    verdict = sides.judged()
    assert cause(verdict) == "unexplained_weights"
    for hypothesis in ("all new", "none delivered", "head old"):
        assert hypothesis in verdict.findings[0].evidence


@pytest.mark.parametrize("tag", [3, PROBE_VERSION])
def test_a_wrong_tag_is_found_where_the_numbers_are_right(sides, tag):
    drawn = sides.pair.engine._drawn
    spans = (VersionSpan(0, weights.CACHE_TOKENS, tag),)

    def tagged(*args):
        return changed(drawn(*args), version_spans=spans)

    sides.pair.engine._drawn = tagged
    # Right after the update; then the sample before it is the one that is wrong.
    if tag == PROBE_VERSION:
        sides.sample.samples = [
            replace(s, version_spans=(VersionSpan(0, len(s.token_ids), tag),)) for s in sides.sample
        ]
    verdict = sides.judged()
    assert cause(verdict) == "version_tag"
    assert verdict.findings[0].effect_nats == 0.0, "a wrong tag moves no number"
    assert str(tag) in verdict.summary


def test_tags_are_not_asked_of_an_engine_that_gives_none():
    sides = Sides()
    capability = sides.pair.engine.ready.capabilities
    capability["version_spans"] = type(capability["version_spans"])(False, "none")
    sides.sample.samples = [replace(s, version_spans=(VersionSpan(0, 1, 99),)) for s in sides.sample]
    assert sides.judged().status == "PASS"


def test_answers_from_a_cache_of_the_old_weights_are_named_with_the_largest(sides):
    engine = sides.pair.engine
    drawn = engine._drawn
    old = {}

    def cached(row, sample, prompt, asked):
        now = drawn(row, sample, prompt, asked)
        return changed(now, logprobs=old.setdefault(prompt.tobytes(), now).logprobs)

    engine._drawn = cached
    verdict = sides.judged()
    assert cause(verdict) == "stale_prefix_cache"
    assert (
        verdict.findings[0].n_tokens
        == 2 * sides.canary.scores.size + weights.CACHE_PROMPTS * weights.CACHE_TOKENS
    )


def test_what_the_sides_differ_by_over_the_same_prompts_before_the_update_is_no_stale_cache(sides):
    sides.pair.engine.numbers = lambda numbers, *_: numbers - np.float32(0.05)
    verdict = sides.judged()
    assert verdict.status == "PASS"
    assert "no stale prefix cache" not in verdict.summary, "it would not have been seen"


def loads_until(engine, n):
    """The first ``n`` loads arrive, and those after them do not."""
    count = []

    def load(sent, held):
        count.append(1)
        return sent if len(count) <= n else held

    engine.weights = load


def test_weights_that_do_not_come_back_are_a_failure_of_the_second_sync(sides):
    loads_until(sides.pair.engine, 1)
    verdict = sides.judged()
    assert cause(verdict) == "not_delivered"
    assert "put back did not arrive" in verdict.summary


def test_an_engine_started_on_another_checkpoint_is_found_by_the_sync_that_mends_it():
    sides = Sides()
    sides.canary.clean_gap_nats = 0.0  # nothing was ever synced
    sides.pair.engine.model = Bag(seed=9)
    sides.sample = gather(sides.pair).neutral
    verdict = sides.judged()
    assert cause(verdict) == "checkpoint_differs"
    assert verdict.findings[0].effect_nats == pytest.approx(
        verdict.figures["before_sync_abs_mean_nats"], rel=1e-5
    )
    assert verdict.figures["after_restore_abs_max_nats"] < 1e-5


def test_a_perturbation_that_nothing_feels_proves_nothing(sides, monkeypatch):
    real = perturbation.Perturbed
    monkeypatch.setattr(
        perturbation, "Perturbed", lambda before, scale, seed: real(before, scale * 1e-4, seed)
    )
    verdict = sides.judged()
    assert verdict.status == "NOT_RUN"
    assert "no stale weight could be seen" in verdict.reason


def test_sides_that_differ_anyway_are_judged_by_their_moves(sides, monkeypatch):
    """An engine whose every score is off by more than the perturbation moves: the move says what arrived."""
    asked = Look(None, n_tensors=9, n_seen=7)
    monkeypatch.setattr(weights, "proven_each", lambda pair: (asked, []))
    sides.canary.clean_gap_nats = 0.0
    sides.pair.engine.scores = lambda scores, n: scores - np.float32(0.3)
    verdict = sides.judged()
    assert verdict.figures["judged_by"] == "moves"
    assert verdict.status == "PASS"
    assert "no stale tensor, where 7 of 9 would have shown" in verdict.summary
    assert (verdict.figures["tensors"], verdict.figures["tensors_seen"]) == (9, 7)
    old = TensorLeft(Direction("old", ("a",), "a"), Missing(1.0, 0.1, 4), np.ones(4), np.arange(4))
    monkeypatch.setattr(weights, "proven_each", lambda pair: (asked, [old]))
    named = sides.judged()
    assert (cause(named), named.summary.endswith("a is old")) == ("stale_tensors", True)
    assert "a did not move when it was moved alone" in named.findings[0].evidence
    stuck = Sides()
    stuck.canary.clean_gap_nats = 0.0
    stuck.pair.engine.scores = lambda scores, n: scores - np.float32(0.3)
    stuck.pair.engine.weights = lambda sent, held: held
    assert cause(stuck.judged()) == "not_delivered"


def test_the_receipt_is_the_last_syncs(sides):
    figures = sides.judged().figures
    receipt = sides.pair.receipt
    assert isinstance(receipt, LoadReceipt)
    assert receipt.version == sides.pair.version
    assert figures["receipt_n_tensors"] == receipt.n_tensors
    assert figures["receipt_cache_cleared"] is receipt.cache_cleared
    assert figures["receipt_repacked"] == ", ".join(receipt.repacked)
