"""``lockstep check-log FILE --model PATH``: what can be proven of rollouts that another framework logged."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cli.console import Console, emit
from lockstep.cli.flags import EXIT_CODES, Json, Power, SearchS, Sets, TrainerModel
from lockstep.errors import UsageError

if TYPE_CHECKING:
    from lockstep.config.recipe import Recipe

NEUTRAL = {
    "model": {"path": ""},
    "task": {"name": "logged"},
    "sampling": {"max_tokens": 1},
    "training": {"steps": 1},
}
"""What a recipe must have, where none is given; the model's path is ``--model``'s."""


def check_log(
    file: Annotated[Path, typer.Argument(help="Logged rollouts of any framework: .parquet or .jsonl.")],
    recipe: Annotated[
        Path | None, typer.Argument(help="A TOML recipe that names the model and the sampling.")
    ] = None,
    model: TrainerModel = None,
    set_: Sets = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Measure the gap on so many completions, spread over the file.")
    ] = None,
    depth: Annotated[
        str, typer.Option(help="full: also every direction that the gap may hide within its width.")
    ] = "standard",
    power: Power = None,
    search_s: SearchS = None,
    as_json: Json = False,
) -> None:
    """Judge what any framework logged, without an engine: semantics and numerics; other layers are NOT_RUN.

    Exit code: 1 FAIL, 2 usage or configuration, 3 when nothing failed, for three layers need an engine.
    """
    from lockstep.cli.common import with_parity

    refuse_power("check-log", power, depth)
    sets = with_parity(set_, search_s=search_s, directions_see=power)
    raise typer.Exit(judge_log(file, recipe, model, sets, rows, depth, as_json=as_json))


def refuse_power(verb: str, power: float | None, depth: str) -> None:
    """Refuse ``--power`` where no direction is tested.

    Raises:
        UsageError: there.
    """
    if power is not None and depth != "full":
        raise UsageError(verb, got=f"--power at depth {depth}", expected="--depth full", hint="--depth full")


def judge_log(
    file: Path,
    recipe: Path | None,
    model: str | None,
    overrides: list[str] | None,
    rows: int | None,
    depth: str = "standard",
    *,
    as_json: bool,
    document: str = "check-log",
) -> int:
    """Judge and show. Returns the exit code.

    Args:
        document: the verb in the JSON document's schema.
    """
    from lockstep import api
    from lockstep.cli.common import layers_document, show_ladder

    loaded = _recipe(recipe, model, overrides)
    with Console() as console:
        verdicts = api.check_log(file, loaded, rows=rows, depth=depth, say=console.say)
    status = "FAIL" if any(verdict.status == "FAIL" for verdict in verdicts) else "NOT_RUN"
    if as_json:
        emit(document, {"verdict": status, "layers": layers_document(verdicts)})
    else:
        show_ladder(verdicts)
    return EXIT_CODES[status]


def _recipe(recipe: Path | None, model: str | None, overrides: list[str] | None) -> "Recipe":
    from lockstep.cli.common import recipe_of
    from lockstep.config.recipe import parse_overrides

    sets = [*([f"model.path={model}"] if model is not None else []), *(overrides or [])]
    if recipe is not None:
        return recipe_of(recipe, sets, None)
    if model is None:
        expected = "--model PATH, or a recipe that names one"
        hint = "--model PATH"
        raise UsageError("check-log", got="no model", expected=expected, hint=hint)
    return parse_overrides(NEUTRAL, sets, "check-log")
