"""Values that no recipe holds: a run is reproduced by what stands there."""

import datetime
import math
from dataclasses import dataclass
from typing import Any

from lockstep.errors import RecipeError

UNBOUNDED = ("objective.clip_high", "objective.correction_high", "optimizer.max_grad_norm")
"""Keys where ``inf`` says that there is no bound; elsewhere it is a number that nothing can compute with."""


def refuse_unrepeatable(value: Any, source: str, path: tuple[str, ...] = ()) -> None:
    """Refuse what a manifest cannot hold exactly, for a run is reproduced by what stands there.

    Also what equals nothing (NaN), and ``inf`` where it bounds nothing.
    """
    where = ".".join(path)
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_unrepeatable(item, source, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            refuse_unrepeatable(item, source, (*path, str(number)))
    elif complaint := _unrepeatable(value, where):
        raise RecipeError(
            f"recipe {source}, key {where}",
            got=complaint.got,
            expected=complaint.expected,
            hint=f"--set {where}=…",
        )


@dataclass(frozen=True)
class _Complaint:
    """What is wrong with a value that cannot be kept, as :class:`~lockstep.errors.LockstepError` has it."""

    got: str
    expected: str


def _unrepeatable(value: Any, where: str) -> _Complaint | None:
    if (
        isinstance(value, float)
        and not math.isfinite(value)
        and not (value == math.inf and where in UNBOUNDED)
    ):
        return _Complaint(str(value), f"a finite number; inf is one for {', '.join(UNBOUNDED)} alone")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return _Complaint(f"a whole number of {value.bit_length()} bits", "one of 64 bits")
    if isinstance(value, datetime.date | datetime.time):
        return _Complaint(f"the date or time {value}", "text: put it in quotes")
    return None


RECOMPUTED = ("current", "recompute", "recomputed", "now")
"""What others call old log-probabilities that are computed when the sample is trained on."""


def refuse_recomputed(table: dict[str, Any], source: str) -> None:
    """Old log-probabilities are of the policy that drew the tokens, by whatever name others are asked for.

    Raises:
        RecipeError: for one of :data:`RECOMPUTED`.
    """
    section = table.get("objective", {})
    if isinstance(section, dict) and section.get("old_logprobs") in RECOMPUTED:
        raise RecipeError(
            f"recipe {source}, key objective.old_logprobs",
            got=repr(section["old_logprobs"]),
            expected=(
                "the policy that drew the tokens: under the current weights the ratio is 1, "
                "whatever drew them, and nothing is ever clipped"
            ),
            hint="--set objective.old_logprobs=sampling",
        )
