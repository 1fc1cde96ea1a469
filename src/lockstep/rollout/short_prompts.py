"""Questions whose prompts are short enough, counted on past those that are not.

Which they are is found as they are asked for; question n is the n-th that fits: a function of the dataset.
"""

import threading
from collections.abc import Callable

from lockstep.errors import RecipeError


class ShortPrompts:
    """Places in a dataset of the questions that fit.

    Args:
        length: a question's prompt's tokens, by its place.
        n_items: of the dataset, which starts over behind its last one.
        most: tokens that a prompt may have.
    """

    def __init__(self, length: Callable[[int], int], n_items: int, most: int) -> None:
        self._length = length
        self._n_items = n_items
        self.most = most
        self._kept: list[int] = []
        self._looked_at = 0
        self._changing = threading.Lock()  # in flight, the rollout thread and the trainer's both ask

    @property
    def left_out(self) -> int:
        """Questions that were too long, of those looked at so far."""
        return self._looked_at - len(self._kept)

    def place(self, number: int) -> int:
        """Where question ``number`` stands.

        Raises:
            RecipeError: where none fits.
        """
        with self._changing:
            while len(self._kept) <= number and self._looked_at < self._n_items:
                if self._length(self._looked_at) <= self.most:
                    self._kept.append(self._looked_at)
                self._looked_at += 1
        if not self._kept:
            raise RecipeError(
                "recipe, key task.max_prompt_tokens",
                got=str(self.most),
                expected=f"room for one of the dataset's {self._n_items} prompts at least",
                hint="--set task.max_prompt_tokens=0",
            )
        return self._kept[number % len(self._kept)]
