"""The recipe's section on the task: where prompts come from, and what answers are worth."""

from typing import Any, Literal

from msgspec import Struct

from lockstep.config.objective import NonNegativeFloat, PositiveFloat
from lockstep.errors import RecipeError
from lockstep.records.tokens import NonNegative, Positive


class RewardPart(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of several rewards."""

    function: str
    """As ``task.reward``."""
    weight: float = 1.0
    """Its share in the sum; may be negative."""
    name: str = ""
    """The NAME in its figures, ``rewards/NAME/mean``; empty: the function's own."""


class TaskConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where prompts and rewards come from."""

    name: str
    """``reasoning_gym:DATASET``, a file (``rollout/datasets.py``), or ``module:function`` for a sequence of
    {"question", "answer"} mappings; {"messages", …} is a conversation that the model is to go on with."""
    options: dict[str, Any] = {}
    """Passed to the dataset by its own names."""
    examples: NonNegative = 0
    """Solved examples shown before each question, drawn from the same dataset under another seed."""
    system_prompt: str = ""
    reward: str = "exact_match"
    """``exact_match``, ``math_verify`` (an extra), ``dataset`` (its own scorer), or ``module:function`` of
    (completion, item) → float, ``async`` or not. With an environment it is the environment's."""
    rewards: tuple[RewardPart, ...] = ()
    """Several in the place of ``reward``: ``[{ function = "…", weight = 1.0 }, …]``. A completion earns their
    sum by weight, and each has its figures."""
    reward_timeout_s: NonNegativeFloat = 60.0
    """For a completion's reward, and for each call of an environment; one that takes longer ends the run and
    is shown. 0: as long as it takes."""
    reward_workers: NonNegative = 0
    """Processes that compute rewards and nothing else, so that one that crashes, exits or never returns from
    C ends in an error. 0: the trainer's own. The dataset's items are sent to them, tuples as lists."""
    max_prompt_tokens: NonNegative = 0
    """Questions with longer prompts are passed over, and counted. 0: none is."""
    overlong: Literal["keep", "mask", "penalise"] = "keep"
    """What of a completion that was cut at ``sampling.max_tokens``: it is as any other; it is left out of the
    loss, and counts among its group's rewards; or its reward is less (DAPO, arXiv:2503.14476, eq. 13)."""
    overlong_tokens: NonNegative = 0
    """With ``penalise``: the last so many tokens before ``sampling.max_tokens`` are paid for, in proportion.
    0: only what was cut pays."""
    overlong_penalty: PositiveFloat = 1.0
    """The penalty of a completion that was cut, with ``penalise``."""
    environment: str = ""
    """``module:Class`` with tools, for tasks of several turns: docs/guides/environments.md. Empty: none."""
    environment_options: dict[str, Any] = {}
    """Passed to the class by its own names."""
    tool_calls: str = "json"
    """How the model writes them: ``json`` (in <tool_call> tags, as Hermes and Qwen do), ``python``
    (``f(1, b=2)`` and nothing else), or ``module:function`` of a turn's text → [(name, arguments), …]."""
    max_turns: Positive = 8
    """Answers of the model in one conversation; each has at most ``sampling.max_tokens``."""

    @property
    def turns(self) -> int:
        """Answers of the model that a sample has at most."""
        return self.max_turns if self.environment else 1


def refuse_task(task: TaskConfig, source: str) -> None:
    """What of a task cannot go together.

    Raises:
        RecipeError: for one of them.
    """
    if task.environment and task.rewards:
        raise RecipeError(
            f"recipe {source}, key task.rewards",
            got=f"rewards beside task.environment = {task.environment!r}",
            expected="one of them: an environment says itself what a conversation is worth",
            hint="leave task.rewards out",
        )
