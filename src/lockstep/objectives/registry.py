"""From a recipe's ``[objective]`` to its loss, and what the loop can give it.

Those that come with Lockstep are in ``catalogue.py``. One of the user's is named in the recipe as
``module:function`` and says what it needs by :func:`needs`. ``[objective.options]`` are either's keyword
arguments. No torch until one is asked for.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec

from lockstep.config.imported import imported
from lockstep.config.recipe import Objective
from lockstep.errors import RecipeError, Stopped
from lockstep.objectives.catalogue import OBJECTIVES, Known, Needs

if TYPE_CHECKING:
    from lockstep.objectives.base import LossInputs, LossOutputs


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
        RecipeError: for a name that is none, or options that it does not take.
    """
    name = objective.name
    if ":" in name:
        function = imported(name, "objective.name")
        options = objective.options
        _refuse_options(name, function, options)
        return partial(_checked, name, function, options)
    known = _known(name)
    return partial(imported(known.function, "objective.name"), **_arguments(objective, known))


def needs_of(objective: Objective) -> Needs:
    """What the recipe's objective must be given; its KL term, where it has one, a reference.

    Raises:
        RecipeError: for a name that is none.
    """
    own = (
        getattr(imported(objective.name, "objective.name"), "needs", Needs())
        if ":" in objective.name
        else _known(objective.name).needs
    )
    return replace(own, reference=own.reference or objective.kl.coef > 0.0)


def advantage_of(objective: Objective) -> str:
    """What ``objective.advantage`` comes to: the objective's own where it is ``auto``."""
    if objective.advantage != "auto":
        return objective.advantage
    if ":" in objective.name:
        return "gae" if needs_of(objective).values else "group"
    return _known(objective.name).advantage


def refuse_objective(objective: Objective) -> None:
    """What can be wrong with an objective before a start; without importing torch for Lockstep's own.

    Raises:
        RecipeError: as :func:`loss_of`.
    """
    if ":" in objective.name:
        loss_of(objective)
    else:
        known = _known(objective.name)
        _arguments(objective, known)
        if known.needs.pairs:
            _refuse_unread(objective)
    estimator = advantage_of(objective)
    values = needs_of(objective).values
    if values != (estimator == "gae"):
        raise RecipeError(
            "recipe, key objective.advantage",
            got=f"{estimator!r} with {objective.name!r}, which has {'a' if values else 'no'} value head",
            expected="gae, which is made of a value head's estimates" if values else "any but gae",
            hint="--set objective.advantage=auto",
        )


def _refuse_unread(objective: Objective) -> None:
    """Keys that a loss of pairs does not read: pairs are made of raw rewards, and every pair counts alike.

    What one of the user's does with its pairs is its own affair.
    """
    beside_pairs = objective.entropy_coef > 0.0 or (objective.kl.coef > 0.0 and objective.kl.place == "loss")
    unread = ["correction", "kl.place", "advantage", "advantage_scale"]
    if not beside_pairs:  # which are means over tokens
        unread.append("aggregation")
    for key in unread:
        got = attrgetter(key)(objective)
        default = attrgetter(key)(Objective())
        if got != default:
            raise RecipeError(
                f"recipe, key objective.{key}",
                got=f"{got!r} with {objective.name!r}",
                expected=f"{default!r}, or no such key: a loss of pairs does not read it",
                hint=f"--set objective.{key}={default}, or another objective.name",
            )


def _known(name: str) -> Known:
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.5)
        raise RecipeError(
            "recipe, key objective.name",
            got=repr(name),
            expected=f"{near[0]!r} perhaps"
            if near
            else f"{', '.join(sorted(OBJECTIVES))}, or module:function",
            hint=f"--set objective.name={near[0] if near else 'grpo'}",
        )
    return OBJECTIVES[name]


def _arguments(objective: Objective, known: Known) -> dict[str, Any]:
    """The keyword arguments of one of Lockstep's own: its shared keys and its options."""
    names = known.options.__struct_fields__
    for key in objective.options:
        if key not in names:
            near = difflib.get_close_matches(key, [*names, *known.keys], n=1, cutoff=0.5)
            home = "objective" if near and near[0] in known.keys else "objective.options"
            shared = f"; {', '.join(f'objective.{key}' for key in known.keys)}" if known.keys else ""
            raise RecipeError(
                f"recipe, key objective.options.{key}",
                got=f"an option that {objective.name} does not have",
                expected=f"'{home}.{near[0]}' perhaps" if near else f"{', '.join(names) or 'none'}{shared}",
                hint="docs/reference/objectives.md has each objective's options",
            )
    try:
        options = msgspec.convert(objective.options, known.options)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        key = where.rstrip("`")
        raise RecipeError(
            f"recipe, key objective.options.{key}",
            got=repr(objective.options.get(key)),
            expected=message.removeprefix("Expected "),
            hint=f"--set objective.options.{key}=…",
        ) from error
    return {key: getattr(objective, key) for key in known.keys} | msgspec.structs.asdict(options)


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
        outputs = function(inputs, **options)
    except Stopped:
        raise
    except Exception as error:
        raise RecipeError(
            f"objective {name}",
            got=f"{type(error).__name__}: {error}",
            expected="a loss",
            hint="mend it, then: lockstep train --resume RUN",
        ) from error
    said = type(outputs).__name__
    if isinstance(outputs, LossOutputs):
        # Layer 5 asks for a loss without gradients too.
        if (
            outputs.loss.ndim == 0
            and outputs.loss.requires_grad == inputs.logprobs.requires_grad
            and (outputs.clipped.shape == inputs.logprobs.shape)
        ):
            return outputs
        said = f"a loss of shape {list(outputs.loss.shape)}, clipped of shape {list(outputs.clipped.shape)}"
    raise RecipeError(
        f"objective {name}",
        got=said,
        expected=(
            f"LossOutputs: a differentiable loss of shape [], clipped of shape {list(inputs.logprobs.shape)}"
        ),
        hint="see docs/guides/your-own-objective.md",
    )
