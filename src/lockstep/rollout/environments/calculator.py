"""A calculator as a tool, and questions that a small model cannot answer without one: a task of two turns.

user        What is 417 * 38?
model       calculate("417 * 38")
tool        15846
model       15846
"""

import ast
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
LARGEST = 10**18
LONGEST = 200


class Calculator:
    """Adds, subtracts and multiplies whole numbers; 1 for the right last answer, else 0."""

    def reset(self, answer: str, **item: Any) -> None:
        """Begin with a question of :class:`Questions`."""
        self._answer = str(answer)

    def calculate(self, expression: str) -> str:
        """Compute an expression of whole numbers with +, - and *.

        Args:
            expression: The expression, such as 12 * 7.
        """
        if len(expression) > LONGEST:
            raise ValueError(f"an expression of more than {LONGEST} characters")
        return str(_value(ast.parse(expression.strip(), mode="eval").body))

    def get_reward(self, answer: str) -> float:
        """1 where the last answer is the number, white space aside."""
        return float(answer.strip() == self._answer)


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            value = number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError("whole numbers with +, - and * alone")
    if abs(value) > LARGEST:
        raise ValueError("a number of more than 18 digits")
    return value


class Product(NamedTuple):
    """One question, solved."""

    question: str
    expression: str
    answer: str


class Questions:
    """Products of two numbers, each with solved ones before it as conversations.

    Args:
        seed: question n is a function of (seed, n).
        size: how many there are.
        digits: of each factor.
        shots: solved ones.
    """

    def __init__(self, seed: int, size: int = 1_000_000, digits: int = 3, shots: int = 3) -> None:
        self.seed = seed
        self.size = size
        self.digits = digits
        self.shots = shots

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Question ``number``: ``question`` and ``answer``, and the conversation that asks it."""
        own = self._asked([self.seed, number])
        messages = []
        for shot in range(self.shots):  # the same before each question: an engine computes them once
            solved = self._asked([self.seed, self.size, shot])
            messages += [
                {"role": "user", "content": solved.question},
                {"role": "assistant", "content": f'calculate("{solved.expression}")'},
                {"role": "tool", "content": solved.answer},
                {"role": "assistant", "content": solved.answer},
            ]
        messages.append({"role": "user", "content": own.question})
        return {"question": own.question, "answer": own.answer, "messages": messages}

    def _asked(self, entropy: list[int]) -> Product:
        low = 10 ** (self.digits - 1)
        high = 10**self.digits
        a, b = np.random.default_rng(entropy).integers(low, high, 2).tolist()
        return Product(f"What is {a} * {b}?", f"{a} * {b}", str(a * b))
