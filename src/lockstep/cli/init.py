"""``lockstep init``: the quick start's recipe, out of the package."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.cli.console import emit
from lockstep.cli.flags import Json
from lockstep.errors import UsageError

RECIPE = Path("recipes") / "quickstart.toml"
"""Under the directory that is asked for: where every command of the documentation looks for it."""


def init(
    directory: Annotated[Path, typer.Argument(help="Where; here if not given.")] = Path(),
    as_json: Json = False,
) -> None:
    """Write recipes/quickstart.toml, commented, and say what to do with it. Nothing is overwritten."""
    from importlib import resources

    path = directory / RECIPE
    content = resources.files("lockstep").joinpath("recipes", RECIPE.name).read_bytes()
    where = f"lockstep init, {path}"
    hint = "lockstep init DIR"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Looked for and made in one step: what comes to be there in between is not overwritten either.
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError as error:
        raise UsageError(
            where, got="a file that is there", expected="none: nothing is overwritten", hint=hint
        ) from error
    except OSError as error:
        raise UsageError(
            where, got=error.strerror or str(error), expected="a directory to write in", hint=hint
        ) from error
    next_commands = _next_commands(path)
    if as_json:
        emit("init", {"path": str(path), "next": next_commands})
        return
    print(f"wrote {path}\n\nnext:")
    for command in next_commands:
        print(f"  {command}")


def _next_commands(path: Path) -> list[str]:
    from lockstep.config.recipe import load_recipe
    from lockstep.engines.environments.locate import installed

    recipe = load_recipe(path)
    there = any(
        (found.name, found.version) == (recipe.engine.name, recipe.engine.version) for found in installed()
    )
    install = [] if there else [f"lockstep engines install {recipe.engine.name}=={recipe.engine.version}"]
    return [
        *install,
        f"lockstep models install {recipe.model.path}",
        f"lockstep check {path}",
        f"lockstep train {path}",
    ]
