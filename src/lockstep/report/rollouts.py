"""The gap in tables and a histogram, and completions with each token's gap."""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.report.document import Line, Plot, Section, ShownRollout, Table, Token
from lockstep.report.tokens import (
    DECADES,
    PER_DECADE,
    POSITIONS,
    PROBABILITIES,
    GapCounts,
    edges,
    quantile_of,
    read_places,
)
from lockstep.report.vocabulary import read_vocabulary

QUANTILES = (0.5, 0.9, 0.99, 0.999)
TOKENS_SHOWN = 256
"""How many tokens of one completion are shown."""
BARS_PER_DECADE = 8


def gap_section(gaps: GapCounts, lost: str) -> Section:
    """How far trainer and engine are apart: over all tokens, by probability, by position."""
    title = "The gap, trainer − engine"
    if lost:
        return Section(title=title, text=(f"The rollouts: {lost}.",))
    if not gaps.compared:
        return Section(title=title, text=("No token has both log-probabilities: there is no gap to show.",))
    text = [
        f"{gaps.compared:,} of {gaps.tokens:,} tokens in {gaps.completions:,} completions have both numbers; "
        f"{gaps.missing:,} have no finite one of the engine's, {gaps.unscored:,} were not scored.",
        "Every token is counted, in classes of |gap| that are 7 % wide; the largest is exact.",
    ]
    tables = (
        _quantiles("Over all tokens", [("all", gaps.counts)], f"{gaps.largest:.3g}"),
        _quantiles("By the engine's probability of the token", _by_probability(gaps)),
        _quantiles("By the token's place in the completion", _by_position(gaps)),
    )
    return Section(title=title, text=tuple(text), tables=tables, plots=(_histogram(gaps),))


def _quantiles(title: str, rows: Sequence[tuple[str, np.ndarray]], largest: str = "") -> Table:
    columns = ("tokens", "how many", *(f"p{100 * share:g}" for share in QUANTILES))
    cells = [
        (name, f"{int(counts.sum()):,}", *(f"{quantile_of(counts, share):.2g}" for share in QUANTILES))
        for name, counts in rows
        if counts.sum()
    ]
    if largest:
        columns = (*columns, "largest")
        cells = [(*row, largest) for row in cells]
    return Table(title=title, columns=columns, rows=tuple(cells), note="|gap| in nats")


def _by_probability(gaps: GapCounts) -> list[tuple[str, np.ndarray]]:
    names = [f"{low:g} to {high:g}" for low, high in pairwise(PROBABILITIES)]
    return list(zip(names, gaps.by_probability, strict=True))


def _by_position(gaps: GapCounts) -> list[tuple[str, np.ndarray]]:
    ends = [*POSITIONS[1:], None]
    names = [
        f"{first} on" if end is None else str(first) if end == first + 1 else f"{first} to {end - 1}"
        for first, end in zip(POSITIONS, ends, strict=True)
    ]
    return list(zip(names, gaps.by_position, strict=True))


def _histogram(gaps: GapCounts) -> Plot:
    """Share of tokens by |gap|, in eighths of a decade, from the first that has any to the last."""
    upper = edges()
    counts = gaps.counts[1:-1]
    together = PER_DECADE // BARS_PER_DECADE
    wide = counts.reshape(-1, together).sum(1)
    ends = upper[::together]
    middles = np.sqrt(ends[:-1] * ends[1:])
    there = np.flatnonzero(wide)
    low, high = (there[0], there[-1] + 1) if there.size else (0, len(wide))
    share = wide[low:high] / max(gaps.compared, 1)
    below = f" ({int(gaps.counts[0]):,} below {10.0 ** DECADES[0]:g})" if gaps.counts[0] else ""
    line = Line(name="share of tokens", ys=tuple(share.tolist()))
    return Plot(
        title=f"Tokens by |gap|{below}",
        unit="1",
        x_label="|gap|, nats",
        xs=tuple(middles[low:high].tolist()),
        lines=(line,),
        log_x=True,
    )


def rollouts_section(gaps: GapCounts, model: Path, lost: str) -> Section | None:
    """The completions with the largest gaps, and some from all over the run."""
    if lost or not gaps.shown:
        return None
    vocabulary = read_vocabulary(model)
    rows = read_places(gaps.shown)
    worst = sum(not isnan(place.worst) for place in gaps.shown)  # the others are picked, not measured
    chosen = f"{len(rows) - worst} from all over the run"
    if worst:
        chosen = f"{worst} with the largest |gap| and {chosen}"
    text = [
        f"{chosen}, of {gaps.completions:,}: a sample, chosen so.",
        "Each token is tinted by its |gap| against the largest of its completion, which is told above it: a "
        "strong tint alone is no large gap. What a reader would obey instead of seeing (control characters, "
        "turns of the writing's direction) is shown as its escape.",
    ]
    if vocabulary.why_not:
        text.append(vocabulary.why_not)
    rollouts = tuple(_rollout(row, vocabulary.text) for row in rows)
    return Section(title="Rollouts", text=tuple(text), rollouts=rollouts)


def _rollout(row: dict[str, Any], text_of: Any) -> ShownRollout:
    engine, trainer = row["engine_logprobs"], row["sampling_logprobs"]
    n = len(engine)
    trainer = trainer if trainer is not None else [float("nan")] * n
    tokens = [
        Token(text=text_of(token), engine=a, trainer=c)
        # Not strict: the ids alone are cut to those that are shown.
        for token, a, c in zip(row["token_ids"][:TOKENS_SHOWN], engine, trainer, strict=False)
    ]
    gaps = [abs(token.trainer - token.engine) for token in tokens]
    largest = max((gap for gap in gaps if isfinite(gap)), default=nan)
    facts = (
        ("largest |gap|", "not scored" if isnan(largest) else f"{largest:.2g} nats"),
        ("reward", f"{row['reward']:g}"),
        ("tokens", f"{n}"),
        ("ended by", str(row["finish_reason"])),
        ("weights of version", str(row["weight_version"])),
    )
    title = f"Step {row['step'] + 1}, completion {row['sample']}"
    return ShownRollout(title=title, facts=facts, tokens=tuple(tokens), left_out=max(0, n - TOKENS_SHOWN))
