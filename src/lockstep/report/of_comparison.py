"""The report of a comparison: trajectories side by side, the reference first, in blue; then the verdicts."""

from collections.abc import Sequence
from math import nan

from lockstep.metrics.catalog import metric_named
from lockstep.report.build import shown
from lockstep.report.compare import Against, Comparison, Figure, Series
from lockstep.report.document import Line, Plot, Report, Section, Table

COLUMNS = ("figure", "verdict", "reference", "difference", "90 %", "margin", "since step", "what else")


def of_comparison(comparison: Comparison) -> Report:
    """What ``lockstep compare`` found."""
    sources = tuple((arm, source) for arm, files in comparison.arms.items() for source in files)
    seeds = Table(title="Seeds of each configuration", columns=("configuration", "run"), rows=sources)
    figures = dict.fromkeys(one.figure for one in comparison.series)
    plots = tuple(_side_by_side(f, [one for one in comparison.series if one.figure == f]) for f in figures)
    names = " and ".join(against.name for against in comparison.against)
    return Report(
        kind="compare",
        title=f"{names} against {comparison.reference}",
        status=comparison.verdict,
        words=tuple(sentence for against in comparison.against for sentence in _words(against)),
        sections=(
            Section(title="Trajectories", plots=plots),
            *map(_verdicts, comparison.against),
            Section(title="Runs", text=comparison.notes, tables=(seeds,)),
        ),
    )


def _words(against: Against) -> list[str]:
    by = {verdict: [f.name for f in against.figures if f.verdict == verdict] for verdict in VERDICTS}
    told = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in by.items() if names)
    words = [f"{against.name} against {against.reference}: {told or 'no figure in common'}."]
    if against.layer:
        words.append(
            f"That points at layer {against.layer}: {against.why}. lockstep check proves it, or does not."
        )
    elif by["different"]:
        words.append(f"That points at no layer: {against.why}.")
    return words


VERDICTS = ("different", "not separable", "equivalent")


def _verdicts(against: Against) -> Section:
    lost = ", ".join(against.not_compared)
    return Section(
        title=f"Verdicts on {against.name}",
        text=(f"Logged by one of them only, or by two formulas: {lost}.",) if lost else (),
        tables=(Table(title="Figures", columns=COLUMNS, rows=tuple(map(_row, against.figures))),),
    )


def _row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.name,
        figure.verdict,
        shown(figure.reference_mean),
        f"{figure.difference:+.3g}",
        figure.interval,
        shown(figure.margin),
        "–" if figure.since_step is None else f"{figure.since_step:g}",
        figure.more,
    )


def _side_by_side(figure: str, series: Sequence[Series]) -> Plot:
    xs = tuple(sorted(set().union(*(one.steps for one in series))))
    metric = metric_named(figure)
    unit = metric.unit if metric is not None else ""
    lines = tuple(_line(one, xs) for one in series)
    return Plot(title=figure, unit=unit, x_label="step", xs=xs, lines=lines)


def _line(one: Series, xs: Sequence[float]) -> Line:
    def over(values: Sequence[float]) -> tuple[float, ...]:
        at = dict(zip(one.steps, values, strict=True))
        return tuple(at.get(x, nan) for x in xs)

    name = f"{one.arm} ({one.seeds} seed{'s' * (one.seeds != 1)})"
    return Line(name=name, ys=over(one.mean), low=over(one.low), high=over(one.high))
