"""What vLLM calls a sample of a request that this worker named: ``1_r7-a4c0``, ``r7``.

The sample's number stands before the request's name where n > 1; later versions add a random part behind it.
"""

import re
from dataclasses import dataclass

INTERNAL = re.compile(r"(?:(\d+)_)?(r\d+)(?:-.*)?")


@dataclass(frozen=True)
class Internal:
    """One sample, as vLLM tells it from others."""

    request: str
    """The worker's name of the request: ``r7``."""
    sample: int
    """0 … n−1."""


def internal_of(name: str) -> Internal | None:
    """What vLLM's name says; None for one that this worker did not give."""
    match = INTERNAL.fullmatch(name)
    return Internal(match[2], int(match[1] or 0)) if match else None
