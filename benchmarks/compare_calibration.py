"""How often does ``lockstep compare`` err? Simulated pairs of configurations, put through the verdicts it
gives.

Each seed of a configuration is a trajectory: the seed's own level (spread 1), a level that both
configurations' runs of that seed share where they are paired (``shared``, its share of that variance), and
noise of AR(1) along the steps. In configuration B the first of eight figures is moved by ``shift`` spreads. A
row is

    seeds  shared  shift   any figure called different   that figure different   equivalent   stated

The first column of rates must be at most 5 % where nothing is moved; ``stated`` is the median of the seeds
that ``compare`` asked for where it could not tell. Written to evidence/compare/calibration.json.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lockstep.report.compare import against
from lockstep.report.trajectories import Arm, Trajectory

PAIRS = 200
STEPS = 40
RHO = 0.7
NOISE = 0.5
FIGURES = (
    "reward_mean",
    "entropy_mean_nats",
    "completion_tokens_mean",
    "clip_fraction",
    "policy_kl_k3_nats",
    "mismatch_kl_k3_nats",
    "gap_abs_mean_nats",
    "lag_steps",
)
CASES = [(n, shared, 0.0) for n in (1, 2, 3, 5, 8, 12) for shared in (0.0, 0.8)]
CASES += [(n, shared, 1.0) for n in (3, 8, 17, 30) for shared in (0.0, 0.8)]
CASES += [(3, 0.0, 8.0), (30, 0.0, 0.0), (3, 0.99, 0.0)]
OUT = Path(__file__).parents[1] / "evidence" / "compare" / "calibration.json"


@dataclass(frozen=True)
class Row:
    """Rates over the pairs of one case."""

    seeds: int
    shared: float
    shift: float
    any_different: float
    first_different: float
    first_equivalent: float
    stated: float
    pairs: int


def simulated(seeds: int, shared: float, shift: float, random: np.random.Generator) -> tuple[Arm, Arm]:
    """Two configurations whose first figure differs by ``shift`` spreads of seeds."""
    common = {name: random.normal(size=seeds) * np.sqrt(shared) for name in FIGURES}
    return (
        _arm("A", seeds, common, shared, 0.0, random),
        _arm("B", seeds, common, shared, shift, random),
    )


def _arm(name: str, seeds: int, common, shared: float, shift: float, random: np.random.Generator) -> Arm:
    steps = np.arange(STEPS, dtype=np.float64)
    noise = NOISE * random.normal(size=(STEPS, seeds, len(FIGURES)))
    for step in range(1, STEPS):
        noise[step] = RHO * noise[step - 1] + np.sqrt(1.0 - RHO**2) * noise[step]
    own = random.normal(size=(seeds, len(FIGURES))) * np.sqrt(1.0 - shared)
    runs = []
    for seed in range(seeds):
        figures = {f: common[f][seed] + own[seed, k] + noise[:, seed, k] for k, f in enumerate(FIGURES)}
        figures[FIGURES[0]] = figures[FIGURES[0]] + shift
        absent = {figure: np.zeros(STEPS, np.bool_) for figure in FIGURES}
        runs.append(Trajectory(name, steps, figures, absent, {f: f for f in FIGURES}, seed=str(seed)))
    return Arm(name, tuple(runs))


def calibrated(seeds: int, shared: float, shift: float, pairs: int = PAIRS, random_seed: int = 0) -> Row:
    """The rates of one case."""
    random = np.random.default_rng((random_seed, seeds, int(100 * shared), int(100 * shift)))
    found = [against(*simulated(seeds, shared, shift, random), FIGURES).figures for _ in range(pairs)]
    first = [figures[0] for figures in found]
    needed = [figure.seeds_needed for figure in first if figure.seeds_needed]
    return Row(
        seeds=seeds,
        shared=shared,
        shift=shift,
        any_different=float(np.mean([any(f.verdict == "different" for f in fs) for fs in found])),
        first_different=float(np.mean([f.verdict == "different" for f in first])),
        first_equivalent=float(np.mean([f.verdict == "equivalent" for f in first])),
        stated=float(np.median(needed)) if needed else 0.0,
        pairs=pairs,
    )


def rows() -> Iterator[Row]:
    """Every case, told as it comes."""
    print("seeds  shared  shift  any different  first different  first equivalent  stated")
    for case in CASES:
        row = calibrated(*case)
        print(
            f"{row.seeds:>5} {row.shared:>7.2f} {row.shift:>6.1f} {row.any_different:>14.3f} "
            f"{row.first_different:>16.3f} {row.first_equivalent:>17.3f} {row.stated:>7.0f}",
            flush=True,
        )
        yield row


def main() -> int:
    """Exit code 1 where identical configurations were called different too often: a limit of 5 %."""
    found = list(rows())
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(
        json.dumps({"pairs": PAIRS, "figures": len(FIGURES), "rows": [asdict(r) for r in found]}, indent=1)
    )
    worst = max(row.any_different for row in found if row.shift == 0.0)
    print(f"identical configurations called different: {worst:.3f} at most, limit 0.05")
    return int(worst > 0.05)


if __name__ == "__main__":
    sys.exit(main())
