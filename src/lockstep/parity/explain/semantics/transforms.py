"""Layer 1: numbers that are a function of the right ones: another base of the logarithm, a running sum, a
coarser number format.

Each function is applied to score B, the same engine's re-score of the same tokens; one under which A agrees
to within arithmetic, where A itself does not, is the explanation. What the function needs (a factor, a floor,
a grid) is fitted.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from lockstep.metrics.reduce import quantiles_abs
from lockstep.parity.evidence import within
from lockstep.parity.explain.rows import rows_of
from lockstep.parity.search_tolerances import EXPLAINS, LEAST_REPLACED, ON_GRID, ROUNDINGS
from lockstep.parity.tolerances import Tolerance

BASES = {"log10": 1.0 / np.log(10.0), "log2": 1.0 / np.log(2.0), "the sign turned": -1.0}
DECIMALS = (1, 2, 3)


def transform(engine: np.ndarray, rescored: np.ndarray, owners: np.ndarray, noise: Tolerance) -> str | None:
    """What was done to the numbers, for people; None when they are right, or nothing that was tried explains
    them.

    Args:
        engine: score A, float32 [T].
        rescored: score B, float32 [T].
        owners: int [T], the completion of each.
        noise: what arithmetic may bring between two computations of one number.
    """
    if not np.isfinite(engine).all() or not np.isfinite(rescored).all() or within(noise, engine - rescored):
        return None
    tail = quantiles_abs(engine - rescored)["p999"]
    for name, values in _functions(engine, rescored, owners):
        # Within arithmetic, and far better than untransformed: numbers near 0 are near many functions of
        # themselves.
        if within(noise, engine - values) and quantiles_abs(engine - values)["p999"] <= EXPLAINS * tail:
            return name
    return _grid(engine, rescored, noise)


def _functions(a: np.ndarray, b: np.ndarray, owners: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for name, factor in BASES.items():
        yield f"{name}, times {factor:.3f}", factor * b
    yield "probabilities and not their logarithms", np.exp(b)
    yield "running sums over the completion", _by_row(b, owners, np.cumsum)
    yield (
        "the completion's sum beside each of its tokens",
        _by_row(b, owners, lambda row: np.full_like(row, row.sum())),
    )
    yield (
        "the completion's mean beside each of its tokens",
        _by_row(b, owners, lambda row: np.full_like(row, row.mean())),
    )
    yield f"{a.mean():.3g} for each", np.full_like(b, a.mean())
    yield "the row in reverse order", _by_row(b, owners, lambda row: row[::-1])
    yield f"none below a floor of {a.min():.3g}", np.maximum(b, a.min())
    yield f"none above a ceiling of {a.max():.3g}", np.minimum(b, a.max())
    yield f"{np.median(a - b):+.3g} to each", b + np.median(a - b)
    yield from _beyond(a, b)
    # Last: a factor that is fitted would explain another base too, without its name.
    factor = float(a @ b / max(b @ b, 1e-30))
    yield f"times {factor:.3f}", factor * b


def _beyond(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Numbers below, or above, some value that are replaced by one constant."""
    for side, order in (("below", np.argsort(b)), ("above", np.argsort(-b))):
        # In the order of the right numbers, those that were replaced come first, and all are one value.
        same = a[order] == a[order[0]]
        count = len(same) if same.all() else int(same.argmin())
        if LEAST_REPLACED <= count < len(a):
            changed = b.copy()
            changed[order[:count]] = a[order[0]]
            yield f"{a[order[0]]:.3g} in the place of each {side} {b[order[count]]:.3g}", changed


def _by_row(values: np.ndarray, owners: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([change(row) for row in rows_of(values, owners)])


def _grid(a: np.ndarray, b: np.ndarray, noise: Tolerance) -> str | None:
    """Every number lies on a grid that the right ones do not lie on, and next to its own."""
    rounded = {f"rounded to {n} decimals": lambda x, n=n: np.round(x, n) for n in DECIMALS}
    rounded |= {
        f"rounded to {str(t).removeprefix('torch.')}": _as(t) for t in (torch.bfloat16, torch.float16)
    }
    for name, to_grid in rounded.items():
        step = np.abs(to_grid(b) - b).max()
        on_it = (
            np.isclose(a, to_grid(a), rtol=0.0, atol=ON_GRID).all()
            and not np.isclose(b, to_grid(b), rtol=0.0, atol=ON_GRID).all()
        )
        if on_it and np.abs(a - b).max() <= ROUNDINGS * step + noise.p50:
            return name
    return None


def _as(dtype: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: torch.from_numpy(x.copy()).to(dtype).float().numpy()
