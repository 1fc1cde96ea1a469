"""``lockstep check``: the ladder alone."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.cli.console import Console, emit
from lockstep.errors import UsageError


def check(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML recipe.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key of the recipe.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, transformers or auto, in place of the recipe's.")] = None,
    plant: Annotated[
        list[str] | None, typer.Option(metavar="FAULT", help="Break the backend on purpose (stale_head, …).")
    ] = None,
    rollouts: Annotated[
        Path | None, typer.Option(help="Logged rollouts of any framework (.parquet, .jsonl) in place of an engine.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that logged rollouts were drawn from, where no recipe names it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the certificate and the verdicts.")] = None,
    audit_only: Annotated[bool, typer.Option("--audit-only", help="Only the engine's settings, as engines audit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Prove that engine and trainer are the same policy, or name what is not.

    Exit code: 0 PASS, 1 FAIL, 2 usage or configuration, 3 could not run.
    """
    import tempfile

    if rollouts is not None:
        from lockstep.cli.logged import check_logged

        raise typer.Exit(check_logged(rollouts, recipe, model, set_, as_json=as_json))
    if recipe is None:
        raise UsageError(
            "check", got="no recipe", expected="RECIPE, or --rollouts FILE --model PATH", hint="lockstep check --help"
        )
    if audit_only:
        from lockstep.cli.audit import run_audit

        raise typer.Exit(run_audit(recipe, None, "0.8.5", set_, engine, as_json=as_json))
    from lockstep.cli.common import recipe_of, show_ladder
    from lockstep.parity.faults import planted

    loaded, faults = recipe_of(recipe, set_, engine), planted(plant or [])
    from lockstep.loop.session import open_session
    from lockstep.parity.certificate import issue
    from lockstep.parity.ladder import climb
    from lockstep.runs.write import append_verdict

    with Console() as console, tempfile.TemporaryDirectory(prefix="lockstep-check-") as scratch:
        directory = out or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        with open_session(loaded, directory / "engine.log", console.say, faults) as session:
            result = climb(session.pair, lambda layer: console.say(f"ladder: {layer}"))
            for verdict in result.verdicts:
                append_verdict(directory / "verdicts.jsonl", verdict, "check")
            if result.passed:
                issue(session.pair, result.verdicts, directory / "certificate.json")
    if as_json:
        emit("check", {"verdict": result.status, "layers": result.verdicts})
    else:
        show_ladder(result.verdicts)
        if out is not None and result.passed:
            print(f"certificate: {out / 'certificate.json'}")
    raise typer.Exit({"PASS": 0, "FAIL": 1, "NOT_RUN": 3}[result.status])
