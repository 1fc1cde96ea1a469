"""Several rewards, length's price, prompts that are too long, and questions that are held out."""

import asyncio
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep.config.recipe import parse_recipe
from lockstep.config.task import TaskConfig
from lockstep.errors import RecipeError, RewardError
from lockstep.loop import evaluate
from lockstep.loop.open import held_out_of
from lockstep.loop.shown import show
from lockstep.metrics.catalog import BY_NAME, metric_named
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import VersionSpan
from lockstep.rollout import collect, math_reward
from lockstep.rollout.short_prompts import ShortPrompts
from lockstep.rollout.tasks import Task
from lockstep.runs.layout import RunLayout
from lockstep.runs.record import open_recorder
from lockstep.training.batch import minibatches
from tests.unit.bag_pair import bag_pair

HERE = "tests.unit.test_task_choices"


def questions(seed):
    return [{"question": "?" * (n % 5 + 1), "answer": str(n)} for n in range(40)]


def length(text, item):
    return float(len(text))


async def knows(text, item):
    return float(item["answer"] in text)


def pair_of(**sections):
    task = {"name": f"{HERE}:questions"} | sections.pop("task", {})
    training = {"steps": 2, "prompts_per_step": 2, "group_size": 2} | sections.pop("training", {})
    pair = bag_pair(task=task, training=training, **sections)
    pair.task = Task(pair.recipe.task, 0)
    return pair


def samples_of(lengths, reasons, max_tokens=10):
    made = [
        Sample(
            group=at // 2,
            sample=at % 2,
            item=at // 2,
            prompt_ids=np.array([1, 5], np.int32),
            token_ids=np.full(n, 7, np.int32),
            loss_mask=np.ones(n, bool),
            engine_logprobs=np.full(n, -1.0, np.float32),
            version_spans=(VersionSpan(0, n, 0),),
            finish_reason=reason,
            text="7" * n,
        )
        for at, (n, reason) in enumerate(zip(lengths, reasons, strict=True))
    ]
    return Samples(made, SamplingParams(max_tokens=max_tokens), step=0)


# ── several rewards ─────────────────────────────────────────────────────────────────────────────────────────

TWO = [
    {"function": f"{HERE}:length", "weight": -0.5, "name": "brief"},
    {"function": f"{HERE}:knows", "weight": 2},
]


def test_several_rewards_are_added_by_weight_and_told_apart():
    pair = pair_of(task={"rewards": TWO})
    rollouts = samples_of([2, 4, 1, 3], ["stop"] * 4)
    rollouts.samples[3] = replace(rollouts[3], text="the 1 that knows")
    collect.score(rollouts, pair.task, pair.recipe)
    assert rollouts.rewards.tolist() == [-1.0, -2.0, -0.5, -8.0 + 2.0]
    assert rollouts.figures["rewards/brief/mean"] == pytest.approx((2 + 4 + 1 + 16) / 4)
    assert rollouts.figures["rewards/knows/mean"] == 0.25
    assert rollouts.figures["rewards/knows/std"] == pytest.approx(np.std([0, 0, 0, 1]))


def test_two_rewards_of_one_name_are_refused():
    two = [{"function": "exact_match"}, {"function": f"{HERE}:exact_match"}]
    with pytest.raises(RecipeError, match="two that are called 'exact_match'"):
        pair_of(task={"rewards": two})


def test_a_figure_of_a_reward_is_its_familys_and_gets_a_column(tmp_path):
    assert metric_named("rewards/brief/mean") is BY_NAME["rewards/NAME/mean"]
    assert metric_named("rewards/brief/median") is None
    assert metric_named("rewards/mean") is None
    recorder = open_recorder(RunLayout(tmp_path), ["csv"])
    for step in range(2):
        recorder.step(step, step + 1, {"rewards/brief/mean": 0.5 + step})
    with pytest.raises(KeyError, match="rewards/brief/median"):
        recorder.step(2, 3, {"rewards/brief/median": 0.0})
    head, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert head.split(",")[-1] == "rewards/brief/mean"
    assert [row.split(",")[-1] for row in rows] == ["0.5", "1.5"]


async def slow(text, item):
    await asyncio.sleep(60 if text == "hangs" else 0.1)
    if text == "raises":
        raise KeyError("judge")
    return float(len(text))


