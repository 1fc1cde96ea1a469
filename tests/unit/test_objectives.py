"""Every objective against the closed form of its gradient; against finite differences where it has no stop.

Each token is its own minibatch of weight 1 unless said otherwise, so that the gradient is ∂L_t/∂now of the
published formula. Points lie inside: never on a bound.
"""

import math

import numpy as np
import pytest
import torch

from lockstep.config.recipe import Objective
from lockstep.objectives.aggregation import token_weights
from lockstep.objectives.catalogue import OBJECTIVES
from lockstep.objectives.registry import loss_of
from tests.unit.loss_inputs import inputs_of

LOW, HIGH = 0.2, 0.3
RATIOS = [0.2, 0.7, 0.9, 1.0, 1.15, 1.6, 4.0, 30.0]
P_OLD = 0.02
"""Probability of the token when it was drawn, so that a ratio of 30 is .6."""


def clip(ratio, low, high):
    return min(max(ratio, low), high)


def grpo_slope(r, a, dual=math.inf):
    clipped = (a > 0 and r > 1 + HIGH) or (a < 0 and r < 1 - LOW) or (a < 0 and r > dual)
    return 0.0 if clipped else -a * r


def dppo_slope(r, a, low=0.05, high=0.1, cap=20.0):
    moved = P_OLD * (r - 1.0)
    keep = moved <= high if a > 0 else moved >= -low
    return -a * min(r, cap) * keep


def gspo_slope(r, a, low=0.15, high=0.25):
    clipped = (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low)
    return 0.0 if clipped else -a * r


# (name, options, ∂L/∂now as a function of ratio and advantage): async-free, lag 0
TABLE = {
    "grpo": ("grpo", {}, grpo_slope),
    "grpo, dual clip": ("grpo", {"dual_clip": 3.0}, lambda r, a: grpo_slope(r, a, dual=3.0)),
    "reinforce++": ("reinforce++", {}, grpo_slope),
    "gspo": ("gspo", {"low": 0.15, "high": 0.25}, gspo_slope),
    "cispo": ("cispo", {}, lambda r, a: -a * clip(r, 0.0, 5.0)),
    "cispo, two-sided": ("cispo", {"low": 0.8, "high": 1.2}, lambda r, a: -a * clip(r, 0.8, 1.2)),
    "reinforce": ("reinforce", {}, lambda r, a: -a * min(r, 2.0)),
    "reinforce, no weight": ("reinforce", {"high": 0.0}, lambda r, a: -a),
    "rloo": ("rloo", {"high": 1.3}, lambda r, a: -a * min(r, 1.3)),
    "topr": ("topr", {}, lambda r, a: -a if a >= 0 else -a * clip(r, 0.0, 1.0)),
    "dppo_tv": ("dppo_tv", {"low": 0.05, "high": 0.1}, dppo_slope),
    "decoupled_ppo": ("decoupled_ppo", {}, grpo_slope),
}


def loss_and_slope(name, options, ratio, advantage, dtype=torch.float64, **others):
    old = torch.full((1,), math.log(P_OLD), dtype=dtype)
    now = (old + math.log(ratio)).requires_grad_()
    objective = Objective(name=name, options=options, clip_low=LOW, clip_high=HIGH)
    outputs = loss_of(objective)(inputs_of(now, old, torch.full((1,), advantage, dtype=dtype), **others))
    outputs.loss.backward()
    return float(outputs.loss.detach()), float(now.grad), bool(outputs.clipped)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("advantage", [1.5, -0.7])
@pytest.mark.parametrize("row", TABLE)
def test_the_gradient_is_the_closed_form_on_both_sides_of_each_bound(row, advantage, ratio):
    name, options, slope = TABLE[row]
    _, found, clipped = loss_and_slope(name, options, ratio, advantage)
    expected = slope(ratio, advantage)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert clipped is (expected == 0.0)


def test_every_registered_objective_is_in_the_table():
    theirs = {name for name, known in OBJECTIVES.items() if not (known.needs.values or known.needs.pairs)}
    assert {name for name, _, _ in TABLE.values()} == theirs


@pytest.mark.parametrize("row", TABLE)
def test_an_advantage_of_0_moves_nothing(row):
    name, options, _ = TABLE[row]
    for ratio in (0.2, 1.0, 30.0):
        loss, slope, clipped = loss_and_slope(name, options, ratio, 0.0)
        assert (loss, slope, clipped) == (0.0, 0.0, False)


@pytest.mark.parametrize("row", TABLE)
def test_at_ratio_1_the_gradient_is_the_policy_gradient(row):
    name, options, _ = TABLE[row]
    assert loss_and_slope(name, options, 1.0, 0.7)[1] == pytest.approx(-0.7)


def three_sequences(dtype=torch.float64):
    """5, 1 and 4 tokens, two of them put there by somebody else; ratios from .5 to 2, either sign."""
    generator = torch.Generator().manual_seed(4)
    old = -0.1 - 3 * torch.rand(10, generator=generator, dtype=dtype)
    now = old + torch.rand(10, generator=generator, dtype=dtype) * 1.4 - 0.7
    owners = torch.tensor([0] * 5 + [1] + [2] * 4)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    advantages = torch.tensor([1.3, -0.4, -0.9], dtype=dtype)[owners] * mask
    return now, old, owners, mask, advantages


