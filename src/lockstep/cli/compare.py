"""``lockstep compare RUN RUN …``: are these configurations the same run, and if not, since when and where?"""

from math import inf
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cli.console import emit, show
from lockstep.cli.flags import EXIT_CODES, Json
from lockstep.errors import UsageError

if TYPE_CHECKING:
    from lockstep.report.compare import Comparison, Figure


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN[,RUN…]",
            help="A configuration: a run, or one run a seed. The first is the reference. A Lockstep run, "
            ".csv, .jsonl, trainer_state.json, TensorBoard event files, or an offline .wandb file.",
        ),
    ],
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="OURS=THEIRS",
            help="A column's name in the files: step=, seed=, clip_fraction= … Peers' names that the metric "
            "catalogue holds are known.",
        ),
    ] = None,
    figure: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Judge these alone; any number that was logged.")
    ] = None,
    from_step: Annotated[float, typer.Option(help="Leave earlier steps out.")] = -inf,
    as_json: Json = False,
) -> None:
    """Hold trajectories side by side: equivalent, different, or not to be told apart by so few seeds.

    A margin is the spread of seeds that share a configuration; one seed is never called different.

    Exit code: 0 all figures equivalent, 1 one is different, 2 usage, 3 not separable.
    """
    from lockstep.report.arms import read_arms
    from lockstep.report.compare import compare as held

    comparison = held(read_arms(runs, _mapping(map_ or [])), figure or (), from_step)
    if as_json:
        emit("compare", {"verdict": comparison.verdict, "comparison": comparison})
    else:
        _show(comparison)
    raise typer.Exit(EXIT_CODES[comparison.verdict])


def _mapping(words: list[str]) -> dict[str, str]:
    mapping = {}
    for word in words:
        ours, equals, theirs = word.partition("=")
        if not (ours and equals and theirs):
            raise UsageError(
                "flag --map", got=repr(word), expected="OURS=THEIRS", hint="--map step=global_step"
            )
        mapping[ours] = theirs
    return mapping


def _show(comparison: "Comparison") -> None:
    for against in comparison.against:
        show(f"{against.name} against {against.reference}")
        show(f"  {'figure':<26} {'verdict':<14} {'reference':>10} {'difference':>11}  {'90 %':<23} margin")
        for figure in against.figures:
            show(_line(figure))
        if against.layer or against.verdict == "FAIL":
            show(f"  points at  {against.layer or 'no layer'}: {against.why}")
        if against.layer:
            show("  prove it   lockstep check RECIPE   (a pattern points, it proves nothing)")
        if against.not_compared:
            show(f"  logged by one of them only, or by two formulas: {', '.join(against.not_compared)}")
    for note in comparison.notes:
        show(f"note: {note}")


def _line(figure: "Figure") -> str:
    since = f"since step {figure.since_step:g}; " if figure.since_step is not None else ""
    means = f"{figure.reference_mean:>10.4g} {figure.difference:>+11.3g}"
    tail = f"{figure.interval:<23} {figure.margin:.3g}  {since}{figure.more}"
    return f"  {figure.name:<26} {figure.verdict:<14} {means}  {tail}"
