"""Which objectives there are, what each needs, and what the loop can give. No torch until one is asked for.

A new objective is a function in a file of its own, beside ``grpo.py``, and a line in :data:`OBJECTIVES`. One
of the user's is named in the recipe as ``module:function``, takes ``[objective.options]`` as keyword
arguments, and says what it needs by :func:`needs`.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lockstep.config.imported import imported
from lockstep.config.recipe import Objective
from lockstep.errors import RecipeError, Stopped

if TYPE_CHECKING:
    from lockstep.objectives.base import LossInputs, LossOutputs


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective must be given beyond log-probabilities, advantages and weights."""

    values: bool = False
    """A value head's estimate for each token."""
    reference: bool = False
    """Log-probabilities of a frozen reference model."""
    pairs: bool = False
    """A chosen and a rejected sequence side by side, instead of advantages."""
    sequence_ids: bool = False
    """Which sequence each token belongs to."""


GIVEN = Needs(sequence_ids=True)
"""What the loop can give."""
WITHOUT = {
    "values": "no value head is trained",
    "reference": "no reference model is kept",
    "pairs": "samples come in groups with rewards, not in pairs",
}
"""Why it cannot give the rest."""


@dataclass(frozen=True)
class Known:
    """An objective that comes with Lockstep."""

    function: str
    """``module:function``."""
    keys: tuple[str, ...] = ()
    """The keys of ``[objective]`` that it takes, as keyword arguments of the same names."""
    needs: Needs = Needs()


OBJECTIVES = {
    "grpo": Known("lockstep.objectives.grpo:grpo", ("clip_low", "clip_high")),
}

Loss = Callable[["LossInputs"], "LossOutputs"]


def needs(**what: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Says of a user's objective what it must be given: ``@needs(reference=True)``.

    The names are those of :class:`Needs`.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.needs = Needs(**what)  # type: ignore[attr-defined]
        return function

    return mark


def loss_of(objective: Objective) -> Loss:
    """The recipe's objective, its options bound to it.

    Raises:
        RecipeError: for a name that is none, options that it does not take, or a need that the loop cannot
            meet.
    """
    name = objective.name
    if ":" in name:
        function, options = imported(name, "objective.name"), objective.options
        _refuse_unmet(name, getattr(function, "needs", Needs()))
        _refuse_options(name, function, options)
        return partial(_checked, name, function, options)
    known = OBJECTIVES.get(name)
    if known is None:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.5)
        raise RecipeError(
            "recipe, key objective.name",
            got=repr(name),
            expected=f"{near[0]!r} perhaps"
            if near
            else f"{', '.join(sorted(OBJECTIVES))}, or module:function",
            hint=f"--set objective.name={near[0] if near else 'grpo'}",
        )
    if objective.options:
        raise RecipeError(
            "recipe, key objective.options",
            got=", ".join(objective.options),
            expected=(
                f"none: {name} is set by {', '.join(f'objective.{key}' for key in known.keys) or 'nothing'}"
            ),
            hint="objective.options are for an objective of your own, module:function",
        )
    _refuse_unmet(name, known.needs)
    return partial(
        imported(known.function, "objective.name"), **{key: getattr(objective, key) for key in known.keys}
    )


def refuse_objective(objective: Objective) -> None:
    """What can be wrong with an objective before a start; without importing torch for Lockstep's own.

    Raises:
        RecipeError: as :func:`loss_of`.
    """
    known = OBJECTIVES.get(objective.name)
    if known is None or objective.options:
        loss_of(objective)
    else:
        _refuse_unmet(objective.name, known.needs)


def _refuse_unmet(name: str, wanted: Needs) -> None:
    given = asdict(GIVEN)
    unmet = [what for what, needed in asdict(wanted).items() if needed and not given[what]]
    if unmet:
        raise RecipeError(
            "recipe, key objective.name",
            got=f"{name!r}, which needs {' and '.join(unmet)}",
            expected="an objective that needs no more than this loop gives",
            hint="; ".join(WITHOUT[what] for what in unmet),
        )


def _refuse_options(name: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    try:
        inspect.signature(function).bind(None, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            "recipe, key objective.options",
            got=f"{options or 'none'} for {name} ({error})",
            expected="its keyword arguments, after the inputs",
            hint="see docs/guides/your-own-objective.md",
        ) from error


def _checked(
    name: str, function: Callable[..., Any], options: dict[str, Any], inputs: "LossInputs"
) -> "LossOutputs":
    """Call a user's objective, and refuse what it must not give back."""
    from lockstep.objectives.base import LossOutputs

    try:
        found = function(inputs, **options)
    except Stopped:
        raise
    except Exception as error:
        raise RecipeError(
            f"objective {name}",
            got=f"{type(error).__name__}: {error}",
            expected="a loss",
            hint="mend it, then: lockstep train --resume RUN",
        ) from error
    said = type(found).__name__
    if isinstance(found, LossOutputs):
        if (
            found.loss.ndim == 0
            and found.loss.requires_grad == inputs.logprobs.requires_grad
            and (found.clipped.shape == inputs.logprobs.shape)
        ):
            return found
        said = f"a loss of shape {list(found.loss.shape)}, clipped of shape {list(found.clipped.shape)}"
    raise RecipeError(
        f"objective {name}",
        got=said,
        expected=(
            f"LossOutputs: a differentiable loss of shape [], clipped of shape {list(inputs.logprobs.shape)}"
        ),
        hint="see docs/guides/your-own-objective.md",
    )
