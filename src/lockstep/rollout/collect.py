"""One step's rollouts: prompts, sampled completions, rewards, advantages."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.engines.base import Engine
from lockstep.errors import EngineError
from lockstep.objectives.grpo import group_advantages
from lockstep.records.tokens import FLOAT32, INT32, Completion, SamplingParams
from lockstep.rendering import Renderer
from lockstep.rollout.tasks import Task


@dataclass(eq=False)
class Rollouts:
    """The samples of one step, flat over groups: sample i belongs to prompt ``i // group_size``."""

    step: int
    group_size: int
    items: Sequence[int]
    """Question number of each prompt."""
    prompts: list[np.ndarray]
    """int32 [P] each."""
    completions: list[Completion]
    texts: list[str]
    rewards: np.ndarray = field(default_factory=lambda: np.empty(0))
    """float64 [samples]; NaN where no reward was given."""
    advantages: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """float32 [samples]; NaN until all are scored."""
    sample_s: float = 0.0
    reward_s: float = 0.0

    def token_ids(self, sample: int) -> np.ndarray:
        """int32 [T] of one completion."""
        return np.frombuffer(self.completions[sample].token_ids, INT32)

    def engine_logprobs(self) -> np.ndarray:
        """float32, all completions one after another, nats."""
        return np.frombuffer(b"".join(c.logprobs for c in self.completions), FLOAT32)

    def lengths(self) -> np.ndarray:
        """int [samples]: tokens of each completion."""
        return np.array([len(c.token_ids) // 4 for c in self.completions])

    @property
    def scored(self) -> bool:
        """True when every sample has its reward and its advantage."""
        return not (
            np.isnan(self.rewards).any() or np.isnan(self.advantages).any() or len(self.advantages) < len(self.completions)
        )

    @property
    def missing(self) -> int:
        """Tokens whose engine log-probability is missing or non-finite."""
        return sum(c.missing for c in self.completions)


def sampling_seed(seed: int, step: int, item: int) -> int:
    """One seed for each (run, step, question), so that a step can be sampled again alike."""
    return int(np.random.SeedSequence([seed, step, item]).generate_state(1)[0] & 0x7FFFFFFF)


def sample(engine: Engine, task: Task, renderer: Renderer, recipe: Recipe, step: int) -> Rollouts:
    """Draw ``group_size`` completions for each of the step's questions.

    Raises:
        EngineError: when a completion is empty, or its log-probabilities do not match its tokens one to one.
    """
    began = time.perf_counter()
    training = recipe.training
    numbers = range(step * training.prompts_per_step, (step + 1) * training.prompts_per_step)
    prompts = [renderer.prompt(task.messages(task.item(number))) for number in numbers]
    params = [request(recipe, renderer, sampling_seed(training.seed, step, number)) for number in numbers]
    completions = engine.sample(prompts, params)
    _check(completions, len(prompts), training.group_size)
    texts = [renderer.text(np.frombuffer(c.token_ids, INT32)) for c in completions]
    spent = time.perf_counter() - began
    unscored = np.full(len(completions), np.nan)
    return Rollouts(
        step,
        training.group_size,
        list(numbers),
        prompts,
        completions,
        texts,
        rewards=unscored,
        advantages=unscored.astype(np.float32),
        sample_s=spent,
    )


def request(recipe: Recipe, renderer: Renderer, seed: int, **changes: Any) -> SamplingParams:
    """The recipe's sampling for one prompt."""
    stops = recipe.sampling.stop_token_ids or renderer.stop_token_ids
    return replace(recipe.sampling, **({"n": recipe.training.group_size, "seed": seed, "stop_token_ids": stops} | changes))


def score(rollouts: Rollouts, task: Task, renderer: Renderer, recipe: Recipe) -> None:
    """Fill in rewards and group-relative advantages.

    Raises:
        RewardError: at the first reward that is none; the rewards before it stay filled in.
    """
    began = time.perf_counter()
    items = [task.item(rollouts.items[i // rollouts.group_size]) for i in range(len(rollouts.texts))]
    for i, reward in enumerate(task.rewards(rollouts.texts, items)):
        rollouts.rewards[i] = reward
    grouped = rollouts.rewards.reshape(-1, rollouts.group_size)
    rollouts.advantages = group_advantages(grouped, recipe.objective.advantage_scale).reshape(-1)
    rollouts.reward_s = time.perf_counter() - began


def _check(completions: Sequence[Completion], n_prompts: int, group_size: int) -> None:
    order = [(c.prompt_index, c.sample_index) for c in completions]
    expected = [(p, s) for p in range(n_prompts) for s in range(group_size)]
    if order != expected:
        raise EngineError(
            "engine, sample",
            got=f"{len(order)} completions in order {order[:4]}…",
            expected=f"{len(expected)} in prompt order",
            hint="this is a bug of the adapter",
        )
    for c in completions:
        if not c.token_ids or len(c.token_ids) != len(c.logprobs):
            raise EngineError(
                f"engine, sample {c.sample_index} of prompt {c.prompt_index}",
                got=f"{len(c.token_ids) // 4} tokens with {len(c.logprobs) // 4} log-probabilities ({c.finish_reason})",
                expected="at least one token, and one log-probability each",
                hint="is the prompt longer than engine.max_model_len?",
            )
