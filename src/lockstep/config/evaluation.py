"""The recipe's section on held-out questions: what the model does on what it does not learn from."""

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from lockstep.config.objective import NonNegativeFloat
from lockstep.config.task import TaskConfig
from lockstep.errors import RecipeError
from lockstep.records.tokens import NonNegative, Positive

FILES = ("jsonl:", "parquet:", "hub:")


class Evaluation(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Held-out questions, asked every so many steps; nothing is trained on the answers."""

    every: NonNegative = 0
    """Steps; after the last one too. 0: never."""
    prompts: Positive = 64
    """The same each time."""
    samples: Positive = 1
    """Completions drawn for each prompt."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy."""
    name: str = ""
    """As ``task.name``. Empty: the task's own generator under a seed that no question of the run has."""
    options: dict[str, Any] = {}
    """Passed to that dataset; with an empty name beside the task's own options, each in its place."""

    def task(self, of: TaskConfig) -> TaskConfig:
        """The task that is evaluated."""
        if self.name:
            return replace(of, name=self.name, options=self.options)
        return replace(of, options=of.options | self.options)


def refuse_evaluation(evaluation: Evaluation, task: TaskConfig, source: str) -> None:
    """Questions that the run trains on are not held out.

    Raises:
        RecipeError: for a file that is the task's own, and for greedy samples of one prompt, which are alike.
    """
    own = evaluation.task(task)
    if (
        evaluation.every
        and own.name.startswith(FILES)
        and (own.name, own.options) == (task.name, task.options)
    ):
        raise RecipeError(
            f"recipe {source}, key evaluation.name",
            got="nothing, for a task whose questions are a file's",
            expected="a file of other questions: those of the task are trained on",
            hint="--set evaluation.name=jsonl:held_out.jsonl",
        )
    if evaluation.every and evaluation.samples > 1 and evaluation.temperature == 0.0:
        raise RecipeError(
            f"recipe {source}, key evaluation.samples",
            got=f"{evaluation.samples} greedy ones, which are all alike",
            expected="1, or a temperature",
            hint="--set evaluation.temperature=1.0",
        )
