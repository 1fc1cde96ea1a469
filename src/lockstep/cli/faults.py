"""``lockstep faults``: plant faults in a real engine and a real trainer, and show what the ladder named."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lockstep.cli.console import Console, emit
from lockstep.cli.flags import EngineName, Json, Sets
from lockstep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lockstep.config.recipe import Recipe
    from lockstep.faults.campaign import Outcome
    from lockstep.faults.fault import Fault

DEFAULT = Path("recipes/quickstart.toml")


def faults(
    recipe: Annotated[
        Path, typer.Argument(help="A TOML recipe whose model and engine they are planted in.")
    ] = DEFAULT,
    set_: Sets = None,
    engine: EngineName = None,
    only: Annotated[list[str] | None, typer.Option(metavar="FAULT", help="Just these.")] = None,
    clean: Annotated[bool, typer.Option(help="Climb eight clean configurations too: none may fail.")] = True,
    list_: Annotated[bool, typer.Option("--list", help="Only say what there is to plant.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where outcomes are kept; started again, it goes on there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plant each fault, climb the ladder, and print the confusion matrix.

    Exit code: 0 when every fault was named and no clean check failed, 1 otherwise, 2 usage or configuration,
    3 when none could be planted.
    """
    from lockstep.cli.common import recipe_of
    from lockstep.faults.catalogue import FAULTS

    chosen = [FAULTS[name] for name in only or FAULTS if name in FAULTS]
    if len(chosen) != len(only or FAULTS):
        unknown = next(name for name in only or () if name not in FAULTS)
        raise UsageError(
            "flag --only",
            got=repr(unknown),
            expected=f"one of {', '.join(FAULTS)}",
            hint="lockstep faults --list",
        )
    if list_:
        _list(chosen, as_json=as_json)
        return
    loaded = recipe_of(recipe, set_, engine)
    outcomes = _campaign(loaded, chosen, out, clean=clean)
    missed = [outcome for outcome in outcomes if not outcome.hit and not outcome.not_run]
    matrix = confusion(outcomes)
    if as_json:
        emit(
            "faults",
            {
                "hits": sum(o.hit for o in outcomes),
                "missed": len(missed),
                "outcomes": _rows(outcomes),
                "matrix": matrix,
            },
        )
    else:
        print(show_matrix(matrix))
        for outcome in missed:
            print(_line(outcome))
    raise typer.Exit(1 if missed else 0 if any(outcome.hit for outcome in outcomes) else 3)


def _list(chosen: "Sequence[Fault]", *, as_json: bool) -> None:
    if as_json:
        columns = ("name", "layer", "cause", "how", "generations")
        emit(
            "faults.list", {"faults": [{name: getattr(fault, name) for name in columns} for fault in chosen]}
        )
        return
    for fault in chosen:
        print(f"{fault.layer:<10} {fault.name:<36} {fault.how}")


def _campaign(
    recipe: "Recipe", chosen: "Sequence[Fault]", out: Path | None, *, clean: bool
) -> "list[Outcome]":
    """The outcomes, told as they come; those that ``out`` holds are not measured again."""
    import itertools
    import tempfile

    from lockstep.engines.registry import choose
    from lockstep.faults.campaign import clean_configurations, generation_of, run_campaign
    from lockstep.faults.journal import Journal
    from lockstep.runs.durable import make_directory
    from lockstep.runs.layout import refuse_no_directory

    names = [fault.name for fault in chosen]
    names += [name for name, _ in clean_configurations(generation_of(choose(recipe.engine)))] if clean else []
    with Console() as console, tempfile.TemporaryDirectory(prefix="lockstep-faults-") as scratch:
        directory = out or Path(scratch)
        refuse_no_directory(directory)
        make_directory(directory)
        journal = Journal(directory / "outcomes.jsonl", recipe)
        # It may hold others too: of another --only.
        done = [outcome for outcome in journal.outcomes() if outcome.name in names]
        if done:
            console.say(f"{len(done)} of {len(names)} are in {journal.path} already")
        count = itertools.count(len(done) + 1)

        def tell(outcome: "Outcome") -> None:
            journal.add(outcome)
            console.say(f"{next(count)}/{len(names)} {_line(outcome)}")

        log = directory / "engine.log"
        return run_campaign(recipe, chosen, log, console.say, clean=clean, on_outcome=tell, done=done)


def confusion(outcomes: "list[Outcome]") -> dict[str, dict[str, int]]:
    """Planted layer → found layer → how many; a right layer with a wrong cause counts as ``other cause``."""
    matrix: dict[str, dict[str, int]] = {}
    for o in outcomes:
        if o.not_run:
            column = "not run"
        elif not o.found_layer:
            column = "none" if o.statuses and set(o.statuses) == {"PASS"} else "not judged"
        else:
            column = o.found_layer if o.hit or o.found_layer != o.planted_layer else "other cause"
        row = matrix.setdefault(o.planted_layer or "none", {})
        row[column] = row.get(column, 0) + 1
    return matrix


def show_matrix(matrix: dict[str, dict[str, int]]) -> str:
    """Rows: what was planted. Columns: what was named."""
    from lockstep.records.verdicts import LAYERS

    columns = [*LAYERS, "none", "other cause", "not judged", "not run"]
    lines = ["planted \\ named".ljust(16) + "".join(name.rjust(13) for name in columns)]
    planted = [name for name in [*LAYERS, "none"] if name in matrix]
    rows = [
        name.ljust(16) + "".join(str(matrix[name].get(c, "·")).rjust(13) for c in columns) for name in planted
    ]
    return "\n".join([*lines, *rows])


def _rows(outcomes: "list[Outcome]") -> list[dict[str, Any]]:
    import msgspec

    return [msgspec.to_builtins(outcome) | {"hit": outcome.hit} for outcome in outcomes]


def _line(outcome: "Outcome") -> str:
    if outcome.not_run:
        return f"{outcome.name}: NOT_RUN, {outcome.not_run}"
    named = (
        f"{outcome.found_layer}, {outcome.found_cause.replace('_', ' ')}"
        if outcome.found_layer
        else "nothing"
    )
    return (
        f"{outcome.name}: named {named} ({'as planted' if outcome.hit else 'MISS'}, {outcome.seconds:.0f} s)"
    )
