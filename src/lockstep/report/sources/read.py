"""From a path to trajectories: which reader a file needs is told by what it is.

    DIRECTORY with manifest.json   a Lockstep run
    *.csv                          a table; --map seed=COLUMN splits it into seeds
    *.jsonl, trainer_state.json    JSON lines, nested names joined by "/"; the log of transformers and TRL
    events.out.tfevents.*          TensorBoard's event file, or a directory of such
    *.wandb                        a file of W&B's offline mode, or its run directory

The last two are read by strict readers of our own (``tensorboard.py``, ``wandb.py``): both formats are
framed records of a few protobuf fields, and their libraries bring hundreds of megabytes.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lockstep.errors import UsageError
from lockstep.report.sources import tables, tensorboard, wandb
from lockstep.report.trajectories import Trajectory, trajectory
from lockstep.runs.read import RunRecord, open_run

EVENTS = "events.out.tfevents."


def read_runs(path: Path, mapping: Mapping[str, str]) -> list[Trajectory]:
    """The trajectories at a path: one, or one a seed where a table holds several.

    Raises:
        UsageError: for a path that holds none.
        RunError: for a file that is damaged.
    """
    if (path / "manifest.json").is_file():
        return [_of_run(open_run(path), mapping)]
    if path.is_dir():
        return _of_directory(path, mapping)
    if not path.is_file():
        raise UsageError(f"run {path}", got="nothing there", expected="a run or a log", hint="ls runs/")
    if path.suffix == ".wandb":
        return [trajectory(str(path), wandb.rows(path), mapping)]
    if path.name.startswith(EVENTS):
        return [trajectory(str(path), tensorboard.rows(path), mapping)]
    if path.suffix in (".csv", ".jsonl", ".json"):
        seeds = tables.rows_by_seed(path, mapping)
        return [trajectory(str(path), rows, mapping, seed=seed) for seed, rows in seeds.items()]
    expected = ".csv, .jsonl, trainer_state.json, an event file, .wandb, or a run's directory"
    raise UsageError(f"run {path}", got=f"a file of kind {path.suffix!r}", expected=expected, hint="--help")


def _of_directory(path: Path, mapping: Mapping[str, str]) -> list[Trajectory]:
    """A directory that holds one log, or runs beside each other, each a seed."""
    runs = sorted(child for child in path.iterdir() if (child / "manifest.json").is_file())
    if runs:
        return [_of_run(open_run(run), mapping) for run in runs]
    if events := sorted(path.rglob(f"{EVENTS}*")):
        rows = [row for file in events for row in tensorboard.rows(file)]
        return [trajectory(str(path), rows, mapping)]
    for kind in ("*.wandb", "trainer_state.json", "*.csv", "*.jsonl"):
        if files := sorted(path.glob(kind)):
            return [found for file in files for found in read_runs(file, mapping)]
    raise UsageError(f"run {path}", got="no log in it", expected="a run or logs", hint=f"ls {path}")


def _of_run(run: RunRecord, mapping: Mapping[str, str]) -> Trajectory:
    from msgspec import json
    from msgspec.structs import replace

    recipe = run.manifest.recipe
    # What a run is, less its seed, the engine's version as it was resolved included.
    plain = replace(recipe, training=replace(recipe.training, seed=0))
    engine = run.manifest.engine
    planted = ",".join(run.manifest.planted)
    same = f"{engine.engine} {engine.version} {planted} {json.encode(plain, order='sorted').decode()}"
    rows = [(float(record.step), record.metrics) for record in run.steps]
    found = trajectory(str(run.layout.root), rows, mapping, seed=str(recipe.training.seed), same=same)
    return dataclasses.replace(found, unproven=run.override)
