"""What were flags of ``check`` and are commands now. Each does for one more version what its command does.

Their JSON documents keep their schemas. To be deleted with version 0.2.
"""

import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from lockstep.cli.console import Console, emit, printable
from lockstep.errors import UsageError


class OldFlags(NamedTuple):
    """``--rollouts FILE [--rows N]``, ``--certificate FILE [--verify-key KEY]``, ``--audit-only``."""

    rollouts: Path | None
    rows: int | None
    certificate: Path | None
    verify_key: Path | None
    audit_only: bool


class PairFlags(NamedTuple):
    """The flags of ``check`` that stay, as they were given with an old one."""

    recipe: Path | None
    model: str | None
    engine_url: str | None
    sets: list[str] | None
    engine: str | None
    api_key_env: str
    plant: list[str] | None
    sign_key: Path | None
    out: Path | None


def run(old: OldFlags, given: PairFlags, *, as_json: bool) -> int:
    """Do what the old flag did, and say on stderr what to type. Returns the exit code.

    Raises:
        UsageError: for flags that do not go together.
    """
    _refuse_contradictions(old, given)
    if old.rollouts is not None:
        from lockstep.cli.check_log import judge_log

        _tell("--rollouts", ["check-log", old.rollouts, given.recipe])
        sides = given.recipe, given.model, given.sets
        return judge_log(old.rollouts, *sides, old.rows, as_json=as_json, document="check")
    if old.audit_only:
        from lockstep.cli.audit import run_audit

        _tell("--audit-only", ["engines", "audit", given.recipe])
        return run_audit(
            given.recipe,
            given.engine_url,
            "0.8.5",  # as --from of the command
            given.sets,
            given.engine,
            given.api_key_env,
            as_json=as_json,
        )
    assert old.certificate is not None
    _tell("--certificate", ["certificate", "verify", old.certificate, given.recipe])
    return _verify(old.certificate, old.verify_key, given, as_json=as_json)


def _tell(flag: str, words: list[str | Path | None]) -> None:
    typed = shlex.join(["lockstep", *(str(word) for word in words if word is not None)])
    print(
        printable(f"note: check {flag} is a command of its own now, and the flag will go; type: {typed} …"),
        file=sys.stderr,
    )


def _refuse_contradictions(old: OldFlags, given: PairFlags) -> None:
    def refuse(got: str, expected: str, hint: str) -> UsageError:
        return UsageError("check", got=got, expected=expected, hint=hint)

    if given.plant and (old.rollouts or old.certificate):
        raise refuse("--plant where no ladder is run", "a backend to break", "leave --plant out")
    if old.audit_only and given.recipe is None:
        raise refuse("--audit-only and no recipe", "a recipe", "lockstep engines audit --url URL needs none")
    if given.sign_key is not None:
        raise refuse(
            "--sign-key where no certificate is issued", "--sign-key with --out DIR", "leave --sign-key out"
        )
    if old.verify_key is not None and old.certificate is None:
        raise refuse(
            "--verify-key without a certificate",
            "--verify-key with --certificate FILE",
            "leave --verify-key out",
        )
    if given.out is not None:
        raise refuse("--out where no certificate is issued", "nothing to write", "leave --out out")
    if old.rows is not None and old.rollouts is None:
        raise refuse("--rows without rollouts", "--rows with --rollouts FILE", "leave --rows out")


def _verify(file: Path, key: Path | None, given: PairFlags, *, as_json: bool) -> int:
    from lockstep import api
    from lockstep.cli.certificate import shown
    from lockstep.cli.sides import recipe_of_sides

    pair = recipe_of_sides(given.recipe, given.model, given.engine_url, given.sets, given.engine)
    with Console() as console:
        verified = api.verify(file, pair, verify_key=key, api_key_env=given.api_key_env, say=console.say)
    if as_json:
        about = {"holds": not verified.changes, "issued": verified.certificate.issued}
        emit("certificate", about | {"signature": verified.signature, "changes": verified.changes})
    else:
        print("\n".join(shown(verified)))
    return 1 if verified.changes else 0  # there is a pair here always: NOT_RUN it cannot be
