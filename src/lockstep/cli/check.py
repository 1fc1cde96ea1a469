"""``lockstep check``: the ladder alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cli import moved
from lockstep.cli.check_log import refuse_power
from lockstep.cli.console import Console, emit
from lockstep.cli.flags import (
    EXIT_CODES,
    EngineName,
    EngineUrl,
    Json,
    KeyEnv,
    Plant,
    Power,
    SearchS,
    Sets,
    SignKey,
    TrainerModel,
)
from lockstep.errors import UsageError

if TYPE_CHECKING:
    from lockstep.parity.ladder import LadderResult


def check(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML recipe.")] = None,
    set_: Sets = None,
    engine: EngineName = None,
    depth: Annotated[
        str,
        typer.Option(
            help="quick: fewer probes. full: also updates in flight, engines started for one factor each, "
            "and every direction that the gap may hide."
        ),
    ] = "standard",
    plant: Plant = None,
    engine_url: EngineUrl = None,
    api_key_env: KeyEnv = "",
    model: TrainerModel = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the certificate and the verdicts.")] = None,
    sign_key: SignKey = None,
    power: Power = None,
    search_s: SearchS = None,
    as_json: Json = False,
    # Commands of their own by now; see ``moved.py``.
    rollouts: Annotated[Path | None, typer.Option(hidden=True)] = None,
    rows: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
    certificate: Annotated[Path | None, typer.Option(hidden=True)] = None,
    verify_key: Annotated[Path | None, typer.Option(hidden=True)] = None,
    audit_only: Annotated[bool, typer.Option("--audit-only", hidden=True)] = False,
) -> None:
    """Prove that engine and trainer are the same policy, or name what is not.

    Exit code: 0 PASS, 1 FAIL, 2 usage or configuration, 3 could not run.
    """
    from lockstep.cli.common import with_parity

    sets = with_parity(set_, search_s=search_s, directions_see=power)
    if rollouts or certificate or audit_only or verify_key or rows:
        old = moved.OldFlags(rollouts, rows, certificate, verify_key, audit_only=audit_only)
        pair = moved.PairFlags(recipe, model, engine_url, sets, engine, api_key_env, plant, sign_key, out)
        raise typer.Exit(moved.run(old, pair, as_json=as_json))
    refuse_power("check", power, depth)
    if sign_key is not None and out is None:
        expected = "--sign-key with --out DIR"
        hint = "leave --sign-key out"
        raise UsageError("check", got="--sign-key alone", expected=expected, hint=hint)
    from lockstep import api
    from lockstep.cli.sides import recipe_of_sides

    loaded = recipe_of_sides(recipe, model, engine_url, sets, engine)
    faults = tuple(plant or ())
    with Console() as console:
        result = api.check(
            loaded,
            out=out,
            depth=depth,
            plant=faults,
            sign_key=sign_key,
            api_key_env=api_key_env,
            say=console.say,
        )
    show_result(result, depth, faults, out, as_json=as_json)
    raise typer.Exit(EXIT_CODES[result.status])


def show_result(
    result: "LadderResult", depth: str, faults: tuple[str, ...], out: Path | None, *, as_json: bool
) -> None:
    """The verdicts, and what is to be said of them as a whole."""
    from lockstep.cli.common import layers_document, show_ladder

    if as_json:
        layers = layers_document(result.verdicts)
        emit(
            "check",
            {
                "verdict": result.status,
                "depth": depth,
                "planted": faults,
                "note": _note(result),
                "layers": layers,
            },
        )
        return
    show_ladder(result.verdicts)
    if note := _note(result):
        print(note)
    if faults:
        print(f"planted    {', '.join(faults)}: this certifies nothing")
    elif out is not None and result.passed:
        print(f"certificate: {out / 'certificate.json'}")


def _note(result: "LadderResult") -> str:
    """Said where all that could be judged passed, and something could not be.

    The last layer runs in no other case.
    """
    if result.status != "NOT_RUN" or result.verdicts[-1].status != "PASS":
        return ""
    left = [verdict.layer for verdict in result.verdicts if verdict.status == "NOT_RUN"]
    what = (
        f"{' and '.join(left)} need{'s' if len(left) == 1 else ''} "
        "an engine that Lockstep starts (--engine vllm)"
    )
    return f"nothing failed; {what}, hence exit code 3 and no certificate"