def test_calls_of_an_async_reward_wait_side_by_side():
    task = Task(TaskConfig(name=f"{HERE}:questions", reward=f"{HERE}:slow"), 0)
    began = time.monotonic()
    assert list(task.rewards(["a" * n for n in range(40)], [{}] * 40)) == list(range(40))
    assert time.monotonic() - began < 2.0, "one after the other they take 4 s"


@pytest.mark.parametrize(("text", "told"), [("hangs", "no answer in 0.5 s"), ("raises", "KeyError: 'judge'")])
def test_one_that_hangs_or_raises_is_told_and_those_before_it_stay(text, told):
    task = Task(TaskConfig(name=f"{HERE}:questions", reward=f"{HERE}:slow", reward_timeout_s=0.5), 0)
    rewards = task.rewards(["a", "bb", text], [{"question": "q"}] * 3)
    assert [next(rewards), next(rewards)] == [1.0, 2.0]
    with pytest.raises(RewardError, match=told):
        next(rewards)


# ── overlong completions ────────────────────────────────────────────────────────────────────────────────────


def test_length_is_paid_for_as_dapo_has_it():
    """Of 10 tokens the last 4 are paid for; what was cut pays all of it."""
    task = {"overlong": "penalise", "overlong_tokens": 4, "overlong_penalty": 0.5, "reward": f"{HERE}:length"}
    pair = pair_of(task=task, sampling={"max_tokens": 10})
    rollouts = samples_of([6, 7, 10, 10], ["stop", "stop", "stop", "length"])
    collect.score(rollouts, pair.task, pair.recipe)
    assert rollouts.rewards.tolist() == [6.0, 7.0 - 0.125, 9.5, 9.5]
    assert rollouts.figures["rewards/overlong/mean"] == pytest.approx(-(0.125 + 0.5 + 0.5) / 4)
    cut_alone = pair_of(task={"overlong": "penalise"}, sampling={"max_tokens": 10}).recipe
    assert collect.overlong_penalties(rollouts, cut_alone).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("reasons", [["stop", "length", "stop", "stop"], ["length"] * 4])
def test_what_was_cut_is_out_of_the_loss_and_is_judged_all_the_same(reasons):
    pair = pair_of(task={"overlong": "mask"}, sampling={"max_tokens": 10})
    rollouts = samples_of([3, 10, 2, 4], reasons)
    collect.score(rollouts, pair.task, pair.recipe)
    ((micro,),) = minibatches(rollouts, pair.trainer._policy, pair.recipe)
    weights = micro.token_weights.numpy()
    learned = np.array([reason == "stop" for reason in reasons])[rollouts.owners]
    assert (weights[~learned] == 0.0).all()
    assert weights[learned].sum() == pytest.approx(1.0 if learned.any() else 0.0)
    assert micro.loss_mask.all(), "the gate and the figures are of all that was sampled"


def test_pairs_have_no_completion_that_was_cut():
    pair = pair_of(task={"overlong": "mask", "reward": f"{HERE}:length"}, objective={"name": "dpo"})
    rollouts = samples_of([3, 10, 2, 4], ["stop", "length", "stop", "stop"])
    collect.score(rollouts, pair.task, pair.recipe)
    parts = [micro for part in minibatches(rollouts, pair.trainer._policy, pair.recipe) for micro in part]
    assert [pair.tolist() for micro in parts for pair in micro.pairs] == [[3, 2]]
    assert parts[0].pair_weight == 1.0


# ── prompts that are too long ───────────────────────────────────────────────────────────────────────────────


def test_questions_are_counted_past_those_that_are_too_long():
    task = Task(TaskConfig(name=f"{HERE}:questions", max_prompt_tokens=2), 0)
    task.pass_over_long(lambda messages: len(messages[-1]["content"]))
    fitting = [n for n in range(40) if n % 5 < 2]
    assert [task.item(n)["answer"] for n in (0, 5, 2, 15)] == [str(fitting[n]) for n in (0, 5, 2, 15)]
    assert task.item(16) == task.item(0), "it starts over"
    assert task.figures() == {"prompts_too_long": 24.0}


def test_the_nth_question_is_the_same_whatever_was_asked_before():
    first, second = (ShortPrompts([5, 1, 9, 2, 2, 9].__getitem__, 6, 4) for _ in range(2))
    assert [first.place(n) for n in range(8)] == [second.place(n) for n in reversed(range(8))][::-1]
    assert first.left_out == 3


def test_no_prompt_that_fits_is_told():
    with pytest.raises(RecipeError, match=r"key task\.max_prompt_tokens"):
        ShortPrompts(lambda place: 9, 3, 4).place(0)


