"""``lockstep certificate``: whether a proof still holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cli.console import Console, emit
from lockstep.cli.flags import EXIT_CODES, EngineName, EngineUrl, Json, KeyEnv, Sets, TrainerModel, VerifyKey

if TYPE_CHECKING:
    from lockstep.api import Verification

app = typer.Typer(help="Certificates: whether a proof still holds.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Certificates: whether a proof still holds."""


@app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="A certificate.json.")],
    recipe: Annotated[Path | None, typer.Argument(help="The recipe whose pair it is compared with.")] = None,
    verify_key: VerifyKey = None,
    set_: Sets = None,
    engine: EngineName = None,
    engine_url: EngineUrl = None,
    api_key_env: KeyEnv = "",
    model: TrainerModel = None,
    as_json: Json = False,
) -> None:
    """Read a certificate, and compare it with the recipe's pair as it is now.

    Without a recipe no engine is started.

    Exit code: 0 it holds, 1 it is void or something changed, 2 usage or configuration, 3 it is no whole
    certificate, or it is one and there was no pair to compare it with.
    """
    from lockstep import api
    from lockstep.cli.sides import recipe_of_sides

    alone = recipe is None and engine_url is None and model is None
    loaded = (
        None if alone else recipe_of_sides(recipe, model, engine_url, set_, engine, verb="certificate verify")
    )
    with Console() as console:
        verified = api.verify(file, loaded, verify_key=verify_key, api_key_env=api_key_env, say=console.say)
    if as_json:
        about = {"verdict": verified.status, "reason": _reason(verified), "signature": verified.signature}
        issued = {"issued": verified.certificate.issued, "depth": verified.certificate.depth}
        emit("certificate.verify", about | issued | {"changes": verified.changes or ()})
    else:
        print("\n".join(shown(verified)))
    raise typer.Exit(EXIT_CODES[verified.status])


def shown(verified: "Verification") -> list[str]:
    """What people are told, a line each."""
    by = ", by the key of --verify-key" if verified.signature == "verified" else ""
    if verified.changes is None:
        return [f"whole and not void, as issued {verified.certificate.issued}{by}", _reason(verified)]
    return [f"void: {change}" for change in verified.changes] or [
        f"holds, as issued {verified.certificate.issued}{by}"
    ]


def _reason(verified: "Verification") -> str:
    """Why it is NOT_RUN; empty otherwise."""
    if verified.changes is not None:
        return ""
    return (
        "not compared with any pair: that takes its RECIPE, or --engine-url URL --model PATH; "
        "hence exit code 3"
    )
