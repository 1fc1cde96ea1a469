"""Corrections: their formulas and bounds, and that they are nothing on a perfect backend."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lockstep.config.objective import Objective
from lockstep.errors import RecipeError
from lockstep.objectives.corrections.registry import CORRECTIONS, bounds_of, correction_of, refuse_correction
from lockstep.objectives.grpo import grpo
from lockstep.parity.tolerances import NOISE
from tests.unit.loss_inputs import inputs_of

OWNERS = torch.tensor([0, 0, 1, 1, 1])
RATIOS = torch.tensor([0.4, 3.0, 1.0, 1.1, 0.9], dtype=torch.float64)


def corrected(name, ratios=RATIOS, mask=None, **bounds):
    zero = torch.zeros_like(ratios)
    mask = torch.ones(len(ratios), dtype=torch.bool) if mask is None else mask
    inputs = inputs_of(
        zero.clone().requires_grad_(),
        zero,
        zero,
        engine_logprobs=-ratios.log(),
        sequence_ids=OWNERS,
        loss_mask=mask,
    )
    correct = correction_of(Objective(correction=name, **bounds))
    found = correct(inputs)
    assert not found.weights.requires_grad
    return found


PRODUCTS = (1.2, 0.99)
MEANS = (1.2 ** (1 / 2), 0.99 ** (1 / 3))
EXPECTED = {
    "tis": (0.4, 2.0, 1.0, 1.1, 0.9),
    "sequence_tis": (1.2, 1.2, 0.99, 0.99, 0.99),
    "masked_is": (0.0, 3.0, 1.0, 1.1, 0.9),
    "geometric_rejection": (0.0, 0.0, 0.0, 0.0, 0.0),
    "sequence_mask": (1.0, 1.0, 1.0, 1.0, 1.0),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_is_its_formula_within_the_published_bounds(name):
    found = corrected(name)
    assert found.weights.tolist() == pytest.approx(EXPECTED[name], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "low", "high", "kept"),
    [
        ("geometric_rejection", 0.99, 1.01, [False, True]),  # 1.095 and .9967
        ("geometric_rejection", 0.999, 1.2, [True, False]),
        ("sequence_mask", 0.995, 1.3, [True, False]),  # 1.2 and .99
        ("sequence_mask", 0.9, 1.1, [False, True]),
    ],
)
def test_a_sequence_is_kept_or_left_out_whole(name, low, high, kept):
    found = corrected(name, correction_low=low, correction_high=high)
    assert found.weights.tolist() == torch.tensor(kept, dtype=torch.float64)[OWNERS].tolist()


def test_caps_hold_from_above_and_masks_from_both_sides():
    assert float(corrected("tis", correction_high=2.5).weights[1]) == 2.5
    assert float(corrected("sequence_tis", correction_high=1.1).weights[0]) == pytest.approx(1.1)
    two_sided = corrected("masked_is", correction_low=0.95, correction_high=1.05)
    assert two_sided.weights.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_what_the_model_did_not_sample_is_in_no_product():
    """There the trainer's number stands for the engine's; even a wrong one would reach no other token."""
    mask = torch.tensor([True, False, True, True, True])
    assert corrected("sequence_tis", mask=mask).weights[0] == pytest.approx(0.4)
    assert (
        corrected("geometric_rejection", mask=mask, correction_low=0.39, correction_high=2.0).weights[0]
        == 1.0
    )


@pytest.mark.parametrize("name", CORRECTIONS)
def test_where_both_sides_agree_each_is_1_bit_for_bit(name):
    assert torch.equal(corrected(name, torch.ones_like(RATIOS)).weights, torch.ones_like(RATIOS))


LARGEST = 5.6e-5
"""The quick start's, nats (README): what the ladder certifies of an fp32 pair is not 0."""


def gaps(size, sequences=40, tokens=50):
    """Sequences of gaps that err to both sides, and one that errs to one side throughout."""
    rng = np.random.default_rng(0)
    found = rng.normal(0.0, size / 3, (sequences, tokens)).clip(-size, size)
    found[0] = size
    return torch.tensor(found.reshape(-1), dtype=torch.float32), torch.arange(sequences).repeat_interleave(
        tokens
    )


def loss_on(gap, owners, name):
    """A loss under a correction, or none, and its gradient; version-exact, so that the policy ratio is 1."""
    now = torch.linspace(-3.0, -0.1, len(gap)).requires_grad_()
    old = now.detach().clone()
    inputs = inputs_of(
        now, old, torch.sin(torch.arange(len(gap))), engine_logprobs=old - gap, sequence_ids=owners
    )
    correct = correction_of(Objective(correction=name))
    if correct is not None:
        inputs = replace(inputs, corrections=correct(inputs).weights)
    loss = grpo(inputs, clip_low=0.2, clip_high=0.2, dual_clip=math.inf).loss
    loss.backward()
    return loss.detach(), now.grad


@pytest.mark.parametrize("name", CORRECTIONS)
def test_each_is_the_identity_bit_for_bit_on_a_certified_fp32_pair(name):
    gap, owners = gaps(LARGEST)
    for corrected, plain in zip(loss_on(gap, owners, name), loss_on(gap, owners, "none"), strict=True):
        assert torch.equal(corrected, plain)


@pytest.mark.parametrize("name", ["tis", "masked_is", "sequence_tis"])
def test_more_than_the_rounding_of_fp32_is_corrected_by_what_it_is(name):
    more = 2.5e-4
    gap = torch.zeros(100).index_fill(0, torch.tensor([7]), more)
    owners = torch.arange(2).repeat_interleave(50)
    _, corrected = loss_on(gap, owners, name)
    _, plain = loss_on(gap, owners, "none")
    moved = torch.arange(50) if name == "sequence_tis" else torch.tensor([7])
    expected = plain.index_copy(0, moved, plain[moved] * math.exp(more))
    assert torch.allclose(corrected, expected, rtol=1e-6, atol=0.0)
    assert not torch.equal(corrected, plain)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_each_is_the_identity_bit_for_bit_where_both_sides_compute_alike(name):
    gap, owners = gaps(0.0)
    for corrected, plain in zip(loss_on(gap, owners, name), loss_on(gap, owners, "none"), strict=True):
        assert torch.equal(corrected, plain)


def test_the_published_geometric_bounds_are_no_identity_on_a_certified_bf16_pair():
    """Three sequences in four of 100 tokens are left out, with gaps that the ladder passes."""
    rng = np.random.default_rng(0)
    gap = torch.tensor(rng.normal(0.0, 0.03, 400 * 100), dtype=torch.float32)
    owners = torch.arange(400).repeat_interleave(100)
    assert float(gap.abs().median()) < NOISE["torch.bfloat16"].p50
    _, grads = loss_on(gap, owners, "geometric_rejection")
    left_out = float((grads.reshape(400, 100) == 0.0).all(1).float().mean())
    assert 0.65 < left_out < 0.82


def test_bounds_that_would_act_on_a_perfect_backend_are_refused():
    with pytest.raises(RecipeError, match=r"got \[0, 0\.5\], expected bounds with 1 between them"):
        refuse_correction(Objective(correction="tis", correction_high=0.5))
    with pytest.raises(RecipeError, match="bounds of a correction that is 'none'"):
        refuse_correction(Objective(correction_high=3.0))
    assert bounds_of(Objective(correction="masked_is")) == (0.5, 5.0)
    assert bounds_of(Objective(correction="tis", correction_high=math.inf)) == (0.0, math.inf)
