"""A gap is held against the two sides' own rounding, whatever its size: clean is about 1, more is told so."""

import numpy as np
import pytest

from lockstep.config.recipe import Objective
from lockstep.parity.gate import Gate, Measured
from lockstep.parity.own_noise import OwnNoise
from lockstep.parity.tolerances import NOISE, OWN_NOISE_LARGEST, OWN_NOISE_RATIO
from lockstep.training.step import AtSampling

SIZES = [0.001, 0.03]
"""Of the log-odds' rounding, nats: of a large model, and of a small one."""
LENGTH = 32


def drawn(n, seed):
    """log p of tokens, and how much of a rounding of the log-odds reaches it."""
    logprobs = np.log(np.random.default_rng(seed).beta(0.6, 0.4, n)).clip(-15, -1e-6)
    return logprobs, -np.expm1(logprobs)


def rounded(size, odds, rng):
    """Heavy-tailed, of one width for a whole sequence, as rounding is."""
    wide = np.exp(rng.normal(0, 0.3, odds.size // LENGTH + 1))[np.arange(odds.size) // LENGTH]
    return size * wide * rng.standard_t(4, odds.size) * odds


def noise_of(size, seed=0, n=1024):
    """As a check measures it: the engine's decode beside its prefill, the trainer beside fp32."""
    rng = np.random.default_rng(seed)
    logprobs, odds = drawn(n, seed)
    engine = (rounded(size, odds, rng) - rounded(size, odds, rng)) / np.sqrt(2)
    return OwnNoise.measured(logprobs, [engine], rounded(size, odds, rng))


def gap_of(size, n, seed, times=1.0):
    rng = np.random.default_rng(seed)
    logprobs, odds = drawn(n, seed)
    gap = times * (rounded(size, odds, rng) - rounded(size, odds, rng))
    return gap, logprobs, np.arange(n) // LENGTH


@pytest.mark.parametrize("size", SIZES)
def test_a_right_pair_of_any_size_is_about_once_as_wide_as_its_own_noise(size):
    noise = noise_of(size)
    held = 0
    for seed in range(1, 41):
        found = noise.ratio(*gap_of(size, 512, seed))
        assert 0.7 < found.value < 1.4, found.told()
        assert not found.exceeded
        held += found.low <= 1.0 <= found.high
    assert held >= 36, "the interval holds the truth, but for the width's own error"


@pytest.mark.parametrize("size", SIZES)
def test_noise_three_times_as_wide_is_told_and_refused(size):
    found = noise_of(size).ratio(*gap_of(size, 512, 1, times=3.0))
    assert found.exceeded
    assert found.value == pytest.approx(3.0, rel=0.3)


def test_fewer_tokens_widen_the_interval_and_a_few_sequences_refuse_nothing():
    many, few = (noise_of(0.03).ratio(*gap_of(0.03, n, 1, times=3.0)) for n in (4096, 320))
    assert few.high / few.low > 1.5 * many.high / many.low
    two = noise_of(0.03).ratio(*gap_of(0.03, 2 * LENGTH, 1, times=30.0))
    assert two.value > 10
    assert not two.exceeded


def test_a_colder_temperature_widens_what_is_allowed():
    noise = noise_of(0.03)
    gap, logprobs, owners = gap_of(0.03, 512, 1, times=1 / 0.5)
    assert noise.ratio(gap, logprobs, owners, temperature=0.5).value == pytest.approx(1.0, rel=0.35)


def gate(size):
    """Of a pair whose noise is a thirtieth of what the table of bf16 allows, or as large."""
    measured = Measured(p50=0.02, mean=0.0, mean_se=0.003)
    return Gate(NOISE["torch.bfloat16"], 1.0, Objective(), measured, noise_of(size))


def step(gap, logprobs, owners):
    return AtSampling(logprobs.astype(np.float32), (logprobs - gap).astype(np.float32), owners)


@pytest.mark.parametrize("size", SIZES)
def test_the_gate_admits_a_clean_step_and_refuses_one_that_is_wider(size):
    assert gate(size).refusals(step(*gap_of(size, 4096, 3))) == []
    reasons = gate(size).refusals(step(*gap_of(size, 4096, 3, times=2.5)))
    assert any("times as wide as both sides' own rounding" in reason for reason in reasons), reasons


def test_the_gate_holds_each_token_to_the_pairs_own_noise_and_not_to_the_tables():
    gap, logprobs, owners = gap_of(0.001, 4096, 4)
    (place,) = np.flatnonzero(logprobs < -2)[:1]
    gap[place] = 2 * OWN_NOISE_LARGEST * 0.001 * 1.5
    assert gap[place] < NOISE["torch.bfloat16"].p999
    (reason,) = gate(0.001).refusals(step(gap, logprobs, owners))
    assert f"1 of 4096 tokens beyond what arithmetic can bring at their probability: token {place}" in reason


def test_it_is_read_back_from_a_verdicts_figures():
    noise = noise_of(0.03)
    assert OwnNoise.of({"own_noise": noise.figures()}) == noise
    assert OwnNoise.of({}) is None
    assert OWN_NOISE_RATIO > 1.0
