"""``lockstep train``: prove, then train."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.cli.console import Console, emit, show
from lockstep.cli.flags import EngineName, KeyEnv, Plant, Sets, SignKey
from lockstep.config.recipe import Recipe
from lockstep.errors import UsageError


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A TOML recipe; with --resume the run's own is used.")
    ] = None,
    set_: Sets = None,
    engine: EngineName = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory; runs/<date>-<random> if not given.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was interrupted.")
    ] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Resume the newest run of this recipe if it was interrupted.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would run: prompts, memory, files. Nothing is started."),
    ] = False,
    plant: Plant = None,
    sign_key: SignKey = None,
    api_key_env: KeyEnv = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout at the end.")] = False,
) -> None:
    """Run the ladder, then online RL; every weight sync is proven.

    Stops with exit code 1 when a proof fails.
    """
    if resume is not None and (set_ or engine):
        got = "--resume with a recipe or its flags"
        hint = f"lockstep train --resume {resume}"
        raise UsageError("lockstep train", got=got, expected="--resume RUN alone", hint=hint)
    from lockstep import api
    from lockstep.cli.common import recipe_of
    from lockstep.summary import summary_table

    loaded = recipe_of(recipe, set_, engine) if recipe is not None else None
    if dry_run:
        _look(loaded, out, api_key_env, as_json=as_json)
        return
    with Console() as console:
        summary = api.train(
            loaded,
            out=out,
            resume=resume,
            resume_unfinished=go_on,
            plant=tuple(plant or ()),
            sign_key=sign_key,
            api_key_env=api_key_env,
            say=console.say,
            live=console.live,
        )
    if as_json:
        emit("train", summary)
    else:
        print(summary_table(summary))


def _look(recipe: Recipe | None, out: Path | None, api_key_env: str, *, as_json: bool) -> None:
    """What a run would be."""
    if recipe is None:
        got = "--dry-run without a recipe"
        hint = "lockstep train recipes/quickstart.toml --dry-run"
        raise UsageError("lockstep train", got=got, expected="a recipe", hint=hint)
    from lockstep.loop.dry_run import dry_run, told

    found = dry_run(recipe, out, api_key_env)
    if as_json:
        emit("dry_run", found)
    else:
        show(told(found, recipe))
