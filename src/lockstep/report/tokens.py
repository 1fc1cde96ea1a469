"""The gap, token by token, from the Parquet files of a run: in one streaming pass, whatever their size.

    rollouts/step-*.parquet ─► batches of rows ─► flat arrays ─► counts by |gap|, probability and position
                                                            └─► the completions worth showing

Memory: one batch, and counts. Quantiles come from counts in 32 classes a decade, so each is right to 4 %; the
largest is exact. Completions are chosen by their largest |gap|, and a few from all over the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.errors import RunError

if TYPE_CHECKING:
    import pyarrow

DECADES = (-9, 2)
PER_DECADE = 32
CLASSES = (DECADES[1] - DECADES[0]) * PER_DECADE + 2
"""Below the lowest, one each, above the highest."""
PROBABILITIES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1.0)
"""Edges of the engine's probability of a token."""
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""First token of each class of positions."""
ROWS_AT_A_TIME = 4096
SHOWN_WORST, SHOWN_SPREAD = 4, 4
NUMBERS = ("engine_logprobs", "sampling_logprobs", "loss_mask")


@dataclass(frozen=True)
class Place:
    """A completion: its file and its row there."""

    path: Path
    row: int
    worst: float
    """Its largest |gap|, nats."""


@dataclass
class GapCounts:
    """Counts of tokens."""

    by_probability: np.ndarray = field(
        default_factory=lambda: np.zeros((len(PROBABILITIES) - 1, CLASSES), np.int64)
    )
    by_position: np.ndarray = field(default_factory=lambda: np.zeros((len(POSITIONS), CLASSES), np.int64))
    largest: float = 0.0
    tokens: int = 0
    """Tokens of all completions that the policy drew: a tool's are not counted."""
    compared: int = 0
    """Tokens with both numbers, finite."""
    missing: int = 0
    """Tokens without a finite number of the engine's."""
    unscored: int = 0
    """Tokens of completions that the trainer has not scored."""
    completions: int = 0
    shown: list[Place] = field(default_factory=list)

    @property
    def counts(self) -> np.ndarray:
        """Counts over all tokens, int64 [CLASSES]."""
        return self.by_probability.sum(0)


def edges() -> np.ndarray:
    """Upper edge of each class but the last, nats, float64 [CLASSES − 1]."""
    return 10.0 ** np.linspace(*DECADES, CLASSES - 1)


def quantile_of(counts: np.ndarray, share: float) -> float:
    """A quantile from counts by class: the geometric middle of its class, NaN where nothing was counted.

    Args:
        counts: int64 [CLASSES].
    """
    total = int(counts.sum())
    if not total:
        return float("nan")
    at = int(np.searchsorted(np.cumsum(counts), share * total, side="left"))
    upper = edges()
    if at == 0:
        return 0.0
    # The class above the highest has no upper edge: its lower one stands for all of it.
    return float(np.sqrt(upper[at - 1] * upper[min(at, CLASSES - 2)]))


