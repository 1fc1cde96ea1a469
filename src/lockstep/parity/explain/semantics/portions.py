"""Layer 1: which rows does an explanation speak of? Where it is not all of them, they are split and told
apart.

A file may hold rows drawn under two settings and say so of none; a server may edit long prompts alone. Then
no hypothesis explains the whole, and one explains the rows that are off.
"""

import numpy as np

from lockstep.parity.explain.semantics.held import Held
from lockstep.parity.explain.semantics.sampler import TEMPERATURES, Explained, fitted_temperature
from lockstep.parity.search_tolerances import MOST_TEMPERATURES, OFF_QUANTILE, TEMPERATURES_APART
from lockstep.records.samples import Samples

ROW_TOKENS = 6
"""Tokens of each row to which a temperature of its own is fitted."""
SHOWN = 8


def rows_off(sample: Samples, gap: np.ndarray, limit: float) -> np.ndarray:
    """Rows with a fifth of their numbers beyond ``limit``: int [R]. ``gap``: float32 [T]."""
    size = np.nan_to_num(np.abs(gap), nan=np.inf)
    # One of the numbers themselves: between an infinite one and its neighbour an interpolation is NaN.
    quantiles = [
        np.quantile(size[sample.owners == row], OFF_QUANTILE, method="higher") for row in range(len(sample))
    ]
    return np.flatnonzero(np.array(quantiles) > limit)


def where(sample: Samples, rows: np.ndarray) -> str:
    """Which rows they are, for people: by their lengths, where these tell them from the others."""
    count = f"{len(rows)} of {len(sample)} rows"
    inside = np.isin(np.arange(len(sample)), rows)
    if inside.all():
        return f"all {len(sample)} rows"
    for what, values in (
        ("prompts", np.array([len(prompt) for prompt in sample.prompts])),
        ("completions", np.bincount(sample.owners, minlength=len(sample))),
    ):
        least, most = values[inside].min(), values[inside].max()
        if least > values[~inside].max():
            return f"{count}, those with {what} of {least} tokens or more"
        if most < values[~inside].min():
            return f"{count}, those with {what} of {most} tokens or fewer"
    shown = ", ".join(str(row + 1) for row in rows[:SHOWN])
    return f"{count} ({shown}{', …' if len(rows) > SHOWN else ''})"


def places_of_rows(sample: Samples) -> np.ndarray:
    """The first tokens of each row: int [N]."""
    return np.flatnonzero(sample.positions < ROW_TOKENS)


def temperatures_of_rows(sample: Samples, held: Held, owners: np.ndarray, limit: float) -> Explained | None:
    """Temperatures that explain each row by one of them; None where they do not.

    Args:
        held: the tokens of :func:`places_of_rows`.
        owners: the row of each of them, int [N].
        limit: a row is explained when half of its numbers are missed by at most this, nats.
    """
    ids = held.ids[:, None]
    rest = np.arange(len(sample))
    named = []
    misses = [
        ((held.logits / t).log_softmax(-1).gather(1, ids)[:, 0] - held.engine).abs() for t in TEMPERATURES
    ]
    # [R, grid]
    by_row = np.array([[float(m[np.flatnonzero(owners == row)].median()) for m in misses] for row in rest])
    worst = 0.0
    while len(rest) and len(named) < MOST_TEMPERATURES:
        nearest = by_row[rest].argmin(1)
        common = int(np.bincount(nearest).argmax())
        # A row's few tokens place its temperature on the grid to a step or so.
        chosen = rest[np.abs(nearest - common) <= 1]
        at = np.flatnonzero(np.isin(owners, chosen))
        temperature, _ = fitted_temperature(held.logits[at], held.ids[at], held.engine[at])
        left = ((held.logits / temperature).log_softmax(-1).gather(1, ids)[:, 0] - held.engine).abs()
        off = np.array([float(left[np.flatnonzero(owners == row)].median()) for row in rest])
        fit = rest[off <= limit]
        if not len(fit):
            return None
        worst = max(worst, float(off[off <= limit].max()))
        named.append((temperature, fit))
        rest = np.setdiff1d(rest, fit)
    asked = sample.temperature
    if len(rest) or len(named) < 2:  # one temperature for all rows was tried before
        return None
    others = [(t, rows) for t, rows in named if abs(np.log(t / asked)) > TEMPERATURES_APART]
    text = " and ".join(f"temperature {t:.3g} in {where(sample, rows)}" for t, rows in others)
    return Explained("temperature_altered", text, worst) if others else None
