"""``lockstep engines``: engine environments."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.cli.console import Console, emit
from lockstep.cli.flags import Json, KeyEnv, Sets

app = typer.Typer(
    help="Engine environments: each engine version in a Python environment of its own.", no_args_is_help=True
)
Spec = Annotated[str, typer.Argument(help="vllm==0.32.0, or vllm for the newest.")]


@app.command("install")
def install(
    spec: Spec,
    check: Annotated[
        bool, typer.Option("--check", help="Build nothing; only say whether this machine can run it.")
    ] = False,
    lock: Annotated[
        Path | None,
        typer.Option(help="The closure of a version that comes without one, in place of one resolved here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build an engine's environment, or go on building it.

    Versions that come without a lock are resolved first, from wheels alone; the lock that comes of it is kept
    beside the environment, and `engines remove` removes both.

    Exit code: 0 when it is built; 2 usage; 3 when it could not be built. With --check: 0 when there is a
    build for this machine, 3 when there is none.
    """
    if check:
        from lockstep.engines.environments.recipes import recipe_for, refuse_machine

        recipe = recipe_for(spec)
        refuse_machine(recipe)
        if as_json:
            emit("engines.check", {"engine": recipe.spec})
        return
    from lockstep.engines.environments.install import install as build

    with Console() as console:
        environment = build(spec, console.say, lock)
    if as_json:
        emit("engines.install", {"engine": environment})


@app.command("remove")
def remove(spec: Spec, as_json: Json = False) -> None:
    """Delete an engine's environment."""
    from lockstep.engines.environments.install import remove as delete

    delete(spec, Console().say)
    if as_json:
        emit("engines.remove", {"removed": spec})


@app.command("describe")
def describe(spec: Spec, as_json: Json = False) -> None:
    """Show what is known of an engine version: its environment, its facts, what it can do."""
    from lockstep.engines.environments.locate import complete, path_of, state
    from lockstep.engines.environments.recipes import recipe_for

    recipe = recipe_for(spec)
    environment = complete(recipe)
    if as_json:
        emit("engines.describe", {"recipe": recipe, "state": state(recipe), "environment": environment})
        return
    python = " to ".join(".".join(map(str, version)) for version in (recipe.python_min, recipe.python_max))
    print(
        f"{recipe.spec}  {recipe.generation} engine, {recipe.flavour}, Python {python}, "
        f"{' or '.join(recipe.machines)}"
    )
    print(f"state     {state(recipe)}, {path_of(recipe)}")
    if environment is not None:
        print(
            f"size      {environment.size_bytes / 1e9:.1f} GB, built {environment.built}\n"
            f"smoke     {environment.smoke}"
        )
        _section("mends", environment.mends)
        _section("can", {name: c.how for name, c in environment.capabilities.items() if c.supported})
        _section("cannot", {name: c.how for name, c in environment.capabilities.items() if not c.supported})
    else:
        print(f"install   lockstep engines install {recipe.spec}")
    _section("needs", recipe.system_needs)
    _section("left out", recipe.left_out)
    _section("runs with", recipe.env)
    _section("facts", recipe.facts)


def _section(title: str, entries: dict[str, str]) -> None:
    if entries:
        print(title)
        for name, value in entries.items():
            print(f"  {name:<34} {value}")


@app.command("audit")
def audit(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML recipe; its engine is started.")] = None,
    url: Annotated[str | None, typer.Option(help="A running OpenAI-compatible server instead.")] = None,
    before: Annotated[str, typer.Option("--from", help="The vLLM version you come from.")] = "0.8.5",
    set_: Sets = None,
    engine: Annotated[
        str | None, typer.Option(help="vllm, transformers, openai or auto, in place of the recipe's.")
    ] = None,
    api_key_env: KeyEnv = "",
    as_json: Json = False,
) -> None:
    """Hold what an engine resolved to against what online RL needs: the migration checklist.

    Exit code: 0 when nothing has to change, 1 when something has, 3 when something could not be read.
    """
    from lockstep.cli.audit import run_audit

    raise typer.Exit(
        run_audit(recipe, url, before.removeprefix("vllm=="), set_, engine, api_key_env, as_json=as_json)
    )


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Show what is installed, what was begun and what could be."""
    from lockstep.engines.environments.locate import installed, state
    from lockstep.engines.environments.recipes import all_recipes

    environments = {f"{e.name}=={e.version}": e for e in installed()}
    recipes = all_recipes()
    if as_json:
        available = [
            {"spec": r.spec, "generation": r.generation, "flavour": r.flavour, "state": state(r)}
            for r in recipes
        ]
        emit("engines.list", {"installed": list(environments.values()), "available": available})
        return
    for recipe in recipes:
        environment = environments.get(recipe.spec)
        what = f"{recipe.spec:<16} {recipe.generation:<4} {recipe.flavour:<5} {state(recipe):<14}"
        if environment is None:
            print(f"{what} lockstep engines install {recipe.spec}")
        else:
            print(
                f"{what} {environment.size_bytes / 1e9:.1f} GB, smoke test: "
                f"{environment.smoke}, {environment.path}"
            )
    print(f"{'transformers':<16} beside the trainer, always there")
