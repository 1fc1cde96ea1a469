"""Numbers of a log that are none of their tokens: placeholders, tokens that nobody sampled, numbers of other
completions.

All of these strike some tokens and leave the others right, so that no median shows them. They are told by
what the tokens that are off have in common: one and the same value, where they stand, or that their rows'
numbers know nothing of their rows' tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from msgspec.structs import replace

from lockstep.logged.rows import Logged
from lockstep.parity.evidence import within
from lockstep.parity.explain.path.corruption import SHOWN, SHOWN_CHARACTERS, Corrupted
from lockstep.parity.explain.rows import Explanation
from lockstep.parity.explain.semantics.sampler import distributions, examine_draws, likeliest_temperature
from lockstep.parity.pair import Pair
from lockstep.parity.search_tolerances import (
    IMPROBABLE_NATS,
    LONG_RUN,
    MOST_ROWS,
    ONE_VALUE,
    PLAUSIBLE_NATS,
    RIGHT_TOKENS,
    STRUCK,
    UNRELATED,
)
from lockstep.parity.tolerances import ABSURD_NATS, Tolerance
from lockstep.records.samples import Samples
from lockstep.training.trainer import Trainer

SHOWN_ROWS = 8
LOOKED_AT = 64
"""Rows that are off."""
HEAD = 8
"""Numbers of a row by which it is looked for in the file."""


@dataclass(eq=False)
class Gaps:
    """The judged tokens of some rows: arrays of T."""

    engine: np.ndarray
    """What the log says, nats."""
    gap: np.ndarray
    """trainer − engine, nats."""
    owners: np.ndarray
    """The row of each token, counted from 0."""
    places: np.ndarray
    """Where in the completion, tokens that were not sampled counted too."""
    lengths: np.ndarray
    """Tokens of each row's completion, by row and not by token."""

    @property
    def trainer(self) -> np.ndarray:
        """What the trainer says, nats."""
        return self.engine + self.gap

    def shares_off(self, limit: float) -> np.ndarray:
        """The share of each row's tokens that is off by more, float64 [R]."""
        n = len(self.lengths)
        # Negated: a number that is missing is off.
        off = np.bincount(self.owners, ~(np.abs(self.gap) <= limit), n)
        return off / np.maximum(np.bincount(self.owners, minlength=n), 1)


def of_few(few: Samples, trainer: np.ndarray) -> Gaps:
    """The tokens that hypotheses are tried on."""
    return Gaps(few.engine_logprobs, trainer - few.engine_logprobs, few.owners, few.positions, few.lengths)


def of_all(logged: Logged, rows: np.ndarray, gap: np.ndarray) -> Gaps:
    """All tokens of some rows."""
    judged = logged.judged(rows)
    owners = np.repeat(np.arange(len(rows), dtype=np.int32), logged.counts(rows))
    places = (judged - logged.spans[rows, 0][owners]).astype(np.int32)
    return Gaps(logged.logprobs[judged], gap, owners, places, np.diff(logged.spans[rows])[:, 0])


def placeholders(gaps: Gaps, noise: Tolerance) -> Explanation | None:
    """One value that most tokens which are off carry, while the others are right."""
    off = ~(np.abs(gaps.gap) <= noise.p999)
    if not off.any():
        return None
    values, counts = np.unique(gaps.engine[off], return_counts=True)
    value = values[counts.argmax()]
    same = gaps.engine == value
    wrong = off & same
    rest = np.abs(gaps.gap[~same])
    scores = gaps.trainer[wrong]
    # By a floor, which is another cause.
    clipped = value == gaps.engine.min() and value != 0.0 and (scores < value).all()
    rows = np.unique(gaps.owners[wrong])
    if clipped or rest.size < RIGHT_TOKENS or (rows.size < 2 and value != 0.0):
        return None
    run = _runs(gaps, same)  # of each token
    right = counts.max() >= ONE_VALUE * off.sum() and np.median(rest) <= noise.p50
    long = value == 0.0 and np.median(run[wrong]) >= LONG_RUN and np.median(scores) <= IMPROBABLE_NATS
    if not right and not long:
        return None
    beside = (
        f"the number {value:g}, and the trainer gives them {np.median(scores):.1f} nats (median); "
        f"the other {rest.size:,} are {np.median(rest):.1e} nats off (median)"
    )
    where = f"in {rows.size:,} of {len(gaps.lengths):,} completions"
    if (run[wrong] > 1).mean() >= MOST_ROWS:
        text = (
            f"{wrong.sum():,} of {wrong.size:,} tokens {where} carry {beside}; "
            f"they stand in runs of up to {run[wrong].max():,}"
        )
        return Explanation("tokens_not_sampled", text)
    name, place = _standing(gaps, wrong)
    if name:
        where = f"{name} of {np.count_nonzero(same & place):,} of {len(gaps.lengths):,} completions"
    return Explanation("placeholder_numbers", f"{where}: {wrong.sum():,} tokens carry {beside}")


def _runs(gaps: Gaps, same: np.ndarray) -> np.ndarray:
    """How many tokens that are alike stand together, for each of them; 0 for others. int [T]"""
    together = same[1:] & same[:-1] & (gaps.owners[1:] == gaps.owners[:-1]) & (np.diff(gaps.places) == 1)
    numbers = np.cumsum(np.r_[True, ~together])  # of each token's run, from 1
    return np.where(same, np.bincount(numbers)[numbers], 0)


def _standing(gaps: Gaps, wrong: np.ndarray) -> tuple[str, np.ndarray]:
    """Where what is wrong stands, for people and as bool [T]."""
    places = {
        "the last number": gaps.places == gaps.lengths[gaps.owners] - 1,
        "the first number": gaps.places == 0,
    }
    return next(
        ((name, place) for name, place in places.items() if place[wrong].mean() >= ONE_VALUE), ("", wrong)
    )


