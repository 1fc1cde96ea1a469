"""Tasks: where questions come from and what an answer is worth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from lockstep.config.imported import imported
from lockstep.config.recipe import TaskConfig
from lockstep.errors import RecipeError, Stopped
from lockstep.rollout.datasets import READERS, read_items
from lockstep.rollout.environments.protocol import Environments
from lockstep.rollout.judge import Judge, parts_of
from lockstep.rollout.rewards import Item, Reward, reward_named
from lockstep.rollout.short_prompts import ShortPrompts

EXAMPLES_SEED_OFFSET = 1_000_003
"""The solved examples come from the same generator under a seed no training question uses."""
EVALUATION_SEED_OFFSET = 2_000_003
"""And held-out questions under one that neither uses."""


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
        self.environments = Environments(config) if config.environment else None
        self.parts = parts_of(config, self._items, seed)
        """Its several rewards; none where it has one."""
        one = self.environments is None and not self.parts
        self._judge = Judge(config, self._items, seed) if one else None
        self._short: ShortPrompts | None = None

    @property
    def n_items(self) -> int:
        """How many items the dataset has before it starts over."""
        return len(self._items)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of what the model may call; none without an environment."""
        return self.environments.tools if self.environments is not None else []

    def item(self, number: int) -> Item:
        """Question ``number``, counted over the whole run; a finite dataset starts over.

        Raises:
            RecipeError: when the dataset does not give it, or it has neither ``question`` nor ``messages``.
        """
        return self._at(number if self._short is None else self._short.place(number))

    def _at(self, place: int) -> Item:
        return _item(self.config.name, self._items, place, ("question",))

    def messages(self, item: Item, also: str = "") -> list[dict[str, str]]:
        """The conversation that ends with the question.

        Args:
            also: what an environment has to say of it, right behind it.
        """
        system = (
            [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []
        )
        own = item.get("messages") or [{"role": "user", "content": str(item["question"])}]
        *before, last = [dict(message) for message in own]
        last["content"] += also
        return [*system, *self._shots, *before, last]

    def rewards(self, completions: Sequence[str], items: Sequence[Item]) -> Iterator[float]:
        """What each completion is worth by ``task.reward``, in order.

        Raises:
            RewardError: as :meth:`Judge.rewards`.
        """
        assert self._judge is not None, "the recipe has several rewards, or an environment"
        return self._judge.rewards(completions, items)

    def pass_over_long(self, length: Callable[[list[dict[str, str]]], int]) -> None:
        """Leave questions out whose prompts are too long, where the recipe says so.

        Args:
            length: tokens of a conversation, rendered.
        """
        if self.config.max_prompt_tokens:

            def of(place: int) -> int:
                return length(self.messages(self._at(place)))

            self._short = ShortPrompts(of, len(self._items), self.config.max_prompt_tokens)

    def figures(self) -> dict[str, float]:
        """Figures of the questions so far, by catalog name."""
        return {} if self._short is None else {"prompts_too_long": float(self._short.left_out)}

    def close(self) -> None:
        """End the processes that compute rewards, where there are any."""
        for judge in [self._judge, *(part.judge for part in self.parts)]:
            if judge is not None:
                judge.close()


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
    if missing == ["question"] and isinstance(item, Mapping) and _is_conversation(item.get("messages")):
        return item
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


def _is_conversation(messages: Any) -> bool:
    """True for a list of {role, content}, at least one."""
    return (
        isinstance(messages, Sequence)
        and bool(messages)
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages)
    )


def _solved(item: Item) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": str(item["question"])},
        {"role": "assistant", "content": str(item["answer"])},
    ]
