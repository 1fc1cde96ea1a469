"""``lockstep check``: the ladder alone."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cli.console import Console, emit
from lockstep.cli.flags import KeyEnv, Plant, SignKey
from lockstep.errors import UsageError

if TYPE_CHECKING:
    from lockstep.config.recipe import Recipe
    from lockstep.loop.open import Say, Session
    from lockstep.parity.ladder import LadderResult

DEPTHS = ("quick", "standard", "full")
QUICK = ("parity.probe_prompts=8", "parity.probe_tokens=16", "parity.draw_tokens=768")


def check(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML recipe.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key of the recipe.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, transformers or auto, in place of the recipe's.")] = None,
    depth: Annotated[
        str, typer.Option(help="quick: fewer probes. full: also updates in flight, and engines started for one factor each.")
    ] = "standard",
    plant: Plant = None,
    engine_url: Annotated[str | None, typer.Option(help="A running OpenAI-compatible server in place of an engine.")] = None,
    api_key_env: KeyEnv = "",
    rollouts: Annotated[
        Path | None, typer.Option(help="Logged rollouts of any framework (.parquet, .jsonl) in place of an engine.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Of --rollouts: measure the gap on so many completions, spread over the file.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The trainer's model, in place of a recipe or of the recipe's.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Only say whether this certificate still holds for the recipe's pair.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the certificate and the verdicts.")] = None,
    sign_key: SignKey = None,
    verify_key: Annotated[Path | None, typer.Option(help="The certificate must be signed with this key.")] = None,
    search_s: Annotated[float | None, typer.Option(help="Seconds to look for a cause; the recipe's parity.search_s.")] = None,
    audit_only: Annotated[bool, typer.Option("--audit-only", help="Only the engine's settings, as engines audit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Prove that engine and trainer are the same policy, or name what is not.

    Exit code: 0 PASS, 1 FAIL, 2 usage or configuration, 3 could not run.
    """
    if search_s is not None:
        set_ = [*(set_ or []), f"parity.search_s={search_s}"]
    _refuse_contradictions(recipe, engine, engine_url, depth, audit_only=audit_only)
    if plant and (rollouts or certificate):
        expected, hint = "a backend to break", "leave --plant out"
        raise UsageError("check", got="--plant where no ladder is run", expected=expected, hint=hint)
    key = _key(sign_key, verify_key, "--certificate" if certificate else "--rollouts" if rollouts else "--out" if out else "")
    if rollouts is not None:
        from lockstep.cli.logged import check_logged

        raise typer.Exit(check_logged(rollouts, recipe, model, set_, as_json=as_json, rows=rows))
    if audit_only and recipe is not None:
        from lockstep.cli.audit import run_audit

        raise typer.Exit(run_audit(recipe, engine_url, "0.8.5", set_, engine, api_key_env, as_json=as_json))
    from lockstep.cli.common import planted
    from lockstep.cli.sides import recipe_of_sides

    loaded, faults = recipe_of_sides(recipe, model, engine_url, set_, engine), planted(plant)
    if depth == "quick":
        from lockstep.config.recipe import with_sets

        loaded = with_sets(loaded, QUICK)
    if certificate is not None:
        raise typer.Exit(_holds(certificate, loaded, key, api_key_env, as_json=as_json))
    with Console() as console, tempfile.TemporaryDirectory(prefix="lockstep-check-") as scratch:
        result = _climb(loaded, out or Path(scratch), depth, faults, console.say, key, api_key_env)
    _show(result, depth, faults, out, as_json=as_json)
    raise typer.Exit({"PASS": 0, "FAIL": 1, "NOT_RUN": 3}[result.status])


def _refuse_contradictions(recipe: Path | None, engine: str | None, url: str | None, depth: str, *, audit_only: bool) -> None:
    if depth not in DEPTHS:
        raise UsageError("flag --depth", got=repr(depth), expected=f"one of {', '.join(DEPTHS)}", hint="--depth quick")
    if audit_only and recipe is None:
        expected, hint = "a recipe", "lockstep engines audit --url URL needs none"
        raise UsageError("check --audit-only", got="no recipe", expected=expected, hint=hint)
    if engine is not None and url is not None:
        expected, hint = "one of them: a server is asked over HTTP", "leave --engine out"
        raise UsageError("check", got="--engine with --engine-url", expected=expected, hint=hint)


