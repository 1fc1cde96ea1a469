"""A workload whose answers are long enough to span updates: questions without examples, drawn to their limit.

The reward is a share, so that no group is flat and every step moves the weights.
"""

from collections.abc import Mapping
from typing import Any

UNDRAWN = 3
"""A reserved token of SmolLM2's that nothing trained it to draw: as the only stop token it ends nothing."""


def sets(tokens: int, prompts: int, group_size: int) -> list[str]:
    """``--set`` overrides of the quick start.

    Args:
        tokens: of every answer.
        prompts: of a step.
        group_size: answers to each.
    """
    return [
        "task.examples=0",
        "task.reward=long_answers:digits",
        f"sampling.max_tokens={tokens}",
        f"sampling.stop_token_ids=[{UNDRAWN}]",
        f"training.prompts_per_step={prompts}",
        f"training.group_size={group_size}",
    ]


WORKLOADS = {"short": [], "long": sets(tokens=96, prompts=4, group_size=8)}
"""What loops are timed on, as overrides of the quick start: answers of five tokens after solved examples that
all samples of a step share, and 32 answers of 96 tokens."""


def digits(completion: str, item: Mapping[str, Any]) -> float:
    """Share of the answer's characters that are digits."""
    return sum(letter.isdigit() for letter in completion) / max(1, len(completion))
