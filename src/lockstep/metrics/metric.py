"""What a figure of the catalog says of itself."""

from typing import Literal

from msgspec import Struct

Unit = Literal["nats", "1", "tokens", "samples", "s", "tokens/s", "samples/s", "steps"]


class Metric(Struct, frozen=True, kw_only=True):
    """One figure of a training step."""

    name: str
    unit: Unit
    formula: str = ""
    estimator: str
    """How it is computed, over what."""
    reduction: str = ""
    """How many numbers become one."""
    mask: str = ""
    """The tokens or samples that it is taken over."""
    clipping: str = ""
    """``before`` or ``after`` anything bounds the ratio; empty: it is of none."""
    denominator: str = ""
    """Whose log-probability stands below the ratio; empty: it is of none."""
    nan_rule: str = "non-finite tokens make it non-finite"
