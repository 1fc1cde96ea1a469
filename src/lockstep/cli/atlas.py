"""``lockstep atlas``: one battery on many engine versions."""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cli.console import Console, emit, show
from lockstep.cli.flags import Json, Sets

if TYPE_CHECKING:
    from lockstep.diagnose.atlas import Column


def atlas(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe; its engine's version is replaced.")],
    versions: Annotated[str, typer.Option(help="Comma-separated: 0.8.5.post2,0.18.1,0.32.0.")],
    out: Annotated[Path, typer.Option(help="A file a version; one that is there is not run again.")] = Path(
        "atlas"
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the environments that are made for it.")] = False,
    set_: Sets = None,
    as_json: Json = False,
) -> None:
    """Ask each engine version the same questions: what are its numbers of, what does an update leave out?

    A version that is not installed is installed for it, and removed again. Killed, it goes on with the first
    version that has no file.

    Exit code: 0 when each ran to its end; 3 when one could not.
    """
    from lockstep.cli.common import recipe_of
    from lockstep.diagnose.atlas import atlas as go

    loaded = recipe_of(recipe, set_, None)
    asked = [version.strip() for version in versions.split(",") if version.strip()]
    with Console() as console:
        columns = list(go(loaded, asked, out, console.say, keep=keep))
    if as_json:
        emit("atlas", {"columns": columns})
    else:
        for column in columns:
            _show(column)
    raise typer.Exit(3 if any(column.stopped for column in columns) else 0)


def _show(column: "Column") -> None:
    show(f"\n{column.version}  {column.engine}  {column.packages}")
    if column.stopped:
        show(f"  stopped: {column.stopped}")
    for cell in column.cells:
        effect = f", {cell.effect_nats:+.1e} nats ({cell.unit})" if isfinite(cell.effect_nats) else ""
        show(f"  {cell.question:<18} {cell.status:<8} {cell.says}{effect}")
    if isfinite(column.tokens_per_s):
        show(f"  {column.tokens_per_s:.0f} tokens/s on the probes, one weight update {column.load_s:.2f} s")
