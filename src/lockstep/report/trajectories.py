"""What is compared: trajectories, one for each seed, and configurations of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lockstep.errors import UsageError
from lockstep.metrics.aliases import ALIASES, nearest_to
from lockstep.metrics.catalog import BY_NAME

STEP_NAMES = (
    "step",
    "global_step",
    "_step",
    "train/global_step",
    "trainer/global_step",
    "training/global_step",
    "iteration",
)
"""What peers call a training step, the first that is there counts."""
PREFIXES = ("train/", "rl/", "actor/", "stats/")
"""What loggers put before a name; a name is looked for as it stands first."""


@dataclass(frozen=True)
class Trajectory:
    """One run's figures over its steps. N is how many steps it logged."""

    source: str
    """The file or directory."""
    steps: np.ndarray
    """float64 [N], ascending."""
    figures: dict[str, np.ndarray]
    """By catalog name where the mapping knows it, else by its own: float64 [N]; NaN where not finite."""
    absent: dict[str, np.ndarray]
    """Which steps did not log the figure at all, bool [N]."""
    logged_as: dict[str, str]
    """Name here → name in the file."""
    seed: str = ""
    """What pairs it with another configuration's run; empty where nothing says."""
    same: str = ""
    """Runs that have it in common differ in nothing but seeds; empty where nothing says."""
    unproven: str = ""
    """Layer, cause and reason, where the run trained although the ladder did not pass; else empty."""


@dataclass(frozen=True)
class Arm:
    """A configuration: its runs differ in nothing but seeds."""

    name: str
    runs: tuple[Trajectory, ...]
    notes: tuple[str, ...] = field(default=())


def trajectory(
    source: str,
    rows: Sequence[tuple[float, Mapping[str, float]]],
    mapping: Mapping[str, str],
    *,
    seed: str = "",
    same: str = "",
) -> Trajectory:
    """Figures as columns over the steps that were logged.

    Args:
        rows: step and its figures, in any order; figures of one step may come in several rows, and of two
            values of one figure at one step the later counts (a run that went on after a kill logs it again).
        mapping: ours → theirs; names that are not in it are looked up in the catalog's aliases.

    Raises:
        UsageError: when there is no step in it.
    """
    if not rows:
        expected = f"at least one step, under {', '.join(STEP_NAMES[:4])} … or --map step=COLUMN"
        raise UsageError(f"file {source}", got="no step", expected=expected, hint=f"head {source}")
    steps = np.unique(np.array([step for step, _ in rows], np.float64))
    place = {step: at for at, step in enumerate(steps.tolist())}
    theirs = {name: ours for ours, name in mapping.items()}
    figures: dict[str, np.ndarray] = {}
    absent: dict[str, np.ndarray] = {}
    logged_as: dict[str, str] = {}
    for step, values in rows:
        for name, value in values.items():
            ours = theirs.get(name) or catalogued(name)
            if logged_as.setdefault(ours, name) != name:
                continue  # two columns of one meaning: the first is taken, as its name says
            if ours not in figures:
                figures[ours] = np.full(steps.size, np.nan)
                absent[ours] = np.ones(steps.size, np.bool_)
            figures[ours][place[step]] = value if np.isfinite(value) else np.nan
            absent[ours][place[step]] = False
    missing = [name for ours, name in mapping.items() if ours not in figures and ours not in ("step", "seed")]
    if missing:
        got = f"no column {missing[0]!r}"
        some = ", ".join(sorted(logged_as.values())[:12])
        raise UsageError(f"file {source}", got=got, expected=f"one of {some} …", hint="--map OURS=THEIRS")
    return Trajectory(source, steps, figures, absent, logged_as, seed, same)


def another_formula(name: str) -> str:
    """How a peer's figure differs from the catalog's that is nearest to it; empty where it does not."""
    known = {alias.name: alias.differs for alias in ALIASES}
    prefixes = ("", *PREFIXES)
    bare = next(
        (name.removeprefix(p) for p in prefixes if name.startswith(p) and name.removeprefix(p) in known), ""
    )
    return known.get(name) or known.get(bare, "")


def catalogued(name: str) -> str:
    """The catalog's name for what a peer calls so, or the name as it is."""
    if name in BY_NAME:
        return name
    for prefix in ("", *PREFIXES):
        if name.startswith(prefix) and (ours := nearest_to(name.removeprefix(prefix))):
            return ours
    return name
