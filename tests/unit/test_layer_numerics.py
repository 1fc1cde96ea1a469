"""Layer 4 on constructed gaps: judged by their tail and by what the objective would clip, never by a mean."""

from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.config.recipe import Objective
from lockstep.parity.evidence import Floors, gather
from lockstep.parity.layers import numerics
from lockstep.parity.layers.path import judge as judge_path
from lockstep.parity.tolerances import NOISE
from lockstep.records.capabilities import Capability
from tests.unit.bag_pair import bag_pair

FP32, BF16 = NOISE["torch.float32"], NOISE["torch.bfloat16"]
OWNERS = np.repeat(np.arange(20), 50)
T = OWNERS.size
NAMED = ("head_precision", "because", "a fix")


def judged(gap, noise=FP32, clip=Objective()):
    asked = []

    def cause_of():
        asked.append(1)
        return NAMED

    verdict = numerics.judge_gap(np.asarray(gap, np.float32), OWNERS, noise, clip, cause_of, {"note": ""})
    assert len(asked) == (verdict.status == "FAIL"), "a cause is looked for only where something is wrong"
    return verdict


def gap_of(share, size):
    """``share`` of the tokens ``size`` off, spread over all completions; the others right."""
    gap = np.zeros(T, np.float32)
    gap[np.linspace(0, T - 1, round(share * T)).astype(int)] = size
    return gap


@pytest.mark.parametrize(
    ("gap", "noise", "status"),
    [
        (gap_of(1.0, 0.9e-4), FP32, "PASS"),
        (gap_of(1.0, 1.1e-4), FP32, "FAIL"),  # the median
        (gap_of(0.4, 0.9e-3), FP32, "PASS"),
        (gap_of(0.004, 1.1e-3), FP32, "FAIL"),  # the tail alone
        (gap_of(1.0, 0.08), BF16, "PASS"),
        (gap_of(0.04, 0.5), BF16, "PASS"),
        (gap_of(0.06, 0.5), BF16, "FAIL"),  # more than a twentieth would be clipped
        (gap_of(0.06, -0.5), BF16, "FAIL"),
    ],
)
def test_the_limits(gap, noise, status):
    verdict = judged(gap, noise)
    assert verdict.status == status
    assert verdict.n_tokens == T
    if status == "FAIL":
        (found,) = verdict.findings
        assert (found.cause, found.fix) == (NAMED[0], NAMED[2])
        assert NAMED[1] in found.evidence
        assert found.effect_nats == pytest.approx(float(np.abs(gap).mean()), rel=1e-5)


def test_gaps_that_cancel_in_the_mean_are_seen():
    gap = np.where(np.arange(T) % 2, 0.01, -0.01)
    verdict = judged(gap)
    assert verdict.figures["gap_mean_nats"] == pytest.approx(0.0, abs=1e-9)
    assert verdict.status == "FAIL"
    assert verdict.findings[0].ci95[0] > 0.009


def test_what_would_be_clipped_depends_on_the_recipes_own_range():
    gap = gap_of(0.5, 0.15)
    assert judged(gap, bearing(p50=1.0), Objective(clip_low=0.2, clip_high=0.2)).status == "PASS"
    narrow = judged(gap, bearing(p50=1.0), Objective(clip_low=0.2, clip_high=0.1))
    assert narrow.figures["phantom_clip_fraction"] == 0.5
    assert "clipping outside [0.8, 1.1], would clip 50.00%" in narrow.findings[0].evidence


def bearing(p50):
    return msgspec.structs.replace(BF16, p50=p50)


@settings(max_examples=20)
@given(at=st.integers(0, T - 1), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_one_number_that_is_none_never_passes(at, value):
    gap = np.zeros(T, np.float32)
    gap[at] = value
    with np.errstate(invalid="ignore"):
        verdict = judged(gap)
    assert verdict.status == "FAIL"
    assert not np.isfinite(verdict.findings[0].effect_nats)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-7, 1e-2))
def test_the_tail_is_judged_alike_whatever_the_sign_and_the_order(seed, scale):
    rng = np.random.default_rng(seed)
    gap = (rng.standard_t(3, T) * scale).astype(np.float32)
    status = judged(gap).status
    assert judged(-gap).status == status
    assert judged(rng.permutation(gap)).status == status
    assert judged(gap, BF16).status == "PASS", "a wider arithmetic bears what a narrow one does not"


@pytest.fixture
def pair():
    return bag_pair(sampling={"max_tokens": 12, "temperature": 0.7})


def of_pair(pair, evidence):
    return numerics.judge(pair, evidence, judge_path(pair, evidence))


