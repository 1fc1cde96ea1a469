"""Configurations side by side: a verdict for each figure, since which step, and the layer it points at.

arms ─► common steps ─► a mean a seed ─► statistics.judge_all ─► Comparison ─► a table, or the report
                └─► bands and onsets, for the eye
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import Struct

from lockstep.errors import UsageError
from lockstep.metrics.catalog import metric_named
from lockstep.records.verdicts import Status
from lockstep.report.bands import Band, band_of, onset
from lockstep.report.pattern import JUDGED, Since, points_at
from lockstep.report.statistics import Judged, SeedMeans, judge_all
from lockstep.report.trajectories import Arm, Trajectory, another_formula

SCHEMA = "lockstep.compare/1"


class Figure(Struct, frozen=True, kw_only=True):
    """One figure of one configuration against the reference."""

    name: str
    unit: str
    verdict: str
    reference_mean: float
    difference: float
    ci90: tuple[float, float]
    margin: float
    p: float
    seeds: int
    seeds_needed: int
    paired: bool
    since_step: float | None
    """The step since which a figure is different; None where no single step stands out."""
    reason: str
    notes: tuple[str, ...]
    """Names in the files where they differ from the catalog's, values that are missing."""

    @property
    def interval(self) -> str:
        """The 90 % interval, for people."""
        low, high = self.ci90
        return f"{low:+.3g} to {high:+.3g}" if np.isfinite(low) else "–"

    @property
    def more(self) -> str:
        """How many seeds would tell, and what else there is to say."""
        least = "at least " if self.seeds < 2 else ""
        needed = f"{least}{self.seeds_needed} seeds each would tell" if self.seeds_needed else ""
        return "; ".join(filter(None, (needed, self.reason, *self.notes)))


class Against(Struct, frozen=True, kw_only=True):
    """One configuration against the reference."""

    name: str
    reference: str
    verdict: Status
    """FAIL where a figure is different, PASS where all are equivalent, else NOT_RUN."""
    figures: tuple[Figure, ...]
    layer: str
    """The layer that the pattern points at; empty where none."""
    why: str
    not_compared: tuple[str, ...]
    """Figures that only one of them logged, or that they log by two formulas."""


class Series(Struct, frozen=True, kw_only=True):
    """One figure of one configuration over its steps, for plots. N is how many steps."""

    arm: str
    figure: str
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: int


