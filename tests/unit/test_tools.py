"""Tools: how calls are read, what the model is told, and the calculator that comes with Lockstep."""

from functools import partial

import pytest

from lockstep.config.task import TaskConfig
from lockstep.errors import RecipeError
from lockstep.rollout.environments.calculator import Calculator, Questions
from lockstep.rollout.environments.calls import Call, UnreadableCallError, in_json, in_python, parser_named
from lockstep.rollout.environments.protocol import Environments


@pytest.mark.parametrize(
    ("parse", "text", "calls"),
    [
        (
            in_json,
            'ok <tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>',
            [Call("f", {"a": [1]})],
        ),
        (in_json, '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}', [Call("f"), Call("g")]),
        (in_json, "the answer is 5", []),
        (in_python, 'f("12 * 7")', [Call("f", {}, ("12 * 7",))]),
        (in_python, "[f(a=1), g()]", [Call("f", {"a": 1}), Call("g")]),
        (in_python, "15846", []),
        (in_python, "f(1) = 2", []),
        (in_python, "[f(1), 2]", []),
        (in_python, "", []),
    ],
)
def test_calls_are_read(parse, text, calls):
    assert parse(text) == calls


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (in_json, "<tool_call>{</tool_call>"),
        (in_json, "<tool_call>[1]</tool_call>"),
        (in_json, '<tool_call>{"name": 3}</tool_call>'),
        (in_python, "f(x)"),
        (in_python, "f(**{})"),
    ],
)
def test_calls_that_cannot_be_read_are_told(parse, text):
    with pytest.raises(UnreadableCallError):
        parse(text)


def test_a_parser_that_is_none_is_refused():
    with pytest.raises(RecipeError, match=r"task\.tool_calls"):
        parser_named("xml")


def calculator():
    config = TaskConfig(
        name="a:b",
        environment="lockstep.rollout.environments.calculator:Calculator",
        tool_calls="python",
    )
    return Environments(config)


@pytest.mark.parametrize(
    ("text", "said", "in_vain"),
    [
        ('calculate("417 * 38")', "15846", 0),
        ('calculate(expression="2 - -3 * 4")', "14", 0),
        ('calculate("2 ** 9")', "error: ValueError: whole numbers with +, - and * alone", 1),
        ('calculate("__import__(1)")', "error: ValueError: whole numbers with +, - and * alone", 1),
        ("calculate()", "error: calculate: missing a required argument: 'expression'", 1),
        ("compute(1)", "error: there is no compute; there is calculate", 1),
        ("calculate(x)", "error: arguments are numbers, text", 1),
    ],
)
def test_the_model_is_told_what_a_call_comes_to(text, said, in_vain):
    environments = calculator()
    (answer,), vain = environments.answers(environments.made(), text)
    assert answer.startswith(said)
    assert vain == in_vain


def test_a_calculator_is_worth_the_right_last_answer():
    item = Questions(seed=3, shots=1)[8]
    environment = Calculator()
    environment.reset(**item)
    assert environment.get_reward(f" {item['answer']}\n") == 1.0
    assert environment.get_reward(item["answer"] + "0") == 0.0
    roles = [message["role"] for message in item["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant", "user"]
    assert item == Questions(seed=3, shots=1)[8]
    assert partial(Questions, 4)()[8] != item
