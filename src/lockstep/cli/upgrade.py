"""``lockstep upgrade RECIPE --from vllm==A --to vllm==B``: what changes, its worth, and how to go on."""

import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cli.console import Console, document, show
from lockstep.cli.flags import EXIT_CODES, Json, Sets
from lockstep.errors import UsageError

if TYPE_CHECKING:
    from lockstep.diagnose.changes import Difference
    from lockstep.diagnose.upgrade import Upgrade


DOCUMENT = "upgrade.json"


def upgrade(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe; its engine's version is replaced.")],
    before: Annotated[
        str, typer.Option("--from", metavar="vllm==A", help="Where you come from; or a server's URL.")
    ],
    after: Annotated[str, typer.Option("--to", metavar="vllm==B", help="Where you go to.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where the recipe for B goes, and its certificate; upgrade-B if not given."),
    ] = None,
    set_: Sets = None,
    every: Annotated[
        bool, typer.Option("--all", help="Show every setting that resolved otherwise, not those that count.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hold two engine versions, as they come, against one trainer on the same prompts; mend the new one.

    Each difference has its effect in nats, its cause and its flag; flags are set one by one until the check
    passes, and the recipe that passed is written out.

    Exit code: 0 the same, or the same with the flags; 1 not the same; 2 usage; 3 could not run.
    """
    from lockstep.cli.common import recipe_of
    from lockstep.diagnose.upgrade import upgrade as go
    from lockstep.runs.durable import write_atomically

    version = _version(after, "--to")
    loaded = recipe_of(recipe, set_, None)
    directory = out or Path(f"upgrade-{version}")
    with Console() as console:
        source = before if "://" in before else _version(before, "--from")
        outcome = go(loaded, source, version, directory, console.say)
    whole = document("upgrade", {"upgrade": outcome})
    # Before anything is shown: a reader that goes away must not cost what took so long to measure.
    write_atomically(directory / DOCUMENT, whole.encode())
    if as_json:
        sys.stdout.write(whole)
    else:
        _show(outcome, every=every)
        show(f"all of it: {directory / DOCUMENT}; lockstep report {directory / DOCUMENT} makes a page of it")
    raise typer.Exit(EXIT_CODES[outcome.verdict])


def _version(spec: str, flag: str) -> str:
    name, equals, version = spec.partition("==")
    if name != "vllm" or not equals or not version:
        raise UsageError(
            f"flag {flag}", got=repr(spec), expected="vllm==VERSION", hint=f"{flag} vllm==0.18.1"
        )
    return version


def _show(outcome: "Upgrade", *, every: bool) -> None:
    show(f"{outcome.before.engine} → {outcome.after.engine}: {outcome.summary}")
    topic = ""
    for one in outcome.differences:
        if one.topic != topic:
            topic = one.topic
            show(f"\n{topic}")
        _row(one)
    others = list(outcome.resolved.items())
    show(f"\n{len(others)} settings resolved otherwise{'' if every else '; --all shows them'}")
    for name, (before, after) in others if every else ():
        show(f"  {name}: {before} → {after}")
    show("\nflag by flag")
    for step in outcome.steps:
        with_ = ", ".join(step.flags) or "its own defaults"
        what = (
            f"  {step.layer}, {step.cause.replace('_', ' ')}, {step.effect_nats:.4f} nats"
            if step.layer
            else ""
        )
        show(f"  {step.status:<8} {with_}{what}")
    if outcome.recipe:
        show(f"\nrecipe that passed: {outcome.recipe}")


def _row(one: "Difference") -> None:
    show(f"  {one.what}")
    show(f"    {'before':<8} {one.before or '-'}")
    show(f"    {'after':<8} {one.after or '-'}")
    if isfinite(one.effect_nats):
        low, high = one.ci95
        interval = f" (95 % {low:.4f} to {high:.4f})" if isfinite(low) else ""
        show(f"    {'effect':<8} {one.effect_nats:+.2e} nats{interval}, {one.unit}")
    for name in ("cause", "flag", "note"):
        if getattr(one, name):
            show(f"    {name:<8} {getattr(one, name)}")
