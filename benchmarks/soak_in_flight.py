"""A long run in flight of a tiny model: does anything grow that should not?

    python benchmarks/soak_in_flight.py --steps 300 --out evidence/in_flight
    python benchmarks/soak_in_flight.py --steps 1000000 --hours 2 --out evidence/in_flight     the long form

After each step: resident memory, open descriptors, threads, and what lies in shared memory, as the kernel
tells them. *Growth* is the slope over the second half of the run, times its length: the first half fills
caches.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import tiny

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
SETS = [
    "loop.kind=in_flight",
    "rollout.max_lag=2",
    "training.checkpoint_every=20",
    "optimizer.lr=1e-4",
    "parity.probe_prompts=4",
    "parity.probe_tokens=4",
    "parity.draw_tokens=128",
    "parity.draws_see=1.0",
]
MEASURED = ("rss_mb", "descriptors", "threads", "shared_memory_mb")


def measured() -> tuple[float, ...]:
    """Of this process, and of its files in shared memory; in :data:`MEASURED`'s order."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    shared = sum(file.stat().st_size for file in Path("/dev/shm").glob("lockstep-*/*") if file.is_file())
    return (
        int(status["VmRSS"].split()[0]) / 1e3,
        float(len(os.listdir("/proc/self/fd"))),
        float(status["Threads"]),
        shared / 1e6,
    )


def growth(values: np.ndarray) -> float:
    """Over the second half of a run."""
    late = values[len(values) // 2 :]
    return float(np.polyfit(np.arange(len(late)), late, 1)[0] * len(late))


def plot(rows: np.ndarray, path: Path) -> None:
    """A line for each of what was measured, each on a scale of its own that begins at 0."""
    width, height = 640, 110
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(MEASURED)}">']
    for number, (name, values) in enumerate(zip(MEASURED, rows.T, strict=True)):
        top = number * height + 20
        most = max(values.max(), 1e-9)
        points = " ".join(
            f"{10 + 620 * at / max(1, len(values) - 1):.1f},{top + 80 - 75 * value / most:.1f}"
            for at, value in enumerate(values)
        )
        parts.append(f'<text x="10" y="{top - 4}" font-size="12">{name}, at most {most:.4g}</text>')
        parts.append(f'<polyline points="{points}" fill="none" stroke="currentColor"/>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


class EnoughError(Exception):
    """The hours are over."""


def main() -> None:
    """Run, and write down what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hours", type=float, default=float("inf"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from lockstep import api
    from lockstep.config.recipe import load_recipe

    rows = []
    began = time.monotonic()

    def say(text: str) -> None:
        if text.startswith("step "):
            rows.append(measured())
            if len(rows) % 50 == 0:
                print(text, *zip(MEASURED, rows[-1], strict=True), flush=True)
            if time.monotonic() - began > 3600 * args.hours:
                raise EnoughError

    with tempfile.TemporaryDirectory() as scratch:
        sets = [*tiny.sets(Path(scratch)), *SETS, f"training.steps={args.steps}", *args.set]
        recipe = load_recipe(RECIPE, sets, "transformers")
        try:
            api.train(recipe, out=Path(scratch) / "run", say=say)
        except EnoughError:
            print("the hours are over")
    table = np.array(rows)
    found = {
        name: {"first": column[0], "last": column[-1], "most": column.max(), "late_growth": growth(column)}
        for name, column in zip(MEASURED, table.T, strict=True)
    }
    args.out.mkdir(parents=True, exist_ok=True)
    document = {"schema": "lockstep.bench.soak/1", "steps": len(rows), "seconds": time.monotonic() - began}
    (args.out / "soak.json").write_text(json.dumps(document | {"measured": found}, indent=1) + "\n")
    plot(table, args.out / "soak.svg")
    print(json.dumps(document | {"measured": found}, indent=1))


if __name__ == "__main__":
    main()
