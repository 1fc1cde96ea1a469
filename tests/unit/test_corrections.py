"""Corrections: their formulas and bounds, and that they are nothing on a perfect backend."""

import math

import pytest
import torch

from lockstep.config.objective import Objective
from lockstep.errors import RecipeError
from lockstep.objectives.corrections.registry import CORRECTIONS, bounds_of, correction_of, refuse_correction
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


@pytest.mark.parametrize("name", CORRECTIONS)
def test_noise_of_a_certified_fp32_pair_is_masked_by_none(name):
    """The largest gap that README has of any engine, with both signs, over whole sequences."""
    ratios = torch.exp(torch.tensor([8e-5, 8e-5, -8e-5, -8e-5, 8e-5], dtype=torch.float64))
    found = corrected(name, ratios)
    assert (found.weights > 0.999).all()
    assert torch.equal(found.weights, found.uncut)


def test_bounds_that_would_act_on_a_perfect_backend_are_refused():
    with pytest.raises(RecipeError, match=r"got \[0, 0\.5\], expected bounds with 1 between them"):
        refuse_correction(Objective(correction="tis", correction_high=0.5))
    with pytest.raises(RecipeError, match="bounds of a correction that is 'none'"):
        refuse_correction(Objective(correction_high=3.0))
    assert bounds_of(Objective(correction="masked_is")) == (0.5, 5.0)
    assert bounds_of(Objective(correction="tis", correction_high=math.inf)) == (0.0, math.inf)
