"""The catalog of figures. A name that is not here cannot be written to a run.

Sign and words are fixed once: ``gap = trainer_logprob − engine_logprob``; the *mismatch ratio* is exp(gap) at
the weights that sampled, the *policy ratio* is what an optimizer step changed since. ``aliases`` are the
names other systems use for it.
"""

from typing import Literal

from msgspec import Struct

Unit = Literal["nats", "1", "tokens", "samples", "s", "tokens/s", "samples/s", "steps"]


class Metric(Struct, frozen=True):
    """One figure of a training step."""

    name: str
    unit: Unit
    estimator: str
    """How it is computed, over what."""
    nan_rule: str = "non-finite tokens make it non-finite"
    aliases: tuple[str, ...] = ()


_ALL = "all completion tokens of the step"
_SAMPLED = "all completion tokens of the step, each scored under the weights that sampled it"
_NONE = "cannot be non-finite"

METRICS: tuple[Metric, ...] = (
    Metric(
        "reward_mean",
        "1",
        "mean over completions",
        "a non-finite reward stops the run",
        ("reward", "rewards/mean"),
    ),
    Metric(
        "reward_std",
        "1",
        "standard deviation over completions",
        "a non-finite reward stops the run",
        ("reward_std",),
    ),
    Metric(
        "flat_group_fraction",
        "1",
        "groups whose rewards are all equal, so that they teach nothing",
        _NONE,
        ("frac_reward_zero_std",),
    ),
    Metric("completion_tokens_mean", "tokens", "mean over completions", _NONE, ("completions/mean_length",)),
    Metric(
        "truncated_fraction",
        "1",
        "completions that ended at max_tokens",
        _NONE,
        ("completions/clipped_ratio",),
    ),
    Metric("n_tokens", "tokens", "completion tokens of the step", _NONE),
    Metric("n_samples", "samples", "completions of the step", _NONE),
    Metric("missing_logprobs", "tokens", "tokens without a finite engine log-probability", "counts them"),
    Metric(
        "gap_abs_mean_nats", "nats", f"mean |gap| over {_SAMPLED}", aliases=("mean_abs_log_ratio_new_old",)
    ),
    Metric("gap_abs_p50_nats", "nats", f"median |gap| over {_SAMPLED}"),
    Metric("gap_abs_p999_nats", "nats", f"0.999 quantile of |gap| over {_SAMPLED}"),
    Metric(
        "gap_abs_max_nats",
        "nats",
        f"largest |gap| over {_SAMPLED}",
        aliases=("sampling/sampling_logp_difference/max",),
    ),
    Metric(
        "mismatch_ratio_mean",
        "1",
        f"mean of exp(gap) over {_SAMPLED}",
        aliases=("sampling/importance_sampling_ratio/mean",),
    ),
    Metric(
        "mismatch_kl_k3_nats",
        "nats",
        f"k3, mean of exp(gap) − gap − 1, over {_SAMPLED}",
        aliases=("mismatch_kl",),
    ),
    Metric("mismatch_ess", "1", f"(Σr)² / (n Σr²), r = exp(gap), over {_SAMPLED}", aliases=("ess",)),
    Metric(
        "phantom_clip_fraction",
        "1",
        f"tokens whose mismatch ratio alone lies outside the clip range, over {_SAMPLED}",
    ),
    Metric("policy_ratio_mean", "1", f"mean of exp(now − old) over {_ALL}", aliases=("ratio_new_old",)),
    Metric(
        "policy_kl_k3_nats", "nats", f"k3 of now against old over {_ALL}", aliases=("kl_new_old", "approx_kl")
    ),
    Metric("policy_ess", "1", f"(Σr)² / (n Σr²), r = exp(now − old), over {_ALL}"),
    Metric(
        "clip_fraction", "1", f"tokens whose gradient the clip removes, over {_ALL}", aliases=("clip_ratio",)
    ),
    Metric(
        "outside_clip_fraction",
        "1",
        f"tokens whose policy ratio lies outside the clip range, whatever the advantage's sign, over {_ALL}",
        aliases=("clamp_log_ratio_new_old_indicator",),
    ),
    Metric(
        "entropy_mean_nats",
        "nats",
        f"mean exact entropy of the tempered full vocabulary over {_ALL}",
        aliases=("entropy",),
    ),
    Metric(
        "loss", "1", "the objective's value, summed over its minibatches", "a non-finite loss stops the run"
    ),
    Metric(
        "grad_norm", "1", "L2 norm before clipping, mean over minibatches", "a non-finite norm stops the run"
    ),
    Metric("lr", "1", "learning rate of the step", _NONE, ("learning_rate",)),
    Metric(
        "canary_gap_abs_max_nats",
        "nats",
        "largest |trainer − engine| over the canary after the step's sync, at T = 1",
    ),
    Metric(
        "canary_shift_abs_mean_nats",
        "nats",
        "mean change of the trainer's own canary scores by the step: what a stale engine would show",
    ),
    Metric(
        "unproven_syncs",
        "steps",
        "syncs since the last one that a proof covers, this one included; 0 when it is proven",
        _NONE,
    ),
    Metric(
        "update_missing_share",
        "1",
        "share of the update since the last proven version that the engine lacks, as the step's tokens say",
        "absent where the canary proves",
    ),
    Metric(
        "update_missing_error",
        "1",
        "how far chance may have moved that share (4 standard errors, by prompt)",
        "absent where the canary proves",
    ),
    Metric(
        "update_tensors",
        "1",
        "tensors that were each asked whether they stayed behind since all were proven",
        "absent where the canary proves",
    ),
    Metric(
        "update_tensors_seen",
        "1",
        "of those, how many would have been suspected with a chance of 99 % had they stayed behind",
        "absent where the canary proves",
    ),
    Metric(
        "update_suspicions",
        "1",
        "1 where the step's tokens pointed to a tensor that stayed behind, and an experiment was made",
        "absent where the canary proves",
    ),
    Metric(
        "delivery_s", "s", "wall time of that proof: the trainer's scores under the version before", _NONE
    ),
    Metric(
        "lag_steps",
        "steps",
        "optimizer steps between sampling and training, mean over tokens",
        _NONE,
        ("stats/lag",),
    ),
    Metric("sample_s", "s", "wall time of sampling", _NONE),
    Metric("reward_s", "s", "wall time of scoring completions", _NONE),
    Metric("train_s", "s", "wall time of forward, backward and optimizer", _NONE),
    Metric(
        "sync_s",
        "s",
        "wall time of publishing and loading weights, the trainer scoring the canary meanwhile",
        _NONE,
    ),
    Metric(
        "canary_s", "s", "wall time of the canary after that: the engine's scores and the comparison", _NONE
    ),
    Metric("step_s", "s", "wall time of the whole step", _NONE),
    Metric("tokens_per_s", "tokens/s", "completion tokens over the step's wall time", _NONE),
    Metric("samples_per_s", "samples/s", "completions over the step's wall time", _NONE),
)

BY_NAME = {metric.name: metric for metric in METRICS}
ALIASES = {alias: metric.name for metric in METRICS for alias in metric.aliases}
