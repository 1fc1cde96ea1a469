"""``lockstep train``: prove, then train."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cli.console import Console, emit
from lockstep.cli.flags import KeyEnv, Plant, SignKey
from lockstep.errors import LockstepError, UsageError

if TYPE_CHECKING:
    from lockstep.config.recipe import Recipe
    from lockstep.runs.layout import RunLayout


def train(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML recipe; with --resume the run's own is used.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key of the recipe.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, transformers or auto, in place of the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; runs/<date>-<random> if not given.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with a run that was interrupted.")] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Resume the newest run of this recipe if it was interrupted.")
    ] = False,
    plant: Plant = None,
    sign_key: SignKey = None,
    api_key_env: KeyEnv = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout at the end.")] = False,
) -> None:
    """Run the ladder, then online RL; every weight sync is proven. Stops with exit code 1 when a proof fails."""
    from lockstep.cli.common import planted
    from lockstep.runs.layout import new_run
    from lockstep.runs.manifest import finished
    from lockstep.runs.signature import read_key

    loaded, layout = _run_of(recipe, set_, engine, out, resume, go_on=go_on)
    faults, key = planted(plant), read_key(sign_key, "--sign-key") if sign_key else b""
    from lockstep.loop.open import preflight

    preflight(loaded, api_key_env)
    resumed = layout is not None
    layout = layout or new_run(out)
    with Console() as console, layout.held():
        console.say(f"run directory {layout.root}{', which goes on' if resumed else ''}")
        if resumed and finished(layout, loaded):
            _tidy(layout)
            console.say("its last step is trained and saved: nothing is left to do")
        else:
            _train(loaded, layout, console.say, _Extras(faults, key, api_key_env), resumed=resumed)
    from lockstep.report import summarise, summary_table
    from lockstep.runs.read import open_run

    summary = summarise(open_run(layout.root))
    if as_json:
        emit("train", summary)
    else:
        print(summary_table(summary))


def _tidy(layout: "RunLayout") -> None:
    """What a kill after the last checkpoint left: older ones, and the parts of one that was being removed."""
    from lockstep.runs.layout import forget_partials

    forget_partials(layout)
    if len(list(layout.checkpoints.iterdir())) > 1:
        from lockstep.training.checkpoint import keep_newest

        keep_newest(layout.checkpoints)


def _run_of(
    recipe: Path | None, set_: list[str] | None, engine: str | None, out: Path | None, resume: Path | None, *, go_on: bool
) -> "tuple[Recipe, RunLayout | None]":
    """The recipe, and the run that goes on with it, if one does.

    Raises:
        UsageError: for flags that contradict each other, and as the recipe's own errors.
    """
    from lockstep.cli.common import recipe_of
    from lockstep.runs.layout import existing_run
    from lockstep.runs.manifest import read_recipe, unfinished_run

    if resume is not None:
        if recipe is not None or set_ or engine or out or go_on:
            raise UsageError(
                "lockstep train",
                got="--resume with a recipe or its flags",
                expected="--resume RUN alone",
                hint=f"lockstep train --resume {resume}",
            )
        layout = existing_run(resume)
        return read_recipe(layout.manifest), layout
    if recipe is None:
        raise UsageError(
            "lockstep train",
            got="no recipe",
            expected="one, or --resume RUN",
            hint="lockstep train recipes/quickstart.toml",
        )
    loaded = recipe_of(recipe, set_, engine)
    layout = unfinished_run(loaded, Path("runs")) if go_on and out is None else None
    return (read_recipe(layout.manifest), layout) if layout else (loaded, None)


@dataclass(frozen=True)
class _Extras:
    """What the command line alone can say."""

    faults: tuple[str, ...]
    sign_key: bytes
    api_key_env: str


def _train(recipe: "Recipe", layout: "RunLayout", say: Callable[[str], None], extras: _Extras, *, resumed: bool) -> None:
    from lockstep.cli.common import plants
    from lockstep.loop.open import open_session
    from lockstep.runs.manifest import refuse_other_run, write_manifest

    with open_session(recipe, layout.engine_log, say, plants(extras.faults), extras.api_key_env) as session:
        from lockstep.loop.stages import Run
        from lockstep.loop.sync import run_steps
        from lockstep.runs.record import open_recorder

        if resumed:
            refuse_other_run(layout.manifest, session.manifest)
        else:
            write_manifest(layout.manifest, session.manifest)
        try:
            run_steps(Run(session, layout, say, open_recorder(layout), sign_key=extras.sign_key), resumed=resumed)
        except LockstepError as error:
            error.add_note(f"what was sampled and trained is kept; go on with: lockstep train --resume {layout.root}")
            raise
