"""One step's rollouts: prompts, sampled completions, rewards, advantages."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from lockstep.config.recipe import Recipe
from lockstep.engines.base import Engine
from lockstep.objectives.advantages import ESTIMATORS, Rewards
from lockstep.objectives.registry import advantage_of
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import INT32, SamplingParams
from lockstep.rendering import Renderer
from lockstep.rollout.empty import refuse_empty
from lockstep.rollout.environments.episodes import EpisodeContext, SeedOf, play
from lockstep.rollout.tasks import Task


def sampling_seed(seed: int, step: int, *what: int) -> int:
    """One for each (run, step, question, and what else tells a request), to sample a step again alike."""
    return int(np.random.SeedSequence([seed, step, *what]).generate_state(1)[0] & 0x7FFFFFFF)


def sample(engine: Engine, task: Task, renderer: Renderer, recipe: Recipe, step: int) -> Samples:
    """Draw ``group_size`` completions for each of the step's questions.

    Raises:
        EngineError: when a completion is empty, or what the engine gave is not what was asked for.
        EnvironmentFault, RewardError: the environment's, where the task has one.
    """
    began = time.perf_counter()
    n = recipe.training.prompts_per_step
    seed = partial(sampling_seed, recipe.training.seed, step)
    rollouts = drawn(engine, task, renderer, recipe, range(step * n, (step + 1) * n), seed)
    if recipe.task.max_prompt_tokens:
        rollouts.figures |= task.figures()
    return replace(rollouts, step=step, sample_s=time.perf_counter() - began)


def drawn(
    engine: Engine,
    task: Task,
    renderer: Renderer,
    recipe: Recipe,
    items: Sequence[int],
    seed: SeedOf,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Samples:
    """Completions of some questions, or conversations about them.

    Args:
        seed: of what is drawn of a question.
        changes: what of the recipe's sampling is another here.

    Raises:
        EngineError, EnvironmentFault, RewardError: as :func:`sample`.
    """
    sampling = request(recipe, renderer, 0, **changes)  # each question puts a seed of its own in place
    if recipe.task.environment:
        played = play(EpisodeContext(engine, task, renderer, recipe), items, sampling, seed)
        return Samples(played.samples, recipe.sampling, figures=played.figures)
    prompts = [renderer.prompt(task.messages(task.item(item))) for item in items]
    params = [msgspec.structs.replace(sampling, seed=seed(item)) for item in items]
    completions = engine.sample(prompts, params)
    for completion in completions:
        refuse_empty(completion)
    samples = [
        Sample.of(
            c,
            prompts[c.prompt_index],
            items[c.prompt_index],
            renderer.text(np.frombuffer(c.token_ids, INT32)),
        )
        for c in completions
    ]
    return Samples(samples, recipe.sampling)


def request(recipe: Recipe, renderer: Renderer, seed: int, **changes: Any) -> SamplingParams:
    """The recipe's sampling for one prompt."""
    stops = recipe.sampling.stop_token_ids or renderer.stop_token_ids
    asked = {"n": recipe.training.group_size, "seed": seed, "stop_token_ids": stops} | changes
    return msgspec.structs.replace(recipe.sampling, **asked)


def score(rollouts: Samples, task: Task, recipe: Recipe) -> None:
    """Fill in the rewards that are missing, and the advantages that the recipe's objective makes of them.

    Raises:
        RewardError: at the first reward that is none; the rewards before it stay filled in.
    """
    began = time.perf_counter()
    reward(rollouts, task, recipe)
    if recipe.task.overlong == "penalise":
        paid = overlong_penalties(rollouts, recipe)
        _give(rollouts, rollouts.rewards - paid)
        rollouts.figures |= _figures("overlong", -paid)
    rewards = Rewards(rollouts.rewards, rollouts.group_size, rollouts.owners, rollouts.loss_mask)
    estimator = advantage_of(recipe.objective)
    scale = recipe.objective.advantage_scale
    # What a value head is to say the trainer fills in, before its first update.
    estimate = (
        np.zeros(len(rewards.owners), np.float32)
        if estimator == "gae"
        else ESTIMATORS[estimator](rewards, scale)
    )
    rollouts.fill(advantages=estimate)
    rollouts.reward_s = time.perf_counter() - began


def reward(rollouts: Samples, task: Task, recipe: Recipe) -> None:
    """Fill in what each completion is worth, where it is not there yet, and the figures of several rewards.

    Raises:
        RewardError: at the first that is none; of one reward, those before it stay filled in.
    """
    if recipe.task.environment:  # it has said what a conversation is worth at its end
        return
    if not recipe.task.rewards:
        missing = np.flatnonzero(np.isnan(rollouts.rewards)).tolist()
        texts = [rollouts[at].text for at in missing]
        items = [task.item(rollouts[at].item) for at in missing]
        for at, value in zip(missing, task.rewards(texts, items), strict=True):
            rollouts.samples[at] = replace(rollouts[at], reward=value)
        return
    items = [task.item(sample.item) for sample in rollouts]
    texts = [sample.text for sample in rollouts]
    total = np.zeros(len(rollouts))
    for part in task.parts:
        values = np.array(list(part.judge.rewards(texts, items)))
        rollouts.figures |= _figures(part.name, values)
        total += part.weight * values
    _give(rollouts, total)


def overlong_penalties(rollouts: Samples, recipe: Recipe) -> np.ndarray:
    """float64 [samples]: DAPO's soft punishment of length, eq. 13; what was cut pays all of it."""
    most = recipe.sampling.max_tokens * recipe.task.turns
    margin = recipe.task.overlong_tokens
    lengths = np.array([np.count_nonzero(sample.loss_mask) for sample in rollouts])
    cut = np.array([sample.finish_reason == "length" for sample in rollouts])
    within = np.clip((lengths - (most - margin)) / margin, 0.0, 1.0) if margin else np.zeros(len(rollouts))
    return recipe.task.overlong_penalty * np.where(cut, 1.0, within)


def _give(rollouts: Samples, rewards: np.ndarray) -> None:
    rollouts.samples = [
        replace(sample, reward=float(value)) for sample, value in zip(rollouts, rewards, strict=True)
    ]


def _figures(name: str, values: np.ndarray) -> dict[str, float]:
    """Figures of one of several rewards, by catalog name."""
    return {f"rewards/{name}/mean": float(values.mean()), f"rewards/{name}/std": float(values.std())}
