"""GRPO against closed forms and against autograd by hand."""

import numpy as np
import pytest
import torch

from lockstep.config.recipe import parse_recipe
from lockstep.errors import RecipeError
from lockstep.objectives.base import LossInputs
from lockstep.objectives.corrections import truncated_importance_weights
from lockstep.objectives.grpo import group_advantages, grpo, token_weights

LOW, HIGH = 0.2, 0.3


def run(log_ratio, advantage):
    now = torch.tensor([log_ratio], requires_grad=True)
    inputs = LossInputs(now, torch.zeros(1), torch.tensor([advantage]), torch.ones(1))
    outputs = grpo(inputs, LOW, HIGH)
    outputs.loss.backward()
    return float(outputs.loss.detach()), float(now.grad), bool(outputs.clipped)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("log_ratio", [-0.5, -0.1, 0.0, 0.1, 0.5])
def test_loss_gradient_and_clip_flag_are_those_of_the_formula(log_ratio, advantage):
    ratio = float(np.exp(np.float32(log_ratio)))
    held = float(np.clip(ratio, 1 - LOW, 1 + HIGH))
    loss, grad, clipped = run(log_ratio, advantage)
    assert loss == pytest.approx(-min(ratio * advantage, held * advantage), abs=1e-6)
    active = ratio * advantage <= held * advantage
    assert grad == pytest.approx(-ratio * advantage if active else 0.0, abs=1e-6)
    assert clipped is not active


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    _, grad, clipped = run(0.0, 0.7)
    assert grad == pytest.approx(-0.7)
    assert not clipped


def test_advantages_are_relative_to_the_group():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    scaled, centred = group_advantages(rewards, "std"), group_advantages(rewards, "none")
    np.testing.assert_allclose(scaled[0], [1, -1, -1, 1], atol=1e-5)
    np.testing.assert_allclose(centred[0], [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_array_equal(scaled[1], 0.0)


def test_token_weights_sum_to_one_and_differ_as_they_say():
    lengths, all_of_them = np.array([1, 3]), np.ones(4, bool)
    np.testing.assert_allclose(token_weights(all_of_them, lengths, "token"), [0.25] * 4)
    np.testing.assert_allclose(token_weights(all_of_them, lengths, "sequence"), [0.5, 1 / 6, 1 / 6, 1 / 6], rtol=1e-6)


def test_token_weights_are_shared_by_the_tokens_in_the_loss_alone():
    mask, lengths = np.array([True, False, True, True, False, False]), np.array([1, 3, 2])
    np.testing.assert_allclose(token_weights(mask, lengths, "token"), [1 / 3, 0, 1 / 3, 1 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(token_weights(mask, lengths, "sequence"), [1 / 2, 0, 1 / 4, 1 / 4, 0, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="no token in the loss"):
        token_weights(~mask & mask, lengths, "token")


def test_the_correction_is_one_on_agreement_truncated_above_and_without_gradient():
    engine = torch.tensor([-1.0, -1.0, -3.0, -1.0])
    trainer = torch.tensor([-1.0, -1.5, -1.0, -0.9], requires_grad=True)
    weights = truncated_importance_weights(trainer, engine, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, np.exp(-0.5), 2.0, np.exp(0.1)], dtype=torch.float32))
    assert not weights.requires_grad


def test_a_correction_beside_the_engines_own_old_logprobs_is_refused():
    from lockstep.config.recipe import with_sets

    table = {"model": {"path": "m"}, "task": {"name": "t"}, "sampling": {"max_tokens": 1}, "training": {"steps": 1}}
    recipe = parse_recipe(table, "test")
    assert with_sets(recipe, ["objective.correction=tis"]).objective.correction == "tis"
    with pytest.raises(RecipeError, match=r"objective\.correction"):
        with_sets(recipe, ["objective.correction=tis", "objective.old_logprobs=engine"])
