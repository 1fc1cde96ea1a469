"""Tasks of several turns: rows exact to the token, tools, and what the model did not sample left out."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lockstep.config.recipe import parse_recipe
from lockstep.config.task import TaskConfig
from lockstep.errors import EnvironmentFault, RecipeError, RetokenisedError, RewardError
from lockstep.loop.figures import rollout_figures
from lockstep.objectives.catalogue import OBJECTIVES
from lockstep.objectives.registry import loss_of, needs_of
from lockstep.objectives.regularisers import regulariser
from lockstep.policy.logprobs import TokenScores
from lockstep.records.versions import VersionSpan
from lockstep.rollout import collect, store
from lockstep.rollout.environments.protocol import Environments
from lockstep.rollout.environments.row import Row
from lockstep.rollout.tasks import Task
from lockstep.training.batch import minibatches
from lockstep.training.beside import score_under_sampling_weights
from lockstep.training.step import loss_inputs
from tests.unit.bag_pair import Renderer, bag_pair

HERE = "tests.unit.test_environments"
STOPS = tuple(range(2, 48, 2))
"""Half of the tokens end a turn, so that two turns are short and certain."""


def divides(text):
    return (ord(text) - 48) % 3 == 0


class TwoTurns:
    """Half of the reward for ending the first turn on a token that divides by three, half for the second."""

    def __init__(self, greeting=""):
        self.greeting = greeting
        self.told = []

    def reset(self, question, **item):
        return self.greeting or None

    def push(self, key: str) -> str:
        """Press a key.

        Args:
            key: The key.
        """
        self.told.append(key)
        return "ab"

    def get_reward(self, answer):
        return 0.5 * divides(self.told[0]) + 0.5 * divides(answer[-1]) if self.told else 0.0


def first_turn_pushes(text):
    """Every turn is a call; the second is the last by ``task.max_turns``."""
    return [("push", {"key": text[-1]})]


class BetweenRenderer(Renderer):
    def between(self, messages):
        return np.array([t for m in messages for t in self.tokenizer.encode(m["content"])], np.int32)


def questions(seed):
    return [{"question": f"{n} + {n * 7 % 10}", "answer": "0"} for n in range(50)]


def pair_of(environment="TwoTurns", training=(), objective=(), **task):
    task = {
        "name": f"{HERE}:questions",
        "environment": f"{HERE}:{environment}",
        "tool_calls": f"{HERE}:first_turn_pushes",
        "max_turns": 2,
    } | task
    sections = {
        "task": task,
        "sampling": {"max_tokens": 4, "stop_token_ids": STOPS},
        "training": {"steps": 30, "prompts_per_step": 8, "group_size": 4} | dict(training),
        "objective": dict(objective),
        "optimizer": {"lr": 0.03},
    }
    pair = bag_pair(**sections)
    pair.task = Task(pair.recipe.task, 0)
    pair.renderer = BetweenRenderer()
    return pair


def drawn(pair, step=0):
    rollouts = collect.sample(pair.engine, pair.task, pair.renderer, pair.recipe, step)
    collect.score(rollouts, pair.task, pair.recipe)
    return rollouts


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_is_what_was_sampled_with_what_was_given_between():
    pair = pair_of()
    rollouts = drawn(pair)
    two = [sample for sample in rollouts if not sample.loss_mask.all()]
    assert len(two) > 20, "most first turns end on a stop token"
    for sample in two:
        given = np.flatnonzero(~sample.loss_mask)
        assert np.array_equal(given, np.arange(given[0], given[0] + 2)), "one gap of two tokens"
        assert sample.token_ids[given].tolist() == pair.renderer.tokenizer.encode("ab")
        assert sample.token_ids[given[0] - 1] in STOPS, "the sampled stop token is kept"
        assert np.isnan(sample.engine_logprobs[given]).all()
        assert sample.missing == 0, "what was not sampled has no number to miss"
        assert sample.version_spans == (VersionSpan(0, len(sample.token_ids), 0),)
    ours = rollouts.scored(pair.trainer)[rollouts.loss_mask]
    np.testing.assert_allclose(ours, rollouts.engine_logprobs[rollouts.loss_mask], atol=1e-4)


def test_each_turn_asks_with_the_row_before_it_and_what_is_new(monkeypatch):
    pair = pair_of()
    asked = []
    sample = pair.engine._sample
    monkeypatch.setattr(
        pair.engine, "_sample", lambda prompts, params: asked.extend(prompts) or sample(prompts, params)
    )
    rollouts = drawn(pair)
    rows = [np.r_[s.prompt_ids, s.token_ids] for s in rollouts]
    for prompt in asked:
        assert any(np.array_equal(row[: len(prompt)], prompt) for row in rows)


def test_rows_that_are_alike_to_the_last_token_are_one_request(monkeypatch):
    pair = pair_of(training={"group_size": 16, "prompts_per_step": 1})
    asked = []
    sample = pair.engine._sample
    monkeypatch.setattr(
        pair.engine, "_sample", lambda prompts, params: asked.extend(params) or sample(prompts, params)
    )
    rollouts = drawn(pair)
    later = asked[1:]
    assert asked[0].n == 16
    assert sum(params.n for params in later) == sum(not s.loss_mask.all() for s in rollouts)
    assert max(params.n for params in later) > 1
    assert len({params.seed for params in asked}) == len(asked)


def test_a_step_is_drawn_again_alike():
    first, second = drawn(pair_of()), drawn(pair_of())
    assert [s.token_ids.tolist() for s in first] == [s.token_ids.tolist() for s in second]
    assert first.rewards.tolist() == second.rewards.tolist()


def test_figures_count_what_the_model_sampled_alone():
    rollouts = drawn(pair_of())
    found = rollout_figures(rollouts, 0)
    assert found["n_tokens"] == rollouts.loss_mask.sum()
    assert found["given_tokens_mean"] == pytest.approx((~rollouts.loss_mask).sum() / len(rollouts))
    assert found["completion_tokens_mean"] == pytest.approx(rollouts.loss_mask.sum() / len(rollouts))
    assert 1.5 < found["turns_mean"] <= 2.0
    assert found["tool_calls_failed_fraction"] == 0.0


def test_rows_are_stored_and_read_back_with_their_figures(tmp_path):
    pair = pair_of()
    rollouts = drawn(pair)
    store.save(tmp_path / "step.parquet", rollouts)
    again = store.load_step(tmp_path / "step.parquet", 0, pair.recipe, pair.trainer.vocabulary)
    assert again.figures == rollouts.figures
    assert np.array_equal(again.loss_mask, rollouts.loss_mask)
    assert again.rewarded


# ── the loss ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_every_token_that_the_model_did_not_sample_is_0(name):
    shared = {"entropy_coef": 0.01, "kl": {"coef": 0.1}, "correction": "tis"}
    pair = pair_of(objective={"name": name} | shared)
    rollouts = drawn(pair)
    if needs_of(pair.recipe.objective).values:
        rollouts.fill(advantages=np.linspace(-1, 1, len(rollouts.owners), dtype=np.float32))
    recipe = pair.recipe
    policy = pair.trainer._policy
    seen = 0
    for part in minibatches(rollouts, policy, recipe):
        score_under_sampling_weights([part], policy, 1.0)
        for micro in part:
            # As after some updates: ratios off 1, to both sides.
            moved = micro.sampling_logprobs + 0.3 * torch.sin(torch.arange(len(micro.loss_mask)))
            now = moved.requires_grad_()
            entropy = torch.full_like(moved, 2.0).requires_grad_()
            values = torch.zeros_like(moved, requires_grad=True)
            micro.reference_logprobs = micro.sampling_logprobs - 0.1
            micro.old_values, micro.returns = torch.zeros_like(moved), torch.ones_like(moved)
            inputs = loss_inputs(micro, TokenScores(now, entropy), recipe.objective, values)
            (loss_of(recipe.objective)(inputs).loss + regulariser(inputs, recipe.objective)).backward()
            given = ~micro.loss_mask
            seen += int(given.sum())
            for leaf in (now, entropy, *([values] if values.grad is not None else [])):
                assert (leaf.grad[given] == 0.0).all()
                assert (leaf.grad[~given] != 0.0).any()
    assert seen > 20


def test_a_two_turn_task_with_a_tool_is_learned():
    pair = pair_of()
    rewards = []
    for step in range(20):
        rollouts = drawn(pair, step)
        pair.trainer.step(rollouts, step, lambda tokens: None)
        pair.sync(step + 1)
        rewards.append(rollouts.rewards.mean())
    assert np.mean(rewards[-5:]) - np.mean(rewards[:5]) >= 0.15


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────


class Retokenises(TwoTurns):
    def next_prompt(self, token_ids, messages):
        """The whole conversation from its text: a token is forgotten."""
        return [*token_ids[:-1], 5, 5, 5]


class Appends(TwoTurns):
    def next_prompt(self, token_ids, messages):
        return [*token_ids, 41, 42, 43]


def test_an_environment_that_retokenises_is_caught():
    with pytest.raises(RetokenisedError, match=r"Retokenises, next_prompt: got token 5 at \d+") as told:
        drawn(pair_of("Retokenises"))
    assert "as they were sampled" in told.value.expected


def test_an_environment_with_a_template_of_its_own_appends():
    rollouts = drawn(pair_of("Appends"))
    assert {tuple(s.token_ids[~s.loss_mask]) for s in rollouts if not s.loss_mask.all()} == {(41, 42, 43)}


def test_a_prompt_that_is_cut_is_no_continuation():
    row = Row(np.array([1, 2, 3], np.int32))
    with pytest.raises(RetokenisedError, match="a prompt that ends after 2 tokens"):
        row.continued(np.array([1, 2], np.int32), "it")
    with pytest.raises(RetokenisedError, match="a prompt that ends after 3 tokens"):
        row.continued(np.array([1, 2, 3], np.int32), "it")


class Moody(TwoTurns):
    begun = 0

    def reset(self, **item):
        Moody.begun += 1
        return f"mood {Moody.begun}"


class Broken(TwoTurns):
    def reset(self, **item):
        raise KeyError("board")


class Worthless(TwoTurns):
    def get_reward(self):
        return float("nan")


@pytest.mark.parametrize(
    ("environment", "error", "told"),
    [
        ("Moody", EnvironmentFault, "expected the same of every sample of a group"),
        ("Broken", EnvironmentFault, r"Broken, reset: got KeyError: 'board'"),
        ("Worthless", RewardError, r"Worthless.get_reward: got nan"),
    ],
)
def test_what_an_environment_must_not_do_is_told(environment, error, told):
    with pytest.raises(error, match=told):
        drawn(pair_of(environment))


def test_what_a_reset_says_stands_behind_the_question():
    pair = pair_of(environment_options={"greeting": "hello"})
    assert pair.task.messages({"question": "1"}, "hello") == [{"role": "user", "content": "1hello"}]
    alone = drawn(pair_of())[0].prompt_ids
    assert len(drawn(pair)[0].prompt_ids) == len(alone) + len("hello")


class Counted(TwoTurns):
    """Fails in the middle where it is to; closes what it began."""

    open = 0

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails
        Counted.open += 1

    def get_reward(self):
        if self.fails:
            raise ValueError("no reward")
        return 0.0

    def close(self):
        Counted.open -= 1


@pytest.mark.parametrize("fails", [False, True])
def test_each_is_closed_whatever_happens(fails):
    pair = pair_of("Counted", environment_options={"fails": fails})
    with pytest.raises(EnvironmentFault, match="no reward") if fails else nullcontext():
        drawn(pair)
    assert Counted.open == 0


class Asynchronous(TwoTurns):
    async def reset(self, **item):
        return None

    async def push(self, key: str) -> str:
        """Press a key.

        Args:
            key: The key.
        """
        return TwoTurns.push(self, key)

    async def get_reward(self):
        return 0.25


def test_methods_may_be_async():
    rollouts = drawn(pair_of("Asynchronous"))
    assert set(rollouts.rewards) == {0.25}
    assert rollouts.figures["tool_calls_failed_fraction"] == 0.0
    assert rollouts.figures["turns_mean"] > 1.5


class NoReward:
    def reset(self, **item):
        pass


class Undocumented(TwoTurns):
    def press(self, key: str) -> str:
        return key


@pytest.mark.parametrize(
    ("environment", "told"),
    [("NoReward", "a class without get_reward"), ("Undocumented", "the tool press"), ("nothing", "nothing")],
)
def test_a_class_that_is_no_environment_is_refused(environment, told):
    with pytest.raises(RecipeError, match=told):
        Environments(TaskConfig(name="a:b", environment=f"{HERE}:{environment}"))


def test_environments_are_of_the_synchronous_loop():
    table = {
        "model": {"path": "m"},
        "task": {"name": "a:b", "environment": "a:C"},
        "sampling": {"max_tokens": 1},
        "training": {"steps": 1},
        "loop": {"kind": "in_flight"},
    }
    with pytest.raises(RecipeError, match=r"key task\.environment"):
        parse_recipe(table, "tests")
