"""A reward at work: in this process under its deadline, or in processes of its own."""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from lockstep.config.task import TaskConfig
from lockstep.errors import RecipeError, Stopped
from lockstep.rollout.deadline import Overdue, deadline
from lockstep.rollout.reward_workers import RewardWorkers
from lockstep.rollout.rewards import UNTIMED, Item, computed, raised, refused, reward_named

AT_ONCE = 64
"""Calls of an ``async`` reward under way in this process."""


class Judge:
    """One reward function.

    Args:
        config: the recipe's ``[task]``, of which ``reward`` is asked.
        items: the dataset, for a reward that is its own.
        seed: of the dataset.
    """

    def __init__(self, config: TaskConfig, items: Sequence[Item], seed: int) -> None:
        self.config = config
        self._workers = RewardWorkers(config, seed) if config.reward_workers else None
        self._reward = None if self._workers else reward_named(config.reward, items)

    def rewards(self, completions: Sequence[str], items: Sequence[Item]) -> Iterator[float]:
        """What each completion is worth, in order.

        Raises:
            RewardError: at the first whose reward raises, ends the process, takes longer than
                ``task.reward_timeout_s`` or is no finite number; prompt and completion are shown.
        """
        if self._workers is not None:
            values = self._workers.rewards(completions, items)
        elif inspect.iscoroutinefunction(self._reward):
            values = self._side_by_side(self._reward, completions, items)
        else:
            values = (
                self._here(completion, item) for completion, item in zip(completions, items, strict=True)
            )
        for value, completion, item in zip(values, completions, items, strict=True):
            if not math.isfinite(value):
                raise refused(self.config.reward, str(value), completion, item)
            yield value

    def close(self) -> None:
        """End the processes that compute rewards, where there are any."""
        if self._workers is not None:
            self._workers.close()

    def _side_by_side(
        self, reward: Callable[..., Any], completions: Sequence[str], items: Sequence[Item]
    ) -> Iterator[float]:
        """An ``async`` reward's values: they wait for a server together, each for its deadline at most."""
        seconds = self.config.reward_timeout_s or None
        places = asyncio.Semaphore(AT_ONCE)

        async def one(completion: str, item: Item) -> float:
            async with places:
                return float(await asyncio.wait_for(reward(completion, item), seconds))

        async def every() -> list[float | BaseException]:
            asked = (one(*each) for each in zip(completions, items, strict=True))
            # All of them to their end: the error that is told is the first in order, not in time.
            return await asyncio.gather(*asked, return_exceptions=True)

        for value, completion, item in zip(asyncio.run(every()), completions, items, strict=True):
            if isinstance(value, TimeoutError) and seconds:
                raise refused(self.config.reward, f"no answer in {seconds:g} s", completion, item) from None
            if isinstance(value, BaseException):
                raise refused(self.config.reward, raised(value), completion, item) from value
            yield value

    def _here(self, completion: str, item: Item) -> float:
        assert self._reward is not None
        seconds = self.config.reward_timeout_s if self.config.reward not in UNTIMED else 0.0
        try:
            with deadline(seconds):
                return computed(self._reward, completion, item)
        except Stopped:
            raise
        except Overdue:
            raise refused(self.config.reward, f"no answer in {seconds:g} s", completion, item) from None
        except BaseException as error:
            raise refused(self.config.reward, raised(error), completion, item) from error


@dataclass(frozen=True)
class Part:
    """One of several rewards."""

    name: str
    weight: float
    judge: Judge


def parts_of(config: TaskConfig, items: Sequence[Item], seed: int) -> tuple[Part, ...]:
    """The recipe's several rewards; none where it has one.

    Raises:
        RecipeError: for two of one name, or what :class:`Judge` refuses.
    """
    named = [(part.name or part.function.rpartition(":")[2], part) for part in config.rewards]
    twice = sorted({name for name, _ in named if [other for other, _ in named].count(name) > 1})
    if twice:
        raise RecipeError(
            "recipe, key task.rewards",
            got=f"two that are called {twice[0]!r}",
            expected="a name for each: their figures are rewards/NAME/mean",
            hint=f'{{ function = "…", weight = 1.0, name = "{twice[0]}_2" }}',
        )
    return tuple(
        Part(name, part.weight, Judge(replace(config, reward=part.function, rewards=()), items, seed))
        for name, part in named
    )