def _climb(
    recipe: "Recipe", directory: Path, depth: str, faults: tuple[str, ...], say: "Say", key: bytes, api_key_env: str
) -> "LadderResult":
    from lockstep.cli.common import plants
    from lockstep.loop.open import open_session
    from lockstep.runs.durable import make_directory

    make_directory(directory)
    with open_session(recipe, directory / "engine.log", say, plants(faults), api_key_env) as session:
        from lockstep.parity.certificate import issue
        from lockstep.parity.ladder import climb
        from lockstep.records.verdicts import OfCheck
        from lockstep.runs.certificate import void
        from lockstep.runs.layout import RunLayout
        from lockstep.runs.record import open_recorder

        recorder, deeper = open_recorder(RunLayout(directory)), _deeper(session) if depth == "full" else {}
        result = climb(session.pair, lambda layer: say(f"ladder: {layer}"), deeper)
        for verdict in result.verdicts:
            recorder.verdict(OfCheck(), verdict)
        if result.passed:
            issue(session.pair, result.verdicts, directory / "certificate.json", depth, key)
        else:
            stopped = next(verdict.layer for verdict in result.verdicts if verdict.status != "PASS")
            void(directory / "certificate.json", f"layer {stopped} of a later check here did not pass")
    return result


def _deeper(session: "Session") -> dict:
    from lockstep.loop.open import open_engine
    from lockstep.parity.deep import factors, in_flight

    return {
        "path": lambda verdict: factors.deepen(session.pair, verdict, open_engine),
        "weights": lambda verdict: in_flight.deepen(session.pair, verdict),
    }


def _show(result: "LadderResult", depth: str, faults: tuple[str, ...], out: Path | None, *, as_json: bool) -> None:
    from lockstep.cli.common import layers_document, show_ladder

    if as_json:
        layers = layers_document(result.verdicts)
        found = {"verdict": result.status, "depth": depth, "planted": faults, "note": _note(result), "layers": layers}
        emit("check", found)
        return
    show_ladder(result.verdicts)
    if note := _note(result):
        print(note)
    if faults:
        print(f"planted    {', '.join(faults)}: this certifies nothing")
    elif out is not None and result.passed:
        print(f"certificate: {out / 'certificate.json'}")


def _note(result: "LadderResult") -> str:
    """Said where all that could be judged passed, and something could not be; the last layer runs in no other case."""
    if result.status != "NOT_RUN" or result.verdicts[-1].status != "PASS":
        return ""
    left = [verdict.layer for verdict in result.verdicts if verdict.status == "NOT_RUN"]
    what = f"{' and '.join(left)} need{'s' if len(left) == 1 else ''} an engine that Lockstep starts (--engine vllm)"
    return f"nothing failed; {what}, hence exit code 3 and no certificate"


def _key(sign_key: Path | None, verify_key: Path | None, use: str) -> bytes:
    """The bytes of whichever key ``use`` takes; none where no key was given."""
    wanted = {"--certificate": "--verify-key", "--out": "--sign-key"}.get(use, "")
    for flag, path in (("--sign-key", sign_key), ("--verify-key", verify_key)):
        if path is not None and flag != wanted:
            expected = "--sign-key with --out DIR, --verify-key with --certificate FILE"
            raise UsageError(
                "check", got=f"{flag} {f'with {use}' if use else 'alone'}", expected=expected, hint=f"leave {flag} out"
            )
    path = sign_key or verify_key
    if path is None:
        return b""
    from lockstep.runs.signature import read_key

    return read_key(path, wanted)


def _holds(path: Path, recipe: "Recipe", key: bytes, api_key_env: str, *, as_json: bool) -> int:
    """Compare a certificate with the pair as it is now. Returns the exit code: 0 while it holds, 1 when anything changed."""
    from lockstep.loop.open import open_session
    from lockstep.parity.certificate import changes
    from lockstep.runs.certificate import read_certificate

    issued = read_certificate(path, key)
    with (
        Console() as console,
        tempfile.TemporaryDirectory(prefix="lockstep-check-") as scratch,
        open_session(recipe, Path(scratch) / "engine.log", console.say, None, api_key_env) as session,
    ):
        changed = changes(issued, session.pair)
    if as_json:
        signed = "verified" if key else "not verified" if issued.signature else "none"
        emit("certificate", {"holds": not changed, "issued": issued.issued, "signature": signed, "changes": changed})
    else:
        by = ", by the key of --verify-key" if key else ""
        print("\n".join([f"void: {change}" for change in changed]) or f"holds, as issued {issued.issued}{by}")
    return 1 if changed else 0