class Comparison(Struct, frozen=True, kw_only=True):
    """What ``lockstep compare`` found."""

    reference: str
    arms: dict[str, tuple[str, ...]]
    """Name → the files of its seeds."""
    against: tuple[Against, ...]
    series: tuple[Series, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Status:
        """The worst of them: FAIL, then NOT_RUN, then PASS."""
        found = {against.verdict for against in self.against}
        return "FAIL" if "FAIL" in found else "NOT_RUN" if "NOT_RUN" in found else "PASS"


def compare(arms: Sequence[Arm], figures: Sequence[str] = (), first_step: float = -np.inf) -> Comparison:
    """Hold each configuration against the first.

    Args:
        arms: the reference first.
        figures: to judge; those of :data:`~lockstep.report.pattern.JUDGED` that both logged if none is named.
        first_step: earlier steps are left out.

    Raises:
        UsageError: for fewer than two, and for a figure that nobody logged.
    """
    if len(arms) < 2:
        hint = "lockstep compare reference=RUN,RUN,RUN first=RUN,RUN,RUN"
        raise UsageError("lockstep compare", got="one configuration", expected="two or more", hint=hint)
    known = set().union(*(_figures(arm) for arm in arms))
    if lost := [name for name in figures if name not in known]:
        expected = f"one of {', '.join(sorted(known))}"
        raise UsageError("flag --figure", got=repr(lost[0]), expected=expected, hint=f"--figure {min(known)}")
    wanted = figures or [name for name in JUDGED if name in known]
    if not wanted:
        got = f"none of them: {', '.join(sorted(known)[:8])} …"
        hint = "--map clip_fraction=NAME, or --figure NAME"
        raise UsageError("lockstep compare", got=got, expected="a figure of the catalog", hint=hint)
    reference = arms[0]
    return Comparison(
        reference=reference.name,
        arms={arm.name: tuple(run.source for run in arm.runs) for arm in arms},
        against=tuple(against(reference, arm, wanted, first_step) for arm in arms[1:]),
        series=tuple(
            s for arm in arms for name in wanted if (s := _series(arm, name, first_step)) is not None
        ),
        notes=tuple(note for arm in arms for note in arm.notes),
    )


def against(reference: Arm, arm: Arm, wanted: Sequence[str], first_step: float = -np.inf) -> Against:
    """One configuration against another: the judgement alone, without what is drawn."""
    mixed = {name: why for name in wanted if (why := _two_formulas(reference, arm, name))}
    there = _figures(reference) & _figures(arm)
    both = [name for name in wanted if name in there and name not in mixed]
    sides = {name: _sides(reference, arm, name, first_step) for name in both}
    judged = judge_all({name: side.sample for name, side in sides.items()})
    since = {
        name: Since(onset(side.difference) if side.difference.size else None) for name, side in sides.items()
    }
    pattern = points_at(judged, since)
    # Without a figure there is no verdict, and so no PASS: an empty set equals none of these.
    found = {figure.verdict for figure in judged.values()}
    verdict: Status = "FAIL" if "different" in found else "PASS" if found == {"equivalent"} else "NOT_RUN"
    figures = tuple(_figure(name, judged[name], sides[name], since[name]) for name in both)
    return Against(
        name=arm.name,
        reference=reference.name,
        verdict=verdict,
        figures=figures,
        layer=pattern.layer,
        why=pattern.why,
        not_compared=tuple(mixed.get(name, name) for name in wanted if name not in both),
    )


def _two_formulas(reference: Arm, arm: Arm, name: str) -> str:
    """Why a figure of two systems is not one figure; empty where it is, or where not both have it."""
    sides = [{run.logged_as[name] for run in side.runs if name in run.figures} for side in (reference, arm)]
    formulas = [{another_formula(logged) for logged in side} for side in sides]
    if not all(sides) or formulas[0] == formulas[1]:
        return ""
    logged = " and ".join(sorted(sides[0] | sides[1]))
    differs = "; ".join(sorted(set().union(*formulas) - {""}))
    return f"{name} ({logged} are two formulas: {differs})"


@dataclass(frozen=True)
class _Sides:
    """One figure of both over their common steps. N is how many these are."""

    sample: SeedMeans
    steps: np.ndarray
    """float64 [N]."""
    difference: np.ndarray
    """Mean over seeds of B less that of A, float64 [N]."""
    notes: tuple[str, ...]


def _sides(reference: Arm, arm: Arm, name: str, first_step: float) -> _Sides:
    runs = [[run for run in side.runs if name in run.figures] for side in (reference, arm)]
    paired = _pairs(*runs)
    if paired is not None:
        runs = [list(side) for side in paired]
    # A mean over other steps is another figure: what one run did not log counts for none.
    logged = [run.steps[~run.absent[name]] for side in runs for run in side]
    steps = logged[0]
    for other in logged[1:]:
        steps = np.intersect1d(steps, other)
    steps = steps[steps >= first_step]
    a, b = (np.array([_at(run, name, steps) for run in side]).reshape(len(side), -1) for side in runs)
    notes = [
        f"logged as {s}" for s in sorted({run.logged_as[name] for side in runs for run in side} - {name})
    ]
    if not steps.size:
        empty = np.empty(0)
        return _Sides(SeedMeans(empty, empty, False), steps, empty, (*notes, "no common step"))
    if lost := int((~np.isfinite(a)).sum() + (~np.isfinite(b)).sum()):
        notes.append(f"{lost} of {a.size + b.size} values are not finite")
    identical = a.shape == b.shape and bool(np.array_equal(a, b))
    sample = SeedMeans(_means(a), _means(b), paired is not None, identical)
    return _Sides(sample, steps, b.mean(0) - a.mean(0), tuple(notes))


def _means(values: np.ndarray) -> np.ndarray:
    """A seed's mean over its steps; one value that is not finite makes it so, and is never dropped."""
    return values.mean(1)


def _pairs(a: list[Trajectory], b: list[Trajectory]) -> tuple[list[Trajectory], list[Trajectory]] | None:
    """Runs of one seed beside each other; None where seeds are not told, or fewer than two are common."""
    of_a, of_b = ({run.seed: run for run in side if run.seed} for side in (a, b))
    common = sorted(of_a.keys() & of_b.keys())
    # Pairing by some of the seeds would leave runs out: all of the smaller side's, or none.
    if len(common) < 2 or len(common) < min(len(a), len(b)):
        return None
    return [of_a[seed] for seed in common], [of_b[seed] for seed in common]


def _at(run: Trajectory, name: str, steps: np.ndarray) -> np.ndarray:
    return run.figures[name][np.searchsorted(run.steps, steps)]


def _figure(name: str, judged: Judged, side: _Sides, since: Since) -> Figure:
    at = since.place if judged.verdict == "different" else None
    return Figure(
        name=name,
        unit=metric.unit if (metric := metric_named(name)) is not None else "",
        verdict=judged.verdict,
        reference_mean=float(side.sample.a.mean()) if side.sample.a.size else float("nan"),
        difference=judged.difference,
        ci90=judged.ci90,
        margin=judged.margin,
        p=judged.p,
        seeds=judged.seeds,
        seeds_needed=judged.seeds_needed,
        paired=judged.paired,
        since_step=None if at is None else float(side.steps[at]),
        reason=judged.reason,
        notes=side.notes,
    )


def _figures(arm: Arm) -> set[str]:
    return {name for run in arm.runs for name in run.figures}


def _series(arm: Arm, name: str, first_step: float) -> Series | None:
    runs = [run for run in arm.runs if name in run.figures]
    if not runs:
        return None
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    steps = steps[steps >= first_step]
    values = np.full((len(runs), steps.size), np.nan)
    for row, run in enumerate(runs):
        kept = run.steps >= first_step
        values[row, np.searchsorted(steps, run.steps[kept])] = run.figures[name][kept]
    if not steps.size:
        return None
    band: Band = band_of(values)
    return Series(
        arm=arm.name,
        figure=name,
        steps=steps.tolist(),
        mean=band.mean.tolist(),
        low=band.low.tolist(),
        high=band.high.tolist(),
        seeds=len(runs),
    )
