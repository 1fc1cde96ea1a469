"""``lockstep engines``: engine environments."""

from typing import Annotated

import typer

from lockstep.cli.console import Console, emit

app = typer.Typer(help="Engine environments: each engine version in a Python environment of its own.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Spec = Annotated[str, typer.Argument(help="vllm==0.32.0, or vllm for the newest.")]


@app.command("install")
def install(spec: Spec, as_json: Json = False) -> None:
    """Build an engine's environment, or go on building it."""
    from lockstep.engines.environments.install import install as build

    with Console() as console:
        environment = build(spec, console.say)
    if as_json:
        emit("engines.install", {"engine": environment})


@app.command("remove")
def remove(spec: Spec, as_json: Json = False) -> None:
    """Delete an engine's environment."""
    from lockstep.engines.environments.install import remove as delete

    delete(spec, Console().say)
    if as_json:
        emit("engines.remove", {"removed": spec})


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Show what is installed, what was begun and what could be."""
    from lockstep.engines.environments.locate import installed, state
    from lockstep.engines.environments.recipes import all_recipes

    found = {f"{e.name}=={e.version}": e for e in installed()}
    recipes = all_recipes()
    if as_json:
        available = [{"spec": r.spec, "generation": r.generation, "flavour": r.flavour, "state": state(r)} for r in recipes]
        emit("engines.list", {"installed": list(found.values()), "available": available})
        return
    for recipe in recipes:
        environment = found.get(recipe.spec)
        what = f"{recipe.spec:<16} {recipe.generation:<4} {recipe.flavour:<5} {state(recipe):<14}"
        if environment is None:
            print(f"{what} lockstep engines install {recipe.spec}")
        else:
            print(f"{what} {environment.size_bytes / 1e9:.1f} GB, smoke test: {environment.smoke}, {environment.path}")
    print(f"{'transformers':<16} beside the trainer, always there")
