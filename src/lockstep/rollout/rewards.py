"""What an answer is worth: the rewards there are, and what is said of one that raised, hung or gave none."""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lockstep.config.imported import imported
from lockstep.errors import RecipeError, RewardError

Item = Mapping[str, Any]
"""One question: at least ``question`` and ``answer``, both text."""
Reward = Callable[[str, Item], float]


BUILT_IN = {
    "exact_match": "lockstep.rollout.rewards:exact_match",
    "math_verify": "lockstep.rollout.math_reward:math_verify",
}
"""Rewards that come with Lockstep, by the recipe's name for them."""
UNTIMED = ("exact_match",)
"""Rewards that cannot take long."""


def exact_match(completion: str, item: Item) -> float:
    """1 when the completion is the answer, surrounding white space aside; else 0."""
    return float(completion.strip() == str(item["answer"]).strip())


def computed(reward: Reward, completion: str, item: Item) -> float:
    """What a completion is worth; of an ``async`` reward, once it is known."""
    value: Any = reward(completion, item)
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    return float(value)


def reward_named(name: str, items: Any) -> Reward:
    """The recipe's reward.

    Raises:
        RecipeError: when there is none of that name, or the dataset has no scorer.
    """
    if name == "math_verify":
        from lockstep.rollout.math_reward import ready

        ready()
    if name in BUILT_IN:
        return imported(BUILT_IN[name], "task.reward")
    if name == "dataset":
        if not hasattr(items, "score_answer"):
            raise RecipeError(
                "recipe, key task.reward",
                got="'dataset'",
                expected="a dataset with score_answer",
                hint="exact_match",
            )
        return lambda completion, item: items.score_answer(answer=completion.strip(), entry=item)
    return imported(name, "task.reward")


def raised(error: BaseException) -> str:
    """What somebody's code raised, whatever that is: its text may raise again."""
    try:
        return f"{type(error).__name__}: {error}"[:2000]
    except Exception:
        return type(error).__name__


def refused(name: str, got: str, completion: str, item: Item) -> RewardError:
    """The error of a reward that is none; prompt and completion are shown."""
    shown = f"prompt {str(item.get('question', ''))[-200:]!r}, completion {completion[:200]!r}"
    return RewardError(
        f"reward {name}", got=got, expected="a finite number", hint=f"it was called on {shown}"
    )
