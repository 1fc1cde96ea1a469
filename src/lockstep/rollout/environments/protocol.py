"""What an environment is: a class that a recipe names, one object for each sample. The shape is TRL's.

    class Shop:
        def reset(self, **item) -> str | None:     what it returns is added to the question
        def price(self, article: str) -> str:      every other public method is a tool: its docstring says to
            '''The price of an article.            the model what it does, and what each argument is

            Args:
                article: Its name.
            '''
        def get_reward(self) -> float:             asked once, when the conversation has ended; it may take
                                                   an argument: the text of the model's last answer

It may have more: ``done``, an attribute that is true once the conversation is to end (without it, it ends
with an answer that calls no tool); ``close()``; and ``next_prompt(token_ids, messages)``, for one that has a
template of its own: all token ids of the next turn's prompt, which must begin with those that there are.

Any of its methods may be ``async``. Whatever a tool raises the model is told, as its answer, and it is
counted; what the other methods raise ends the run.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lockstep.config.imported import imported
from lockstep.config.task import TaskConfig
from lockstep.errors import EnvironmentFault, RecipeError, Stopped
from lockstep.rollout.deadline import Overdue, deadline
from lockstep.rollout.environments.calls import Call, Parser, UnreadableCallError, parser_named
from lockstep.rollout.rewards import raised

RESERVED = ("reset", "get_reward", "close", "next_prompt")
"""Public methods that are no tools."""
SHOWN = 200
T = TypeVar("T")


class ToolAnswer(NamedTuple):
    """What came of one call of a tool."""

    text: str
    in_vain: bool


class ToolAnswers(NamedTuple):
    """What came of a turn's calls."""

    texts: list[str]
    """The answers in the calls' order; none where the turn calls no tool."""
    in_vain: int
    """How many calls were in vain."""


class Environments:
    """A recipe's environment class: makes one object for each sample, and knows its tools.

    Args:
        config: the recipe's ``[task]``.

    Raises:
        RecipeError: for a class that is none, or lacks what the protocol asks for.
    """

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.name = config.environment
        self.parse: Parser = parser_named(config.tool_calls)
        self._class = imported(self.name, "task.environment")
        # One is made and closed at once: what is wrong with the class is said before anything is drawn.
        first = self.made()
        lacking = [name for name in ("reset", "get_reward") if not callable(getattr(first, name, None))]
        if lacking:
            self._refuse(f"a class without {' and '.join(lacking)}", "reset(**item) and get_reward()")
        self.tools = self._schemas(first)
        self.close(first)

    def close(self, environment: Any) -> None:
        """End one that has something to end.

        Raises:
            EnvironmentFault: as :meth:`call`.
        """
        if hasattr(environment, "close"):
            self.call(environment.close)

    def made(self) -> Any:
        """Another object, before its reset.

        Raises:
            RecipeError: when the class does not make one.
        """
        try:
            return self._class(**self.config.environment_options)
        except Stopped:
            raise
        except (Exception, SystemExit) as error:
            self._refuse(raised(error), f"an object, made with {self.config.environment_options}")

    def call(self, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What a method of the protocol gives, within ``task.reward_timeout_s``.

        Raises:
            EnvironmentFault: when it raises, or takes longer.
        """
        what = f"environment {self.name}, {getattr(method, '__name__', 'a method')}"
        seconds = self.config.reward_timeout_s
        try:
            with deadline(seconds):
                found: Any = method(*args, **kwargs)
                return asyncio.run(found) if inspect.iscoroutine(found) else found
        except Stopped:
            raise
        except Overdue:
            raise EnvironmentFault(
                what, got=f"no answer in {seconds:g} s", expected="one", hint="task.reward_timeout_s"
            ) from None
        # ``sys.exit`` too: it is told with what the method was called on, and ends no process unsaid.
        except BaseException as error:
            shown = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])[:SHOWN]
            raise EnvironmentFault(
                what, got=raised(error), expected="no exception", hint=f"it was called on ({shown})"
            ) from error

    def answer(self, environment: Any, call: Call) -> ToolAnswer:
        """Call a tool.

        Raises:
            EnvironmentFault: for one that takes too long.
        """
        if call.name not in self._tool_names:
            there = ", ".join(self._tool_names) or "nothing"
            return ToolAnswer(f"error: there is no {call.name}; there is {there}", in_vain=True)
        tool = getattr(environment, call.name)
        # Beforehand, so that a TypeError in the tool itself is told as what the tool raised.
        try:
            inspect.signature(tool).bind(*call.positional, **call.arguments)
        except TypeError as error:
            return ToolAnswer(f"error: {call.name}: {error}", in_vain=True)
        try:
            return ToolAnswer(str(self.call(tool, *call.positional, **call.arguments)), in_vain=False)
        except EnvironmentFault as fault:
            # A model is told what a tool raised, but not that it took too long (which has no cause here), nor
            # that it asked the process to end.
            if isinstance(fault.__cause__, Exception):
                return ToolAnswer(f"error: {raised(fault.__cause__)[:SHOWN]}", in_vain=True)
            raise

    def answers(self, environment: Any, text: str) -> ToolAnswers:
        """Call the tools that a turn calls."""
        try:
            calls = self.parse(text)
        except UnreadableCallError as error:
            return ToolAnswers([f"error: {error}"], 1)
        said = [self.answer(environment, call) for call in calls]
        return ToolAnswers([answer.text for answer in said], sum(answer.in_vain for answer in said))

    def reward(self, environment: Any, answer: str) -> Any:
        """What ``get_reward`` gives, told the last answer where it asks for one."""
        method = environment.get_reward
        try:
            inspect.signature(method).bind(answer)
        except TypeError:
            return self.call(method)
        return self.call(method, answer)

    def next_prompt(
        self, environment: Any, token_ids: np.ndarray, messages: Sequence[Mapping[str, str]]
    ) -> np.ndarray | None:
        """The next turn's prompt by an environment's own template, int32 [P]; None for one without."""
        own = getattr(environment, "next_prompt", None)
        if own is None:
            return None
        return np.asarray(self.call(own, token_ids.tolist(), [dict(m) for m in messages]), np.int32)

    @cached_property
    def _tool_names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]

    def _schemas(self, environment: Any) -> list[dict[str, Any]]:
        from transformers.utils import get_json_schema

        schemas = []
        for name, method in inspect.getmembers(environment, inspect.isroutine):
            if name.startswith("_") or name in RESERVED:
                continue
            try:
                schemas.append(get_json_schema(method))
            except Exception as error:
                expected = "type hints, and a docstring with a line for each argument under Args:"
                self._refuse(f"the tool {name}: {raised(error)}", expected)
        return schemas

    def _refuse(self, got: str, expected: str) -> Any:
        raise RecipeError(
            f"recipe, key task.environment, {self.name}",
            got=got,
            expected=expected,
            hint="docs/guides/environments.md",
        )
