"""Tasks: where questions come from and what an answer is worth."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from lockstep.config.recipe import Task as TaskConfig
from lockstep.errors import RecipeError, RewardError

Item = Mapping[str, Any]
"""One question: at least ``question`` and ``answer``, both text."""
Reward = Callable[[str, Item], float]

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
        shots = [_item(config.name, examples, number, ("question", "answer")) for number in range(config.examples)]
        self._shots = [message for item in shots for message in _solved(item)]
        self._reward = _reward(config.reward, self._items)

    def item(self, number: int) -> Item:
        """Question ``number``, counted over the whole run; a finite dataset starts over.

        Raises:
            RecipeError: when the dataset does not give it, or it has no ``question``.
        """
        return _item(self.config.name, self._items, number, ("question",))

    def messages(self, item: Item) -> list[dict[str, str]]:
        """The conversation that ends with the question."""
        system = [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []
        return [*system, *self._shots, {"role": "user", "content": str(item["question"])}]

    def reward(self, completion: str, item: Item, prompt: str) -> float:
        """What a completion is worth.

        Raises:
            RewardError: when the reward function raises or returns no finite number; prompt and completion are shown.
        """
        where = f"reward {self.config.reward}"
        shown = f"prompt {prompt[-200:]!r}, completion {completion[:200]!r}"
        try:
            value = float(self._reward(completion, item))
        except Exception as error:
            raise RewardError(
                where,
                got=f"{type(error).__name__}: {error}",
                expected="a finite number",
                hint=f"it was called on {shown}",
            ) from error
        if not math.isfinite(value):
            raise RewardError(where, got=str(value), expected="a finite number", hint=f"it was called on {shown}")
        return value


def exact_match(completion: str, item: Item) -> float:
    """1 when the completion is the answer, surrounding white space aside; else 0."""
    return float(completion.strip() == str(item["answer"]).strip())


def _dataset(config: TaskConfig, seed: int) -> Sequence[Item]:
    source, _, name = config.name.partition(":")
    if not name:
        raise RecipeError(
            "recipe, key task.name",
            got=repr(config.name),
            expected="reasoning_gym:DATASET or module:function",
            hint="reasoning_gym:chain_sum",
        )
    if source != "reasoning_gym":
        return _not_empty(config.name, _made(config, _call(config.name, "task.name"), seed))
    import reasoning_gym

    try:
        # It has __len__ and __getitem__, which is all that is asked of a sequence here.
        items = cast(Sequence[Item], reasoning_gym.create_dataset(name, **({"size": 1_000_000, "seed": seed} | config.options)))
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
        raise RecipeError(f"recipe, task {name}", got=type(items).__name__, expected=expected, hint="return a list") from error
    if not n:
        raise RecipeError(
            f"recipe, task {name}", got="an empty dataset", expected="at least one question", hint="see task.options"
        )
    return items


def _item(name: str, items: Sequence[Item], number: int, needs: tuple[str, ...]) -> Item:
    where = f"recipe, task {name}, item {number % len(items)}"
    expected = f"a mapping with {' and '.join(needs)}"
    try:
        item = items[number % len(items)]
    except (Exception, SystemExit) as error:
        raise RecipeError(where, got=f"{type(error).__name__}: {error}", expected=expected, hint="mend the dataset") from error
    missing = needs if not isinstance(item, Mapping) else [key for key in needs if key not in item]
    if missing:
        got = f"a mapping of {', '.join(map(str, item)) or 'nothing'}" if isinstance(item, Mapping) else type(item).__name__
        raise RecipeError(where, got=got, expected=expected, hint=f"mend the dataset: it lacks {', '.join(missing)}")
    return item


def _solved(item: Item) -> list[dict[str, str]]:
    return [{"role": "user", "content": str(item["question"])}, {"role": "assistant", "content": str(item["answer"])}]


def _reward(name: str, items: Any) -> Reward:
    if name == "exact_match":
        return exact_match
    if name == "dataset":
        if not hasattr(items, "score_answer"):
            raise RecipeError(
                "recipe, key task.reward", got="'dataset'", expected="a dataset with score_answer", hint="exact_match"
            )
        return lambda completion, item: items.score_answer(answer=completion.strip(), entry=item)
    return _call(name, "task.reward")


def _call(name: str, key: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported, a syntax error among it
        raise RecipeError(
            f"recipe, key {key}",
            got=f"{name!r} ({type(error).__name__}: {error})",
            expected="module:function that can be imported",
            hint="PYTHONPATH=. lockstep …",
        ) from error
    if not inspect.isroutine(function) and not callable(function):
        raise RecipeError(f"recipe, key {key}", got=f"{name!r}, no function", expected="a function", hint="name a function")
    return function
