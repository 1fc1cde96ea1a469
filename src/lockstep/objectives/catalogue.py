"""The objectives that come with Lockstep: the options of each, with defaults and bounds, and what it needs.

A new one is a function in a file of its own, beside ``grpo.py``, its options here (a field is the keyword
argument of the same name) and a line in :data:`OBJECTIVES`. What several objectives, the gate or the figures
share is a key of ``[objective]`` instead. No torch.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta, Struct

from lockstep.config.objective import PositiveFloat

Fraction = Annotated[float, Meta(gt=0, lt=1)]
AtLeast1 = Annotated[float, Meta(ge=1)]


class Options(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options of an objective that has none; the others' are subclasses."""


class GrpoOptions(Options, frozen=True):
    """GRPO; PPO's clipped surrogate."""

    dual_clip: Annotated[float, Meta(gt=1)] = math.inf
    """For a negative advantage the ratio counts up to this; verl's is 3 and always on; ``inf``: no bound."""


class GspoOptions(Options, frozen=True):
    """GSPO."""

    low: Fraction = 3e-4
    """A sequence's ratio is held in [1 − low, 1 + high]; the paper's."""
    high: PositiveFloat = 4e-4


class CispoOptions(Options, frozen=True):
    """CISPO."""

    low: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Bounds of the weight itself, not of its distance from 1; ScaleRL's."""
    high: AtLeast1 = 5.0


class ReinforceOptions(Options, frozen=True):
    """REINFORCE, and RLOO's loss."""

    high: Annotated[float, Meta(ge=0)] = 2.0
    """The policy ratio as a weight counts up to this; 0: no weight."""


class ToprOptions(Options, frozen=True):
    """TOPR."""

    high: AtLeast1 = 1.0
    """What the ratio of a token with a negative advantage counts up to."""


class DppoOptions(Options, frozen=True):
    """DPPO-TV."""

    low: Fraction = 0.2
    """How far the probability of a token may have moved, down and up."""
    high: Fraction = 0.2
    ratio_high: AtLeast1 = 20.0
    """What the ratio as a weight counts up to."""


class PpoOptions(Options, frozen=True):
    """PPO with a value head."""

    value_clip: PositiveFloat = 0.2
    """How far a value may move from what it was when the step began."""
    value_coef: PositiveFloat = 1.0
    """The value loss's weight. The head's gradient is its own alone, so that it scales its learning rate."""


class DpoOptions(Options, frozen=True):
    """Online DPO."""

    beta: PositiveFloat = 0.1
    """How strongly the reference holds."""
    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's own loss, or IPO's, which does not grow without bound."""


class DecoupledOptions(Options, frozen=True):
    """Decoupled PPO."""

    cap: AtLeast1 = 5.0
    """What the staleness as a weight counts up to."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective must be given beyond log-probabilities, advantages and weights."""

    values: bool = False
    """A value head's estimate for each token."""
    reference: bool = False
    """Log-probabilities of a frozen reference model."""
    pairs: bool = False
    """A chosen and a rejected sequence side by side, instead of advantages."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """An objective that comes with Lockstep."""

    function: str
    """``module:function``."""
    options: type[Options] = Options
    keys: tuple[str, ...] = ()
    """The keys of ``[objective]`` that it takes, as keyword arguments of the same names."""
    advantage: str = "group"
    """What ``objective.advantage = "auto"`` is with it."""
    needs: Needs = Needs()


CLIP = ("clip_low", "clip_high")
OURS = "lockstep.objectives."
OBJECTIVES = {
    "grpo": Known(function=f"{OURS}grpo:grpo", options=GrpoOptions, keys=CLIP),
    "gspo": Known(function=f"{OURS}gspo:gspo", options=GspoOptions),
    "cispo": Known(function=f"{OURS}cispo:cispo", options=CispoOptions),
    "reinforce": Known(function=f"{OURS}reinforce:reinforce", options=ReinforceOptions),
    "rloo": Known(function=f"{OURS}reinforce:reinforce", options=ReinforceOptions, advantage="leave_one_out"),
    "reinforce++": Known(function=f"{OURS}grpo:grpo", options=GrpoOptions, keys=CLIP, advantage="batch"),
    "ppo": Known(
        function=f"{OURS}ppo:ppo",
        options=PpoOptions,
        keys=CLIP,
        advantage="gae",
        needs=Needs(values=True),
    ),
    "dpo": Known(function=f"{OURS}dpo:dpo", options=DpoOptions, needs=Needs(reference=True, pairs=True)),
    "topr": Known(function=f"{OURS}topr:topr", options=ToprOptions),
    "dppo_tv": Known(function=f"{OURS}dppo:dppo_tv", options=DppoOptions),
    "decoupled_ppo": Known(
        function=f"{OURS}decoupled_ppo:decoupled_ppo", options=DecoupledOptions, keys=CLIP
    ),
}