# ── held-out questions ──────────────────────────────────────────────────────────────────────────────────────


def run_of(pair):
    session = SimpleNamespace(held_out=held_out_of(pair.recipe))
    return SimpleNamespace(recipe=pair.recipe, pair=pair, session=session, say=lambda text: None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_held_out_questions_are_asked_alike_and_trained_on_by_nobody(temperature):
    pair = pair_of(
        task={"reward": f"{HERE}:length"},
        evaluation={"every": 2, "prompts": 6, "temperature": temperature},
        training={"steps": 3},
    )
    run = run_of(pair)
    assert evaluate.evaluate(run, 1) == {}
    first, again, last = (evaluate.evaluate(run, version) for version in (2, 2, 3))
    assert {name for name in first if name not in BY_NAME} == set()
    means = [found["evaluation_reward_mean"] for found in (first, again, last)]
    assert means == [first["evaluation_tokens_mean"]] * 3, "its reward is its length"


def test_a_generator_is_asked_under_another_seed():
    name = "reasoning_gym:basic_arithmetic"
    pair = pair_of(task={"name": name}, evaluation={"every": 1})
    held_out = held_out_of(pair.recipe)
    theirs = {held_out.item(n)["question"] for n in range(20)}
    assert len(theirs & {pair.task.item(n)["question"] for n in range(200)}) <= 2, "but by chance"


@pytest.mark.parametrize(
    ("evaluation", "told"),
    [
        ({"every": 1}, r"key evaluation\.name"),
        ({"every": 1, "name": "jsonl:b", "samples": 2}, r"key evaluation\.samples"),
    ],
)
def test_evaluations_that_say_nothing_are_refused(evaluation, told):
    table = {
        "model": {"path": "m"},
        "task": {"name": "jsonl:a"},
        "sampling": {"max_tokens": 1},
        "training": {"steps": 1},
        "evaluation": evaluation,
    }
    with pytest.raises(RecipeError, match=told):
        parse_recipe(table, "tests")


# ── what people are shown ───────────────────────────────────────────────────────────────────────────────────


def test_shown_is_the_first_of_each_group_with_what_is_learned_from_it(tmp_path):
    rollouts = samples_of([3, 2, 4, 1], ["stop"] * 4)
    rollouts.samples[2] = replace(rollouts[2], loss_mask=np.array([True, False, True, False]))
    rollouts.fill(advantages=np.array([0.5, 0.5, 0.5, -0.5, -0.5, 1.0, 9.0, 3.0, 9.0, -2.0], np.float32))
    tables = []
    recorder = SimpleNamespace(shows_completions=True, completions=tables.append)
    renderer = SimpleNamespace(text=lambda ids: "asked")
    show(SimpleNamespace(recorder=recorder, pair=SimpleNamespace(renderer=renderer)), 7, rollouts)
    (shown,) = tables
    advantages = [row[shown.columns.index("advantage")] for row in shown.rows]
    assert (shown.step, advantages) == (7, [0.5, 2.0])


# ── mathematics ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_extra_that_is_missing_is_told_before_a_run(monkeypatch):
    math_reward._library.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RecipeError, match=r"key task\.reward: got 'math_verify'") as told:
        Task(TaskConfig(name=f"{HERE}:questions", reward="math_verify"), 0)
    assert told.value.hint == 'pip install "lockstep-rl[math]"'


def test_mathematics_is_parsed_on_both_sides_and_compared(monkeypatch):
    """With a stand-in for the library: it reads numbers, LaTeX within dollars alone."""
    math_reward._library.cache_clear()

    def parse(text, parsing_timeout):
        text = {"$\\frac12$": "0.5"}.get(text, text)
        return [float(text)] if text.replace(".", "").isdigit() else []

    theirs = SimpleNamespace(parse=parse, verify=lambda gold, found, timeout_seconds: gold == found)
    monkeypatch.setitem(sys.modules, "math_verify", theirs)
    task = Task(TaskConfig(name=f"{HERE}:questions", reward="math_verify"), 0)
    items = [{"question": "", "answer": answer} for answer in ("0.5", "\\frac12", "2")]
    assert list(task.rewards(["0.5", "0.50", "none"], items)) == [1.0, 1.0, 0.0]
    with pytest.raises(RewardError, match="is no mathematics"):
        list(task.rewards(["1"], [{"question": "", "answer": "a cat"}]))
    math_reward._library.cache_clear()