def read_gaps(paths: Sequence[Path]) -> GapCounts:
    """Count every token of the files.

    Raises:
        RunError: for a file that is damaged.
        ModuleNotFoundError: without pyarrow.
    """
    gaps = GapCounts()
    worst = []
    spread = []
    for path in paths:
        for first, batch in _batches(path, NUMBERS):
            rows = _count(gaps, batch)
            at = np.argsort(rows)[-SHOWN_WORST:]
            worst += [Place(path, first + int(row), float(rows[row])) for row in at if rows[row] > 0.0]
            worst = sorted(worst, key=lambda place: -place.worst)[:SHOWN_WORST]
        # From the middle of each file: its place says nothing of reward or gap, so nothing is chosen.
        if batch_rows := _rows_of(path):
            spread.append(Place(path, batch_rows // 2, float("nan")))
    picks = np.linspace(0, len(spread) - 1, min(SHOWN_SPREAD, len(spread))).astype(int)
    taken = {(place.path, place.row) for place in worst}
    gaps.shown = [*worst, *(spread[at] for at in picks if (spread[at].path, spread[at].row) not in taken)]
    return gaps


def _count(gaps: GapCounts, batch: "pyarrow.RecordBatch") -> np.ndarray:
    """Add a batch; returns the largest |gap| of each row, −1 where nothing was compared, float64 [rows]."""
    lengths = np.diff(np.asarray(batch["engine_logprobs"].offsets))
    engine = batch["engine_logprobs"].flatten().to_numpy()
    drawn = batch["loss_mask"].flatten().to_numpy(zero_copy_only=False)
    scored = np.repeat(np.asarray(batch["sampling_logprobs"].is_valid()), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    position = np.arange(engine.size) - np.repeat(starts, lengths)
    owners = np.repeat(np.arange(batch.num_rows), lengths)
    gap = np.full(engine.size, np.nan, np.float32)
    # Rows that were not scored are null, and flattening leaves them out: what is left are the scored tokens.
    gap[scored] = batch["sampling_logprobs"].flatten().to_numpy() - engine[scored]
    gaps.completions += batch.num_rows
    gaps.tokens += int(drawn.sum())
    gaps.unscored += int((drawn & ~scored).sum())
    gaps.missing += int((drawn & ~np.isfinite(engine)).sum())
    counted = drawn & np.isfinite(gap)
    if not counted.all():
        gap, engine, position, owners = gap[counted], engine[counted], position[counted], owners[counted]
    if not gap.size:
        return np.full(batch.num_rows, -1.0)
    size = np.abs(gap)
    gaps.compared += gap.size
    gaps.largest = max(gaps.largest, float(size.max()))
    with np.errstate(divide="ignore"):  # a gap of 0 is −inf decades: in the class below all
        scaled = (np.log10(size) - DECADES[0]) * PER_DECADE
    of_gap = np.clip(np.floor(scaled) + 1, 0, CLASSES - 1).astype(np.int64)
    _add(gaps.by_probability, np.searchsorted(np.log(PROBABILITIES[1:-1]), engine, "right"), of_gap)
    _add(gaps.by_position, np.searchsorted(POSITIONS, position, "right") - 1, of_gap)
    rows = np.full(batch.num_rows, -1.0)
    np.maximum.at(rows, owners, size)
    return rows


def _add(counts: np.ndarray, which: np.ndarray, of_gap: np.ndarray) -> None:
    counts += np.bincount(which * CLASSES + of_gap, minlength=counts.size).reshape(counts.shape)


def _batches(path: Path, columns: Sequence[str]) -> "Iterator[tuple[int, pyarrow.RecordBatch]]":
    """First row and batch, over the whole file."""
    import pyarrow as pa
    from pyarrow import parquet

    first = 0
    try:
        file = parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=list(columns)):
            yield first, batch
            first += batch.num_rows
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        expected = "rollouts as a run records them"
        hint = "put a copy of it back"
        raise RunError(f"rollouts {path}", got=got, expected=expected, hint=hint) from error


def _rows_of(path: Path) -> int:
    from pyarrow import parquet

    return parquet.ParquetFile(path).metadata.num_rows


def read_places(places: Sequence[Place]) -> list[dict[str, Any]]:
    """The whole rows of these completions, in their order."""
    wanted: dict[Path, dict[int, int]] = {}
    for order, place in enumerate(places):
        wanted.setdefault(place.path, {})[place.row] = order
    found: dict[int, dict[str, Any]] = {}
    columns = ("step", "sample", "token_ids", *NUMBERS, "reward", "finish_reason", "weight_version")
    for path, rows in wanted.items():
        for first, batch in _batches(path, columns):
            for row, order in rows.items():
                if first <= row < first + batch.num_rows:
                    found[order] = batch.slice(row - first, 1).to_pylist()[0]
    return [found[order] for order in sorted(found)]
