"""Which corrections there are, with their published bounds. No torch until one is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockstep.config.imported import imported
from lockstep.config.recipe import Objective
from lockstep.errors import RecipeError

if TYPE_CHECKING:
    from lockstep.objectives.base import LossInputs
    from lockstep.objectives.corrections.base import Correction


@dataclass(frozen=True)
class KnownCorrection:
    """A correction and where its bounds come from."""

    function: str
    low: float
    high: float
    source: str


OURS = "lockstep.objectives.corrections."
CORRECTIONS = {
    "tis": KnownCorrection(f"{OURS}truncation:tis", 0.0, 2.0, "verl, SkyRL; TRL has 3"),
    "sequence_tis": KnownCorrection(f"{OURS}truncation:sequence_tis", 0.0, 2.0, "verl; SkyRL has 5"),
    "masked_is": KnownCorrection(
        f"{OURS}rejection:masked_is", 0.5, 5.0, "IcePop; NeMo-RL's and verl's presets"
    ),
    "geometric_rejection": KnownCorrection(f"{OURS}rejection:geometric_rejection", 0.999, 1.001, "verl"),
    "sequence_mask": KnownCorrection(f"{OURS}rejection:sequence_mask", 0.5, 2.0, "SkyRL"),
}


def correction_of(objective: Objective) -> "Callable[[LossInputs], Correction] | None":
    """The recipe's correction with its bounds; None for none."""
    if objective.correction == "none":
        return None
    function = imported(CORRECTIONS[objective.correction].function, "objective.correction")
    low, high = bounds_of(objective)
    return lambda inputs: function(inputs, low, high)


def bounds_of(objective: Objective) -> tuple[float, float]:
    """The recipe's bounds, the published ones where it names none.

    Raises:
        RecipeError: where they leave out a ratio of 1, so that they would also act on a perfect backend.
    """
    known = CORRECTIONS[objective.correction]
    low = known.low if objective.correction_low is None else objective.correction_low
    high = known.high if objective.correction_high is None else objective.correction_high
    if not low <= 1.0 <= high:
        raise RecipeError(
            "recipe, keys objective.correction_low and objective.correction_high",
            got=f"[{low:g}, {high:g}]",
            expected="bounds with 1 between them: where both sides agree a correction does nothing",
            hint=f"the published ones of {objective.correction} are {known.low:g} and {known.high:g}",
        )
    return low, high


def refuse_correction(objective: Objective) -> None:
    """What can be wrong with a correction before a start; without importing torch.

    Raises:
        RecipeError: as :func:`bounds_of`; for bounds without a correction.
    """
    if objective.correction != "none":
        bounds_of(objective)
    elif objective.correction_low is not None or objective.correction_high is not None:
        raise RecipeError(
            "recipe, key objective.correction_high",
            got="bounds of a correction that is 'none'",
            expected=f"one of {', '.join(CORRECTIONS)}, or no bounds",
            hint="--set objective.correction=tis",
        )
