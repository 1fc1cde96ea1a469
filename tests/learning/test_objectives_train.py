"""Every objective trains, through the project's own sampling, advantages, step and optimizer.

A small model is to draw tokens whose id divides by three; a third of them do at first.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from lockstep.config.recipe import with_sets
from lockstep.objectives.catalogue import OBJECTIVES
from lockstep.objectives.registry import needs_of
from lockstep.rollout import collect
from lockstep.training.beside import Beside
from tests.unit.bag_pair import BagPolicy, bag_pair

STEPS = 20
TRAINING = {"steps": STEPS, "prompts_per_step": 8, "group_size": 4, "minibatches": 2}


class DividesByThree:
    """A task whose reward is the share of tokens that do."""

    def __init__(self, task):
        self.item = task.item
        self.messages = task.messages

    def rewards(self, texts, items):
        return [np.mean([(ord(c) - 48) % 3 == 0 for c in text]) for text in texts]


def pair_of(minibatches=2, temperature=1.0, **objective):
    pair = bag_pair(
        objective=objective,
        sampling={"max_tokens": 4, "temperature": temperature},
        training=TRAINING | {"minibatches": minibatches},
        optimizer={"lr": 0.03},
        value_head={"lr": 0.05},
    )
    pair.task = DividesByThree(pair.task)
    policy = pair.trainer._policy
    model = copy.deepcopy(policy.model)
    frozen = BagPolicy(model, model.head, None, torch.float32, None, True, "packed", "here")
    own = pair.trainer._beside if needs_of(pair.recipe.objective).values else Beside()
    pair.trainer._beside = replace(own, reference=frozen)
    return pair


def steps_of(pair, steps=STEPS):
    """The figures of each step."""
    found = []
    for step in range(steps):
        rollouts = collect.sample(pair.engine, pair.task, pair.renderer, pair.recipe, step)
        collect.score(rollouts, pair.task, pair.recipe)
        figures = pair.trainer.step(rollouts, step, lambda tokens: None)
        found.append(figures | {"reward": float(rollouts.rewards.mean())})
        pair.sync(step + 1)
    return found


def gain(found):
    return np.mean([f["reward"] for f in found[-4:]]) - np.mean([f["reward"] for f in found[:4]])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_reward_rises_with_each_objective(name):
    found = steps_of(pair_of(name=name))
    assert gain(found) >= 0.15
    assert all(np.isfinite(value) for figures in found for value in figures.values())


@pytest.mark.parametrize(
    "objective",
    [
        {"kl": {"coef": 0.05}, "entropy_coef": 0.005},
        {"kl": {"coef": 0.02, "place": "reward", "estimator": "k1"}},
        {"aggregation": "seq-mean-token-sum-norm", "advantage_scale": "none", "clip_high": 0.28},
        {"name": "dpo", "options": {"kind": "ipo"}},
        {"advantage": "group_batch", "old_logprobs": "engine"},
        {"correction": "sequence_tis"},
    ],
)
def test_it_rises_with_what_objectives_share(objective):
    assert gain(steps_of(pair_of(**objective))) >= 0.15


class EasyAndHard:
    """Half of the prompts are worth 1, whatever is answered, and the others nothing."""

    @staticmethod
    def item(number):
        return {"question": "aaaa" if number % 2 else "zzzz"}

    @staticmethod
    def messages(item):
        return [{"role": "user", "content": item["question"]}]

    @staticmethod
    def rewards(texts, items):
        return [float(item["question"] == "aaaa") for item in items]


def test_the_value_head_learns_what_prompts_are_worth():
    pair = pair_of(name="ppo")
    pair.task = EasyAndHard()
    found = steps_of(pair, 30)
    assert found[0]["value_explained_variance"] == pytest.approx(0.0, abs=1e-6), "it begins at 0 everywhere"
    assert found[-1]["value_explained_variance"] > 0.8
    assert found[-1]["value_loss"] < found[0]["value_loss"] / 4


def test_the_value_head_is_published_nowhere_and_goes_on_from_a_checkpoint():
    pair = pair_of(name="ppo")
    steps_of(pair, 2)
    head = pair.trainer._beside.value_head
    assert float(head.weight.detach().abs().max()) > 0.0
    published = pair.trainer._publisher.versions[2]
    assert published.keys() == dict(pair.trainer._policy.model.named_parameters()).keys()
    state = pair.trainer._optimizer.state()
    assert torch.equal(state["master.beside.weight"], head.weight)
    other = pair_of(name="ppo")
    other.trainer._optimizer.restore({name: tensor.clone() for name, tensor in state.items()})
    assert torch.equal(other.trainer._beside.value_head.weight, head.weight)


def test_a_kl_in_the_reward_is_a_penalty_on_each_token_and_the_stored_advantages_have_it():
    pair = pair_of(
        minibatches=1, kl={"coef": 0.5, "place": "reward", "estimator": "k1"}, advantage_scale="none"
    )
    with torch.no_grad():
        pair.trainer._beside.reference.head.mul_(0.7)
    rollouts = collect.sample(pair.engine, pair.task, pair.renderer, pair.recipe, 0)
    collect.score(rollouts, pair.task, pair.recipe)
    temperature = rollouts.temperature
    groups = rollouts.groups
    n = len(rollouts)
    moved = np.concatenate(pair.trainer.score(groups, temperature)) - np.concatenate(
        pair.trainer._beside.reference.score(groups, temperature)
    )
    totals = rollouts.rewards - 0.5 * np.bincount(rollouts.owners, moved, minlength=n)
    expected = (totals.reshape(-1, 4) - totals.reshape(-1, 4).mean(1, keepdims=True)).reshape(-1)
    figures = pair.trainer.step(rollouts, 0, lambda tokens: None)
    np.testing.assert_allclose(rollouts.advantages, expected[rollouts.owners], atol=1e-5)
    assert figures["reference_kl_k3_nats"] == pytest.approx(np.mean(np.exp(-moved) + moved - 1), rel=1e-4)


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_policy_and_reference_are_scored_at_the_temperature_of_sampling(place, monkeypatch):
    """The KL of a policy that is its reference is 0, bit for bit, and is not with one side at T = 1."""
    found = []
    for shift in (0.0, 0.3):
        pair = pair_of(minibatches=1, temperature=0.7, kl={"coef": 0.5, "place": place, "estimator": "k3"})
        reference = pair.trainer._beside.reference
        scores = reference.scores

        def at(row, temperature, scores=scores, shift=shift):
            return scores(row, temperature + shift)

        monkeypatch.setattr(reference, "scores", at)
        rollouts = collect.sample(pair.engine, pair.task, pair.renderer, pair.recipe, 0)
        collect.score(rollouts, pair.task, pair.recipe)
        found.append(pair.trainer.step(rollouts, 0, lambda tokens: None))
        assert found[-1]["gap_abs_max_nats"] < 1e-5, "the policy's are those that the engine drew by"
    same, across = found
    assert same["reference_kl_k3_nats"] == 0.0
    assert across["reference_kl_k3_nats"] > 1e-2
    assert across["loss"] > same["loss"] + 1e-3 if place == "loss" else across["loss"] != same["loss"]


def test_in_a_minibatch_of_ties_dpo_has_no_pair_and_no_gradient():
    pair = pair_of(minibatches=1, name="dpo")
    rollouts = collect.sample(pair.engine, pair.task, pair.renderer, pair.recipe, 0)
    rollouts.samples = [replace(sample, reward=1.0) for sample in rollouts]
    rollouts.fill(advantages=np.zeros(len(rollouts.owners), np.float32))
    figures = pair.trainer.step(rollouts, 0, lambda tokens: None)
    assert (figures["loss"], figures["grad_norm"]) == (0.0, 0.0)


def test_dpo_over_rows_that_would_split_a_group_is_the_whole_minibatchs():
    losses = []
    for microbatch in (4096, 16):
        pair = pair_of(minibatches=1, name="dpo")
        pair.recipe = pair.trainer._recipe = with_sets(
            pair.recipe, [f"training.tokens_per_microbatch={microbatch}"]
        )
        rollouts = collect.sample(pair.engine, pair.task, pair.renderer, pair.recipe, 0)
        collect.score(rollouts, pair.task, pair.recipe)
        losses.append(pair.trainer.step(rollouts, 0, lambda tokens: None))
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], abs=1e-6)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-4)
    assert losses[0]["loss"] > 0.0
