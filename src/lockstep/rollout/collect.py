"""One step's rollouts: prompts, sampled completions, rewards, advantages."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from lockstep.config.recipe import Recipe
from lockstep.engines.base import Engine
from lockstep.errors import EngineError
from lockstep.objectives.advantages import ESTIMATORS, Rewards
from lockstep.objectives.registry import advantage_of
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import INT32, Completion, SamplingParams
from lockstep.rendering import Renderer
from lockstep.rollout.tasks import Task


def sampling_seed(seed: int, step: int, item: int) -> int:
    """One seed for each (run, step, question), so that a step can be sampled again alike."""
    return int(np.random.SeedSequence([seed, step, item]).generate_state(1)[0] & 0x7FFFFFFF)


def sample(engine: Engine, task: Task, renderer: Renderer, recipe: Recipe, step: int) -> Samples:
    """Draw ``group_size`` completions for each of the step's questions.

    Raises:
        EngineError: when a completion is empty, or what the engine gave is not what was asked for.
    """
    began = time.perf_counter()
    training = recipe.training
    items = range(step * training.prompts_per_step, (step + 1) * training.prompts_per_step)
    prompts = [renderer.prompt(task.messages(task.item(item))) for item in items]
    params = [request(recipe, renderer, sampling_seed(training.seed, step, item)) for item in items]
    completions = engine.sample(prompts, params)
    refuse_empty(completions)
    samples = [
        Sample.of(
            c,
            prompts[c.prompt_index],
            items[c.prompt_index],
            renderer.text(np.frombuffer(c.token_ids, INT32)),
        )
        for c in completions
    ]
    return Samples(samples, recipe.sampling, step=step, sample_s=time.perf_counter() - began)


def request(recipe: Recipe, renderer: Renderer, seed: int, **changes: Any) -> SamplingParams:
    """The recipe's sampling for one prompt."""
    stops = recipe.sampling.stop_token_ids or renderer.stop_token_ids
    asked = {"n": recipe.training.group_size, "seed": seed, "stop_token_ids": stops} | changes
    return msgspec.structs.replace(recipe.sampling, **asked)


def score(rollouts: Samples, task: Task, recipe: Recipe) -> None:
    """Fill in rewards and the advantages that the recipe's objective makes of them.

    Raises:
        RewardError: at the first reward that is none; the rewards before it stay filled in.
    """
    began = time.perf_counter()
    items = [task.item(sample.item) for sample in rollouts]
    texts = [sample.text for sample in rollouts]
    for at, reward in enumerate(task.rewards(texts, items)):
        rollouts.samples[at] = replace(rollouts[at], reward=reward)
    rewards = Rewards(rollouts.rewards, rollouts.group_size, rollouts.owners, rollouts.loss_mask)
    estimator, scale = advantage_of(recipe.objective), recipe.objective.advantage_scale
    # What a value head is to say the trainer fills in, before its first update.
    estimate = (
        np.zeros(len(rewards.owners), np.float32)
        if estimator == "gae"
        else ESTIMATORS[estimator](rewards, scale)
    )
    rollouts.fill(advantages=estimate)
    rollouts.reward_s = time.perf_counter() - began


def refuse_empty(completions: Sequence[Completion]) -> None:
    """Raises EngineError for a completion without a token."""
    for c in completions:
        if not c.token_ids:
            raise EngineError(
                f"engine, sample {c.sample_index} of prompt {c.prompt_index}",
                got=f"no token ({c.finish_reason})",
                expected="at least one, to train on",
                hint="is the prompt longer than engine.max_model_len?",
            )