@dataclass(frozen=True)
class SomeRows:
    """Rows that are off where the others are right."""

    rows: np.ndarray
    """Counted from 0."""
    plausible: bool
    """Their tokens are draws of the model after their prompts."""
    related: bool
    """Their numbers go with the scores of their tokens."""


def some_rows(pair: Pair, logged: Logged, rows: np.ndarray, gaps: Gaps) -> SomeRows | None:
    """A minority of rows that are off, the others being right."""
    off = np.flatnonzero(gaps.shares_off(pair.noise.p999) > STRUCK)
    if (
        not off.size
        or off.size > MOST_ROWS * len(rows)
        or not within(pair.noise, gaps.gap[~np.isin(gaps.owners, off)])
    ):
        return None
    few = off[:LOOKED_AT]
    turns = logged.turns(rows[few], 256)
    chosen = np.isin(gaps.owners, few)
    engine = gaps.engine[chosen]
    trainer = gaps.trainer[chosen]
    spread = engine.std() * trainer.std()
    related = (
        spread > 0.0
        and float(((engine - engine.mean()) * (trainer - trainer.mean())).mean()) >= UNRELATED * spread
    )
    draws = examine_draws(pair.trainer, turns.groups, turns.sampling)
    return SomeRows(off, draws.excess_nats > PLAUSIBLE_NATS, bool(related))


def rows_off(parts: Sequence[tuple[Logged, np.ndarray, Gaps]], noise: Tolerance) -> str:
    """Where a minority of the rows holds all that is off: which they are, for people; else empty."""
    off = [logged.numbers[rows[gaps.shares_off(noise.p999) > 0.0]] for logged, rows, gaps in parts]
    odd = np.sort(np.concatenate(off))
    n = sum(len(rows) for _, rows, _ in parts)
    if not 0 < odd.size <= MOST_ROWS * n:
        return ""
    shown = ", ".join(map(str, odd[:SHOWN_ROWS])) + (", …" if odd.size > SHOWN_ROWS else "")
    return (
        f"; every token that is off by more than {noise.p999:g} lies in {odd.size:,} of {n:,} completions, "
        f"in the file's row {shown}"
    )


def foreign(pair: Pair, gaps: Gaps, some: SomeRows) -> Explanation | None:
    """Rows whose tokens are the model's own draws, and whose numbers are of other tokens."""
    if not some.plausible or some.related:
        return None
    if np.median(np.abs(gaps.gap[np.isin(gaps.owners, some.rows)])) <= pair.noise.p50:
        return None  # most of their numbers are their tokens' own: it is a few that are not
    starts = np.r_[0, np.cumsum(np.bincount(gaps.owners, minlength=len(gaps.lengths)))]
    heads = np.full((len(gaps.lengths), HEAD), np.nan, np.float32)
    trainer = gaps.trainer
    for row, (start, stop) in enumerate(
        zip(starts, np.minimum(starts[1:], starts[:-1] + HEAD), strict=False)
    ):
        heads[row, : stop - start] = trainer[start:stop]
    looked = some.rows[:LOOKED_AT]
    n_foreign = 0
    for row in looked:
        numbers = gaps.engine[starts[row] : min(starts[row + 1], starts[row] + HEAD)]
        # A row with fewer numbers holds NaN, which is within nothing.
        with np.errstate(invalid="ignore"):
            n_foreign += bool((np.abs(heads[:, : len(numbers)] - numbers).max(1) <= pair.noise.p999).any())
    text = (
        f"the numbers of {some.rows.size:,} of {len(gaps.lengths):,} completions "
        "do not go with their tokens, which are draws"
    )
    if n_foreign >= MOST_ROWS * looked.size:
        return Explanation(
            "rows_swapped", f"{text}; {n_foreign} of {looked.size} that were looked for are another row's"
        )
    return Explanation(
        "foreign_logprobs",
        f"{text}; {n_foreign} of {looked.size} that were looked for are another row's of this file",
    )


def corrupted(pair: Pair, logged: Logged, rows: np.ndarray, gaps: Gaps) -> Corrupted | None:
    """Completions with absurd tokens, where they are a minority and the others agree (``corruption.py``)."""
    absurd = (-gaps.gap > ABSURD_NATS) & (gaps.engine <= pair.noise.p999)  # above 0 the number is absurd
    struck = np.unique(gaps.owners[absurd])
    if not struck.size or struck.size > MOST_ROWS * len(rows):
        return None
    rest = np.abs(gaps.gap)[~np.isin(gaps.owners, struck)]
    if not np.median(rest) <= pair.noise.p50:
        return None
    shown = [
        ascii(pair.renderer.text(logged.completion(row))[:SHOWN_CHARACTERS]) for row in rows[struck[:SHOWN]]
    ]
    return Corrupted(struck.tolist(), len(rows), int(absurd.sum()), ", ".join(shown))


@torch.no_grad()
def not_greedy(trainer: Trainer, few: Samples, noise: Tolerance) -> str:
    """How far the tokens are from what temperature 0 draws, which is the likeliest; empty when they are
    that."""
    sampling = replace(few.sampling, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    short = [
        z.max(-1).values - z.gather(1, ids[:, None])[:, 0]
        for z, ids in distributions(trainer, few.groups, sampling)
    ]
    behind = torch.cat(short)
    n = int((behind > noise.p999).sum())
    if not n:
        return ""
    near = likeliest_temperature(trainer, few.groups, sampling)
    return (
        f"temperature 0 draws the likeliest token, and {n:,} of {behind.numel():,} are not that, by up to "
        f"{float(behind.max()):.1f} nats; they are likeliest at a temperature of about {near:.1g}"
    )
