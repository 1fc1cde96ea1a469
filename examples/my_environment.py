"""An environment of your own: a phonebook to look a number up in, one call and one answer.

    PYTHONPATH=examples lockstep train recipe.toml   # with task.name = "my_environment:questions",
                                                     # task.environment = "my_environment:Phonebook"

One object serves one sample. Public methods other than ``reset`` and ``get_reward`` are tools: the docstring
tells the model what each does. What a tool raises the model is told. See docs/guides/environments.md.
"""

import random
from typing import Any

NAMES = ("Ada", "Blaise", "Carl", "Emmy", "Kurt", "Sofia")


class Phonebook:
    """Worth 1 for the right number as the last answer, a tenth for having looked it up."""

    def reset(self, name: str, number: str, **item: Any) -> None:
        """Begin with one of :func:`questions`; its keys are the arguments."""
        self._name = name
        self._number = number
        self._found = False

    def look_up(self, name: str) -> str:
        """Find a person's number in the phonebook.

        Args:
            name: The person's first name.
        """
        # The model never sees the number but through this: a right answer is one that the tool gave.
        if name != self._name:
            raise KeyError(f"no {name} in the phonebook")
        self._found = True
        return self._number

    def get_reward(self, answer: str) -> float:
        """Asked once, with the text of the model's last turn."""
        return 0.1 * self._found + 0.9 * (answer.strip() == self._number)


def questions(seed: int, size: int = 10_000) -> list[dict[str, str]]:
    """Items of the task. Whatever keys they have, ``reset`` is given."""
    draw = random.Random(seed)
    made = []
    for _ in range(size):
        name = draw.choice(NAMES)
        number = str(draw.randrange(1000, 10_000))
        made.append({"question": f"What is {name}'s number?", "name": name, "number": number})
    return made