def of_sequences(objective, now, aggregation="token-mean", rows=slice(None), **others):
    _, old, owners, mask, advantages = three_sequences(now.dtype)
    weights = torch.from_numpy(token_weights(mask.numpy(), np.bincount(owners.numpy()), aggregation, 16)).to(
        now.dtype
    )
    given = {"token_weights": weights, "loss_mask": mask, "sequence_ids": owners}
    given = {name: values[rows] for name, values in given.items()}
    old = torch.where(mask, old, now.detach())
    return loss_of(objective)(inputs_of(now[rows], old[rows], advantages[rows], **given, **others))


def finite_differences(loss, at, step=1e-6):
    found = []
    for place in range(len(at)):
        up, down = at.clone(), at.clone()
        up[place] += step
        down[place] -= step
        found.append((float(loss(up)) - float(loss(down))) / (2 * step))
    return torch.tensor(found, dtype=at.dtype)


@pytest.mark.parametrize(
    ("objective", "aggregation"),
    [
        (Objective(clip_low=LOW, clip_high=HIGH), "token-mean"),
        (Objective(clip_low=LOW, clip_high=HIGH, options={"dual_clip": 1.4}), "seq-mean-token-sum-norm"),
        (Objective(name="decoupled_ppo", clip_low=LOW, clip_high=HIGH), "seq-mean-token-sum"),
        (Objective(name="gspo", options={"low": 0.05, "high": 0.02}), "seq-mean-token-mean"),
        (Objective(name="gspo", options={"low": 0.9, "high": 9.0}), "seq-mean-token-mean"),
    ],
)
def test_what_has_no_stop_has_the_gradient_of_finite_differences(objective, aggregation):
    now = three_sequences()[0]
    loss = lambda at: of_sequences(objective, at, aggregation).loss  # noqa: E731
    at = now.clone().requires_grad_()
    loss(at).backward()
    torch.testing.assert_close(at.grad, finite_differences(loss, now), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("row", TABLE)
def test_a_token_that_the_model_did_not_sample_has_gradient_0_and_cuts_add_up(row, aggregation):
    """However the minibatch is cut into microbatches of whole sequences."""
    name, options, _ = TABLE[row]
    objective = Objective(name=name, options=options)
    now = three_sequences()[0]
    whole, cut = now.clone().requires_grad_(), now.clone().requires_grad_()
    loss = of_sequences(objective, whole, aggregation).loss
    loss.backward()
    parts = [of_sequences(objective, cut, aggregation, rows).loss for rows in (slice(0, 6), slice(6, 10))]
    sum(parts).backward()
    assert float(sum(parts).detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(whole.grad, cut.grad, rtol=1e-12, atol=0.0)
    mask = three_sequences()[3]
    assert (whole.grad[~mask] == 0.0).all()
    assert (whole.grad[mask] != 0.0).any()


def test_a_sequences_ratio_is_the_geometric_mean_over_what_was_sampled():
    now, old, owners, mask, _ = three_sequences()
    moved = torch.where(mask, now - old, torch.zeros_like(now))
    given = inputs_of(now, old, torch.ones_like(now), loss_mask=mask, sequence_ids=owners + 7)
    for sequence in range(3):
        own = owners == sequence
        expected = moved[own].sum() / mask[own].sum()
        torch.testing.assert_close(given.mean_of_sequences(moved)[own], expected.expand(int(own.sum())))


@pytest.mark.parametrize(
    ("aggregation", "loss"),
    [
        ("token-mean", 1.75),
        ("seq-mean-token-sum", 3.5),
        ("seq-mean-token-mean", 1.5),
        ("seq-mean-token-sum-norm", 0.875),
    ],
)
def test_the_four_aggregations_of_token_losses_1_and_2_2_2(aggregation, loss):
    mask = np.array([1, 0, 1, 1, 1], bool)
    losses = np.array([1.0, 99.0, 2.0, 2.0, 2.0])
    weights = token_weights(mask, np.array([2, 3]), aggregation, max_tokens=4)
    assert float(weights @ losses) == pytest.approx(loss, rel=1e-6)


def test_decoupled_ppo_weighs_by_staleness_and_clips_by_what_the_step_has_moved():
    """Stale by a ratio of 2 (and of 9, past its cap), and then moved by 1.1 and by 1.6."""
    for staleness, moved, expected in ((2.0, 1.1, -2.0 * 1.1), (9.0, 1.1, -5.0 * 1.1), (2.0, 1.6, 0.0)):
        old = torch.tensor([math.log(P_OLD)], dtype=torch.float64)
        began = old + math.log(staleness)
        now = (began + math.log(moved)).requires_grad_()
        objective = Objective(name="decoupled_ppo", clip_low=LOW, clip_high=HIGH)
        given = inputs_of(now, old, torch.ones_like(old), step_logprobs=began)
        loss_of(objective)(given).loss.backward()
        assert float(now.grad) == pytest.approx(expected, rel=1e-12)


def test_a_cispo_bound_below_1_would_scale_every_gradient_and_is_refused():
    """TRL's default: .2 as an absolute bound."""
    from lockstep.errors import RecipeError

    with pytest.raises(RecipeError, match=r"objective\.options\.high: got 0\.2, expected `float` >= 1"):
        loss_of(Objective(name="cispo", options={"high": 0.2}))