def test_a_clean_pair_passes_with_every_token_in_a_bin(pair):
    evidence = gather(pair)
    verdict = of_pair(pair, evidence)
    n = evidence.own.engine_logprobs.size
    assert (verdict.status, verdict.n_tokens) == ("PASS", n)
    for bins in ("by_probability", "by_position"):
        assert sum(part["n"] for part in verdict.figures[bins].values()) == n
    assert verdict.figures["by_position"]["0-1"]["n"] == 8, "the first token of each completion"


def test_how_far_the_re_score_is_from_the_trainer_is_kept_and_of_none_nothing(pair):
    evidence = gather(pair)
    evidence = replace(evidence, rescored=evidence.trainer - np.float32(0.25))
    figures = of_pair(pair, evidence).figures
    assert figures["neutral_n_tokens"] == evidence.neutral.engine_logprobs.size
    for quantile in ("p50", "p90", "p99", "p999", "max"):
        assert figures[f"rescore_to_trainer_abs_{quantile}_nats"] == pytest.approx(0.25, rel=1e-5)
    path = judge_path(pair, evidence)
    pair.engine.ready.capabilities["rescore"] = Capability(False, "it cannot")
    assert not [name for name in numerics.judge(pair, evidence, path).figures if "rescore" in name]


def test_a_trainer_that_does_not_repeat_itself_is_at_fault_whatever_the_gap(pair):
    evidence = gather(pair)
    again = evidence.floors.repeat + np.float32(0.02)
    verdict = of_pair(pair, replace(evidence, floors=replace(evidence.floors, repeat=again)))
    assert [found.cause for found in verdict.findings] == ["trainer_not_repeatable"]
    assert verdict.findings[0].effect_nats == pytest.approx(0.02, rel=1e-3)
    assert verdict.figures["floor_trainer_repeat_abs_p999_nats"] == pytest.approx(0.02, rel=1e-3)


def test_a_trainer_that_depends_on_its_batch_is_named_over_the_sequences_that_were_alone(pair):
    evidence = gather(pair)
    alone = evidence.floors.alone.copy()
    alone[:12] += 0.5
    verdict = of_pair(pair, replace(evidence, floors=replace(evidence.floors, alone=alone)))
    assert [found.cause for found in verdict.findings] == ["trainer_batch_dependent"]
    assert verdict.findings[0].n_tokens == evidence.floors.half.sum() == 4 * 12
    assert verdict.findings[0].effect_nats == pytest.approx(0.5 / 4, rel=1e-3)


def test_the_gap_is_told_in_units_of_the_larger_sides_own_noise(pair):
    evidence = gather(pair)
    floors = Floors(evidence.floors.repeat, np.full_like(evidence.floors.alone, 2e-5), evidence.floors.half)
    evidence = replace(evidence, floors=floors, own_trainer=evidence.own.engine_logprobs + np.float32(6e-5))
    assert of_pair(pair, evidence).figures["gap_p999_in_floors"] == pytest.approx(3.0, rel=0.05)


def test_a_gap_beyond_arithmetic_is_explained_by_what_is_known_of_the_pair(pair, monkeypatch):
    seen = []

    def explain(pair, sample, gap):
        seen.append(gap)
        return SimpleNamespace(cause="tensor_scaled", evidence="so")

    monkeypatch.setattr(numerics, "explain", explain)
    evidence = gather(pair)
    evidence.own.fill(engine_logprobs=evidence.own.engine_logprobs - np.float32(0.02))
    verdict = of_pair(pair, evidence)
    assert [found.cause for found in verdict.findings] == ["tensor_scaled"]
    assert verdict.findings[0].effect_nats == pytest.approx(0.02, rel=1e-3)
    np.testing.assert_allclose(seen[0], 0.02, rtol=1e-3, err_msg="trainer − engine, not the other way")


def test_dtypes_that_differ_are_said_beside_a_pass(pair, monkeypatch):
    # The tables of this model cannot be held in another dtype: tests/faults/test_directions.py does that.
    monkeypatch.setattr(numerics, "_against_own_noise", lambda *_: None)
    pair.engine.ready.resolved["worker.parameter_dtype"] = "torch.bfloat16"
    verdict = of_pair(pair, gather(pair))
    assert "engine body torch.bfloat16, trainer torch.float32: the clip range bears it" in verdict.summary
    pair.engine.ready.resolved.update(
        {"worker.parameter_dtype": "torch.float32", "worker.head_dtype": "torch.bfloat16"}
    )
    assert "engine head torch.bfloat16, trainer torch.float32" in of_pair(pair, gather(pair)).summary
