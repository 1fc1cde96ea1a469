"""What an explanation is, and rows of one sample: the values of each completion."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Explanation:
    """What explains a gap."""

    cause: str
    """Its name in ``parity/causes.py``."""
    evidence: str


def rows_of(values: np.ndarray, owners: np.ndarray) -> list[np.ndarray]:
    """The values of each completion."""
    return [values[owners == i] for i in np.unique(owners)]


def off(a: np.ndarray, b: np.ndarray, limit: float) -> bool:
    """True when two rows do not agree in the median."""
    # ``not … <=`` and never ``>``, here and wherever a number decides: a NaN must not pass.
    return not np.median(np.abs(a - b)) <= limit
