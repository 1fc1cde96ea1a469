"""How a model writes that it calls a tool, by ``task.tool_calls``.

json      <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>     Hermes, Qwen
python    add(1, b=2)     [add(1, b=2), add(3, b=4)]      and nothing beside it     Llama 3.2
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.config.imported import imported
from lockstep.errors import RecipeError


@dataclass(frozen=True)
class Call:
    """A tool that a turn of the model's calls."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    positional: tuple[Any, ...] = ()


class UnreadableCallError(Exception):
    """A call that cannot be read. ``str``: why; the model is told so."""


Parser = Callable[[str], list[Call]]
"""Raises UnreadableCallError. An empty list: an answer that calls nothing, and ends the conversation."""

TAGGED = re.compile(r"<tool_call>(.*?)(</tool_call>|$)", re.DOTALL)


def in_json(text: str) -> list[Call]:
    """Every ``<tool_call>``, in order."""
    found = []
    for body, _ in TAGGED.findall(text):
        try:
            read = json.loads(body)
            name = read["name"]
            arguments = read.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UnreadableCallError(f"no tool call in JSON: {type(error).__name__}") from error
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise UnreadableCallError("a tool call is {name: text, arguments: {…}}")
        found.append(Call(name, arguments))
    return found


def in_python(text: str) -> list[Call]:
    """The calls that the whole text is; none where it is anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    # A model's text: nested deep enough it exhausts the parser, and of a NUL Python 3.11 makes a ValueError.
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return []
    written = tree.elts if isinstance(tree, ast.List) else [tree]
    calls = [call for call in written if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]
    return [_call(call) for call in calls] if len(calls) == len(written) else []


def _call(call: ast.Call) -> Call:
    assert isinstance(call.func, ast.Name)
    if any(keyword.arg is None for keyword in call.keywords):
        raise UnreadableCallError("arguments are given one by one")
    try:
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return Call(call.func.id, named, tuple(map(ast.literal_eval, call.args)))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UnreadableCallError(
            "arguments are numbers, text, true, false, none, or lists of them"
        ) from error


PARSERS: dict[str, Parser] = {"json": in_json, "python": in_python}


def parser_named(name: str) -> Parser:
    """The recipe's.

    Raises:
        RecipeError: where there is none.
    """
    if name in PARSERS:
        return PARSERS[name]
    if ":" not in name:
        raise RecipeError(
            "recipe, key task.tool_calls",
            got=repr(name),
            expected=f"{', '.join(PARSERS)}, or module:function",
            hint="--set task.tool_calls=json",
        )
    theirs: Callable[[str], Sequence[tuple[str, Mapping[str, Any]]]] = imported(name, "task.tool_calls")

    def parse(text: str) -> list[Call]:
        try:
            return [Call(name, dict(arguments)) for name, arguments in theirs(text)]
        except Exception as error:
            raise UnreadableCallError(f"{type(error).__name__}: {error}") from error

    return parse
