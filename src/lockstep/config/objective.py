"""The recipe's sections on the loss: what is learned from samples, and the words they are told in."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
AdvantageScale = Literal["std", "batch", "none"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
CorrectionName = Literal["none", "tis", "sequence_tis", "masked_is", "geometric_rejection", "sequence_mask"]
KlEstimator = Literal["k1", "k2", "k3", "k1+", "k3+"]


class ConfigSection(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the recipe: every key is known, and none changes."""


class Kl(ConfigSection, frozen=True):
    """The divergence of the policy from a frozen reference, both at the temperature of sampling."""

    coef: NonNegativeFloat = 0.0
    """0: none, and no reference is kept unless the objective needs one."""
    place: Literal["loss", "reward"] = "loss"
    estimator: KlEstimator = "k3"
    """``objectives/regularisers.py``; in the reward its value alone counts."""
    reference: str = ""
    """A model as in ``model.path``; empty: the weights that the run starts from."""


class Objective(ConfigSection, frozen=True):
    """The loss as a function of log-probabilities and advantages."""

    name: str = "grpo"
    """One of ``objectives/registry.py``, or ``module:function``: docs/guides/your-own-objective.md."""
    options: dict[str, Any] = {}
    """Its own keyword arguments: ``objectives/catalogue.py``."""
    clip_low: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.2
    """The ratio is held in [1 − clip_low, 1 + clip_high]; ``inf``: no upper bound."""
    advantage: Literal["auto", "group", "leave_one_out", "batch", "group_batch", "gae"] = "auto"
    """How rewards become advantages: ``objectives/advantages.py``. ``auto``: as the objective has it."""
    advantage_scale: AdvantageScale = "std"
    """``std`` divides by the group's standard deviation (GRPO), ``batch`` by the batch's, ``none`` by nothing
    (Dr. GRPO)."""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number: ``objectives/aggregation.py``."""
    kl: Kl = Kl()
    entropy_coef: NonNegativeFloat = 0.0
    """How much of the mean entropy is taken off the loss."""
    old_logprobs: Literal["trainer", "sampling", "engine"] = "trainer"
    """Denominator of the clipped ratio. ``trainer``, or ``sampling``, which says it: the trainer's under the
    weights that drew the token. ``engine`` skips that pass: the certificate's dividend."""
    correction: CorrectionName = "none"
    """A factor on each token for what is left of a proven backend's mismatch: ``objectives/corrections/``."""
    correction_low: PositiveFloat | None = None
    """None: the published bound of each, ``objectives/corrections/registry.py``."""
    correction_high: PositiveFloat | None = None


class ValueHeadConfig(ConfigSection, frozen=True):
    """For objectives with values: a head on the trainer's hidden states, never published to an engine."""

    lr: PositiveFloat = 1e-3
    """The value head's learning rate; the head begins at 0, and so learns faster than the model."""
    gamma: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """GAE's discount, and its trade of bias for variance."""
    lam: Annotated[float, Meta(ge=0, le=1)] = 0.95
