"""Questions from files: JSONL, Parquet, or a data set of the Hugging Face hub, a mapping a row.

[task]
name = "jsonl:data/questions.jsonl"                      # or parquet:PATH, hub:ORG/NAME

[task.options]
columns = { question = "problem", answer = "solution" }  # ours = theirs; all other columns are kept
shuffle = true                                           # by the run's seed; else in the file's order
config = "main"                                          # of hub:openai/gsm8k, which has several
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lockstep.errors import RecipeError
from lockstep.rollout.rewards import Item


class FileOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[task.options]`` of a task from a file."""

    columns: dict[str, str] = {}
    """Ours → theirs."""
    shuffle: bool = False
    split: str = "train"
    """The split that is read of a data set of the hub's."""
    config: str = ""
    """Which of its configurations, where it has several; empty: the only one, or the one it calls default."""


def read_items(source: str, name: str, options: dict[str, Any], seed: int) -> list[Item]:
    """The rows of ``source:name`` in the order that they are asked in.

    Raises:
        RecipeError: for a file that is not there, is not whole, or lacks a column; for an unknown option.
    """
    where = f"recipe, task {source}:{name}"
    try:
        asked = msgspec.convert(options, FileOptions)
    except msgspec.ValidationError as error:
        raise RecipeError(
            f"{where}, task.options",
            got=str(error),
            expected=", ".join(FileOptions.__struct_fields__),
            hint='task.options = { columns = { question = "problem" } }',
        ) from error
    rows = READERS[source](where, name, asked)
    for ours, theirs in asked.columns.items():
        lacking = next((number for number, row in enumerate(rows) if theirs not in row), None)
        if lacking is not None:
            raise RecipeError(
                f"{where}, row {lacking}",
                got=f"no column {theirs!r}, but {', '.join(map(str, rows[lacking])) or 'none'}",
                expected=f"it, for task.options.columns.{ours}",
                hint=f'task.options.columns = {{ {ours} = "…" }}',
            )
    items = [row | {ours: row[theirs] for ours, theirs in asked.columns.items()} for row in rows]
    order = np.random.default_rng(seed).permutation(len(items)) if asked.shuffle else range(len(items))
    return [items[number] for number in order]


def _jsonl(where: str, name: str, asked: FileOptions) -> list[dict[str, Any]]:
    rows = []
    number = 0
    try:
        lines = Path(name).read_bytes().splitlines()  # bytes: in text U+2028 ends a line too
        for line in lines:
            number += 1
            if line.strip():
                rows.append(msgspec.json.decode(line, type=dict[str, Any]))
    except OSError as error:
        raise _not_read(where, name, error.strerror or str(error)) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _not_read(f"{where}, line {number}", name, str(error)) from error
    return rows


def _parquet(where: str, name: str, asked: FileOptions) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(name).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise _not_read(where, name, str(error).splitlines()[0]) from error


def _hub(where: str, name: str, asked: FileOptions) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            where,
            got=str(error),
            expected="the hub's own library",
            hint='pip install "lockstep-rl[datasets]"',
        ) from error
    try:
        return list(datasets.load_dataset(name, asked.config or None, split=asked.split))
    except Exception as error:  # its own, the hub's, the network's
        # Which configurations there are stands behind its first line.
        got = f"{type(error).__name__}: {' '.join(str(error).split())}"
        hint = 'task.options = { config = "…", split = "…" }'
        raise RecipeError(where, got=got, expected="one split of one configuration", hint=hint) from error


READERS: dict[str, Callable[[str, str, FileOptions], list[dict[str, Any]]]] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hub": _hub,
}


def _not_read(where: str, name: str, got: str) -> RecipeError:
    return RecipeError(where, got=got, expected="a whole file, a mapping a row", hint=f"head -c 300 {name}")
