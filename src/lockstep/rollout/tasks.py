"""Tasks: where questions come from and what an answer is worth."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from lockstep.config.imported import imported
from lockstep.config.recipe import TaskConfig
from lockstep.errors import RecipeError, Stopped
from lockstep.rollout.datasets import READERS, read_items
from lockstep.rollout.deadline import Overdue, deadline
from lockstep.rollout.reward_workers import RewardWorkers
from lockstep.rollout.rewards import Item, Reward, raised, refused, reward_named

EXAMPLES_SEED_OFFSET = 1_000_003
"""The solved examples come from the same generator under a seed no training question uses."""


class Task:
    """Questions by number, their conversation, and their reward.

    Args:
        config: the recipe's ``[task]``.
        seed: questions are a function of (seed, number), so nothing has to be saved to go on.
    """

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self.config = config
        self._items = _dataset(config, seed)
        examples = _dataset(config, seed + EXAMPLES_SEED_OFFSET) if config.examples else []
        shots = [
            _item(config.name, examples, number, ("question", "answer")) for number in range(config.examples)
        ]
        self._shots = [message for item in shots for message in _solved(item)]
        self._workers = RewardWorkers(config, seed) if config.reward_workers else None
        self._reward = None if self._workers else reward_named(config.reward, self._items)

    def item(self, number: int) -> Item:
        """Question ``number``, counted over the whole run; a finite dataset starts over.

        Raises:
            RecipeError: when the dataset does not give it, or it has no ``question``.
        """
        return _item(self.config.name, self._items, number, ("question",))

    def messages(self, item: Item) -> list[dict[str, str]]:
        """The conversation that ends with the question."""
        system = (
            [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []
        )
        return [*system, *self._shots, {"role": "user", "content": str(item["question"])}]

    def rewards(self, completions: Sequence[str], items: Sequence[Item]) -> Iterator[float]:
        """What each completion is worth, in order.

        Raises:
            RewardError: at the first whose reward raises, ends the process, takes longer than
                ``task.reward_timeout_s`` or is no finite number; prompt and completion are shown.
        """
        here = (self._here(completion, item) for completion, item in zip(completions, items, strict=True))
        values = here if self._workers is None else self._workers.rewards(completions, items)
        for value, completion, item in zip(values, completions, items, strict=True):
            if not math.isfinite(value):
                raise refused(self.config.reward, str(value), completion, item)
            yield value

    def close(self) -> None:
        """End the processes that compute rewards, where there are any."""
        if self._workers is not None:
            self._workers.close()

    def _here(self, completion: str, item: Item) -> float:
        assert self._reward is not None
        seconds = self.config.reward_timeout_s if self.config.reward != "exact_match" else 0.0
        try:
            with deadline(seconds):
                return float(self._reward(completion, item))
        except Stopped:
            raise
        except Overdue:
            raise refused(self.config.reward, f"no answer in {seconds:g} s", completion, item) from None
        except BaseException as error:
            raise refused(self.config.reward, raised(error), completion, item) from error


def reward_of(config: TaskConfig, seed: int) -> Reward:
    """The recipe's reward alone, for a process that computes nothing else.

    Raises:
        RecipeError: as :class:`Task`.
    """
    return reward_named(config.reward, _dataset(config, seed) if config.reward == "dataset" else None)


def _dataset(config: TaskConfig, seed: int) -> Sequence[Item]:
    source, _, name = config.name.partition(":")
    if not name:
        raise RecipeError(
            "recipe, key task.name",
            got=repr(config.name),
            expected="reasoning_gym:DATASET, jsonl:FILE, parquet:FILE, hub:ORG/NAME or module:function",
            hint="reasoning_gym:chain_sum",
        )
    if source in READERS:
        return _not_empty(config.name, read_items(source, name, config.options, seed))
    if source != "reasoning_gym":
        return _not_empty(config.name, _made(config, imported(config.name, "task.name"), seed))
    import reasoning_gym

    try:
        # It has __len__ and __getitem__, which is all that is asked of a sequence here.
        items = cast(
            Sequence[Item],
            reasoning_gym.create_dataset(name, **({"size": 1_000_000, "seed": seed} | config.options)),
        )
    except Exception as error:
        raise RecipeError(
            f"recipe, task {config.name}",
            got=f"{type(error).__name__}: {error}",
            expected="a reasoning-gym dataset and its options",
            hint="python -c 'import reasoning_gym.factory as f; print(sorted(f.DATASETS))'",
        ) from error
    return _not_empty(config.name, items)


def _made(config: TaskConfig, function: Callable[..., Any], seed: int) -> Any:
    try:
        return function(**({"seed": seed} | config.options))
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"recipe, task {config.name}",
            got=f"{type(error).__name__}: {error}",
            expected="a sequence of {question, answer} mappings",
            hint=f"it was called with seed={seed} and {config.options}",
        ) from error


def _not_empty(name: str, items: Any) -> Sequence[Item]:
    try:
        n = len(items)
    except TypeError as error:
        expected = "a sequence: something with a length, indexed by number"
        raise RecipeError(
            f"recipe, task {name}", got=type(items).__name__, expected=expected, hint="return a list"
        ) from error
    if not n:
        raise RecipeError(
            f"recipe, task {name}",
            got="an empty dataset",
            expected="at least one question",
            hint="see task.options",
        )
    return items


def _item(name: str, items: Sequence[Item], number: int, needs: tuple[str, ...]) -> Item:
    where = f"recipe, task {name}, item {number % len(items)}"
    expected = f"a mapping with {' and '.join(needs)}"
    try:
        item = items[number % len(items)]
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(
            where, got=f"{type(error).__name__}: {error}", expected=expected, hint="mend the dataset"
        ) from error
    missing = needs if not isinstance(item, Mapping) else [key for key in needs if key not in item]
    if missing:
        got = (
            f"a mapping of {', '.join(map(str, item)) or 'nothing'}"
            if isinstance(item, Mapping)
            else type(item).__name__
        )
        raise RecipeError(
            where, got=got, expected=expected, hint=f"mend the dataset: it lacks {', '.join(missing)}"
        )
    return item


def _solved(item: Item) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": str(item["question"])},
        {"role": "assistant", "content": str(item["answer"])},
    ]
