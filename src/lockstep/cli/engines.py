"""``lockstep engines``: engine environments."""

from typing import Annotated

import typer

from lockstep.cli.console import Console, emit

app = typer.Typer(help="Engine environments: each engine version in a Python environment of its own.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command("install")
def install(spec: Annotated[str, typer.Argument(help="vllm==0.32.0, or vllm for the newest.")], as_json: Json = False) -> None:
    """Build an engine's environment, or go on building it."""
    from lockstep.engines.environments.install import install as build

    environment = build(spec, Console().say)
    if as_json:
        emit("engines.install", {"engine": environment})


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Show what is installed and what could be."""
    from lockstep.engines.environments.install import installed
    from lockstep.engines.environments.recipes import all_recipes

    found = {f"{e.name}=={e.version}": e for e in installed()}
    if as_json:
        emit("engines.list", {"installed": list(found.values()), "available": [recipe.spec for recipe in all_recipes()]})
        return
    for recipe in all_recipes():
        environment = found.get(recipe.spec)
        if environment is None:
            print(f"{recipe.spec:<16} {recipe.generation:<4} {recipe.flavour:<5} not installed   lockstep engines install {recipe.spec}")
        else:
            size = environment.size_bytes / 1e9
            print(f"{recipe.spec:<16} {recipe.generation:<4} {recipe.flavour:<5} installed {size:.1f} GB, smoke test: {environment.smoke}")
    print(f"{'transformers':<16} beside the trainer, always there")
