"""The gate: what arithmetic brings passes, and one wrong number in a hundred thousand does not."""

import dataclasses

import numpy as np
import pytest
from msgspec.structs import replace

from lockstep.config.recipe import Objective
from lockstep.parity.gate import Gate, Measured
from lockstep.parity.own_noise import OwnNoise
from lockstep.parity.tolerances import NOISE, largest_gap
from lockstep.training.step import AtSampling

FP32, BF16 = NOISE["torch.float32"], NOISE["torch.bfloat16"]
CLEAN = {
    "fp32": Measured(p50=7e-6, mean=0.0, mean_se=1e-6),
    "bf16": Measured(p50=0.03, mean=-0.002, mean_se=0.003),
}
LENGTH = 50


def gate(kind, **clip):
    noise = {"fp32": FP32, "bf16": BF16}[kind]
    return Gate(noise, temperature=1.0, clip=replace(Objective(), **clip), measured=CLEAN[kind])


def tokens(n, kind, seed=0):
    """A step as a clean backend gives it: errors of the log-odds, so a certain token has next to none."""
    rng = np.random.default_rng(seed)
    trainer = np.log(rng.beta(0.6, 0.4, n)).clip(-15, -1e-7)
    noise = rng.normal(0.0, {"fp32": 1.2e-5, "bf16": 0.05}[kind], n) * -np.expm1(trainer)
    owners = np.arange(n) // LENGTH
    return AtSampling(trainer.astype(np.float32), (trainer - noise).astype(np.float32), owners)


def moved(at, where, by):
    engine = at.engine_logprobs.copy()
    engine[where] += np.float32(by)
    return AtSampling(at.sampling_logprobs, engine, at.owners)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [100, 3_000, 100_000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clean_step_is_admitted(kind, n, seed):
    assert gate(kind).refusals(tokens(n, kind, seed)) == []


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("by", [20.0, -20.0])
def test_one_token_of_a_hundred_thousand_is_seen_and_told(kind, by):
    (reason,) = gate(kind).refusals(moved(tokens(100_000, kind), 70_007, by))
    assert "1 of 100000 tokens" in reason
    assert f"token 70007, of completion {70_007 // LENGTH}" in reason


def test_numbers_three_nats_off_are_refused_in_a_short_step():
    assert gate("fp32").refusals(moved(tokens(320, "fp32"), slice(None), 3.0))


@pytest.mark.parametrize("bias", [0.3, -0.3, 0.85])
def test_a_bias_over_a_bf16_step_is_refused(bias):
    assert gate("bf16").refusals(moved(tokens(2_000, "bf16"), slice(None), bias))


def test_a_bias_that_hides_in_the_median_is_refused_by_the_mean():
    """Every tenth token 0.8 nats off: the median stays and the tail is within bf16's."""
    at = moved(tokens(20_000, "bf16"), slice(None, None, 10), -0.8)
    reasons = gate("bf16", clip_low=0.9, clip_high=100.0).refusals(at)
    assert any(reason.startswith("mean gap") for reason in reasons), reasons
    assert any("for the mismatch alone" in reason for reason in gate("bf16").refusals(at))


def test_where_sides_round_more_clips_than_one_in_twenty_are_refused_once_they_are_no_chance():
    """Six in a hundred: of 400 tokens chance, of 40,000 none."""
    own = OwnNoise(edges=(), engine=(0.1,), trainer=(0.1,))
    for n, refused in ((400, False), (40_000, True)):
        step = tokens(n, "bf16")
        apart = np.flatnonzero(step.sampling_logprobs < np.log(0.3))[::4]
        off = moved(step, apart, 0.4 * np.resize((1.0, -1.0), apart.size))
        clipped = np.abs(np.expm1(off.sampling_logprobs - off.engine_logprobs)) > 0.2
        assert 0.05 < clipped.mean() < 0.08
        rounds, exact = (dataclasses.replace(gate("bf16"), own=one).refusals(off) for one in (own, None))
        assert [("lie outside" in reason) for reason in rounds] == [True] * refused
        assert [("lie outside" in reason) for reason in exact] == [True]


def test_where_sides_round_one_unlikely_token_of_a_few_hundred_is_no_tail():
    """It is their p99.9, and says nothing of one in a thousand."""
    own = OwnNoise(edges=(), engine=(0.05,), trainer=(0.05,))
    judge = dataclasses.replace(gate("bf16"), own=own)
    for n, each, refused in ((400, 400, False), (10_000, 100, True)):
        step = tokens(n, "bf16")
        unlikely = np.flatnonzero(step.sampling_logprobs < np.log(0.2))[: n // each]
        off = moved(step, unlikely, 1.2 * np.resize((1.0, -1.0), unlikely.size))
        assert ["p99.9" in reason for reason in judge.refusals(off)] == [True] * refused


def test_a_certain_token_may_move_by_less_than_an_unlikely_one():
    certain = np.log1p(-np.float64(1e-6))
    unlikely = np.float64(-10.0)
    limits = largest_gap(np.array([certain, unlikely]), BF16, 1.0)
    assert limits[0] < 2e-4
    assert limits[1] == pytest.approx(3 * BF16.p999, rel=1e-3)
    at = AtSampling(
        np.full(200, certain, np.float32), np.full(200, certain, np.float32), np.arange(200) // 10
    )
    assert gate("bf16").refusals(at) == []
    # A certain token for one side, a hundredth less for the other: bf16 does not bring that.
    off = moved(at, 17, -0.01)
    assert "token 17" in gate("bf16").refusals(off)[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused(value):
    at = tokens(100, "fp32")
    at.engine_logprobs[3] = value
    (reason,) = gate("fp32").refusals(at)
    assert "1 of 100 tokens without a finite log-probability" in reason


def test_nothing_is_not_admitted():
    none = np.empty(0, np.float32)
    assert gate("fp32").refusals(AtSampling(none, none, np.empty(0, int)))
