"""Advantages by hand, and GAE against the recursion written out."""

import numpy as np
import pytest

from lockstep.config.recipe import Objective
from lockstep.objectives.advantages import ESTIMATORS, Rewards, gae, whitened
from lockstep.objectives.registry import advantage_of

LENGTHS = (2, 3, 1, 4)


def rewards_of(values, group_size=2, mask=None, of_tokens=None):
    owners = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    mask = np.ones(len(owners), bool) if mask is None else mask
    return Rewards(np.array(values, float), group_size, owners, mask, of_tokens)


def by_sample(advantages):
    owners = rewards_of([0] * 4).owners
    assert all(len(set(advantages[owners == sample].tolist())) == 1 for sample in range(4))
    return [float(advantages[owners == sample][0]) for sample in range(4)]


def test_a_group_is_centred_and_scaled_as_asked():
    rewards = rewards_of([1.0, 0.0, 3.0, 3.0])
    assert by_sample(ESTIMATORS["group"](rewards, "std")) == pytest.approx([1, -1, 0, 0], abs=1e-5)
    assert by_sample(ESTIMATORS["group"](rewards, "none")) == pytest.approx([0.5, -0.5, 0, 0])
    deviation = np.std([1.0, 0.0, 3.0, 3.0])
    assert by_sample(ESTIMATORS["group"](rewards, "batch")) == pytest.approx(
        [0.5 / deviation, -0.5 / deviation, 0, 0], rel=1e-4
    )


def test_leave_one_out_is_against_the_mean_of_the_others():
    rewards = rewards_of([1.0, 0.0, 0.5, 0.5], group_size=4)
    expected = [1 - 1 / 3, 0 - 2 / 3, 0.5 - 0.5, 0.5 - 0.5]
    assert by_sample(ESTIMATORS["leave_one_out"](rewards, "std")) == pytest.approx(expected, abs=1e-6)


def test_whitening_is_over_the_sampled_tokens_so_that_long_answers_weigh_more():
    rewards = rewards_of([1.0, 0.0, 0.0, 1.0])
    found = ESTIMATORS["batch"](rewards, "std")
    tokens = np.repeat([1.0, 0.0, 0.0, 1.0], LENGTHS)
    np.testing.assert_allclose(found, (tokens - tokens.mean()) / tokens.std(ddof=1), rtol=1e-5)
    assert found.mean() == pytest.approx(0.0, abs=1e-6)


def test_what_a_token_earns_counts_for_it_and_for_those_before_it():
    earned = np.zeros(10)
    earned[3] = -0.5  # the second token of the second sample
    rewards = rewards_of([0.0, 1.0, 0.0, 0.0], of_tokens=earned)
    to_go = np.array([0, 0, 0.5, 0.5, 1.0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(
        ESTIMATORS["batch"](rewards, "std"), whitened(to_go, rewards.loss_mask), rtol=1e-6
    )
    assert by_sample(ESTIMATORS["group"](rewards, "none")) == pytest.approx([-0.25, 0.25, 0, 0])


def test_group_batch_whitens_what_is_relative_to_the_group():
    rewards = rewards_of([1.0, 0.0, 0.0, 1.0])
    centred = np.repeat([0.5, -0.5, -0.5, 0.5], LENGTHS)
    np.testing.assert_allclose(
        ESTIMATORS["group_batch"](rewards, "std"), whitened(centred, rewards.loss_mask), rtol=1e-6
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_gae_is_the_recursion_over_each_samples_own_tokens(gamma, lam):
    rng = np.random.default_rng(0)
    mask = np.array([1, 1, 1, 0, 1, 1, 0, 1, 1, 0], bool)
    rewards = rewards_of(rng.normal(size=4), mask=mask)
    values = rng.normal(size=10)
    found = gae(rewards, values, gamma, lam)
    expected = np.zeros(10)
    for sample in range(4):
        own = [t for t in range(10) if rewards.owners[t] == sample and mask[t]]
        following, value = 0.0, 0.0
        for t in reversed(own):
            earned = rewards.of_samples[sample] if t == own[-1] else 0.0
            following = earned + gamma * value - values[t] + gamma * lam * following
            expected[t] = following
            value = values[t]
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.returns, np.where(mask, expected + values, 0.0), rtol=1e-6, atol=1e-7)


def test_with_gamma_and_lambda_1_the_advantage_is_the_reward_less_the_value():
    values = np.linspace(-1, 1, 10)
    rewards = rewards_of([2.0, 0.0, -1.0, 5.0])
    found = gae(rewards, values, 1.0, 1.0)
    np.testing.assert_allclose(found.advantages, rewards.of_samples[rewards.owners] - values, rtol=1e-6)


def test_each_objective_has_its_own_estimator_and_the_recipe_may_name_another():
    assert advantage_of(Objective(name="rloo")) == "leave_one_out"
    assert advantage_of(Objective(name="reinforce++")) == "batch"
    assert advantage_of(Objective(name="lockstep.objectives.grpo:grpo")) == "group"
    assert advantage_of(Objective(name="rloo", advantage="group")) == "group"
