"""What TRL, verl and PipelineRL call a figure: exported where the formula is the same, refused where not.

TRL 1.16, verl 0.9.1, PipelineRL 58d3934. A quantity of one name and another formula is how two systems come
to be compared that cannot be.
"""

import difflib
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from lockstep.errors import UsageError

System = Literal["trl", "verl", "pipelinerl"]
SYSTEMS: tuple[System, ...] = ("trl", "verl", "pipelinerl")


class Alias(Struct, frozen=True):
    """Another system's name for a quantity."""

    system: System
    name: str
    """As it logs it."""
    ours: str
    """The figure of the catalog that is nearest to it."""
    differs: str = ""
    """How its formula differs; empty where it is the same, and then alone it is exported."""


_AFTER = "the ratio is bounded before it is averaged there; here never"
_MIXED = "its denominator is the engine's: staleness and mismatch are in one number there"
_UNREAD = "a call that cannot be read is none there; here it is one, in vain"
_WHOLE = "it is counted whatever the advantage's sign in both, but averaged over sequences first there"

ALIASES: tuple[Alias, ...] = (
    Alias("trl", "reward", "reward_mean"),
    Alias("trl", "reward_std", "reward_std", "it is by n − 1 there"),
    Alias("trl", "frac_reward_zero_std", "flat_group_fraction"),
    Alias("trl", "completions/mean_length", "completion_tokens_mean"),
    Alias("trl", "completions/clipped_ratio", "truncated_fraction"),
    Alias("trl", "sampling/sampling_logp_difference/mean", "gap_abs_mean_nats"),
    Alias("trl", "sampling/sampling_logp_difference/max", "gap_abs_max_nats"),
    Alias("trl", "sampling/importance_sampling_ratio/mean", "mismatch_ratio_mean", _AFTER),
    Alias("trl", "ratio", "policy_ratio_mean", f"of its asynchronous trainer; {_MIXED}"),
    Alias("trl", "clip_ratio/region_mean", "clip_fraction"),
    Alias("trl", "entropy", "entropy_mean_nats"),
    Alias(
        "trl",
        "kl",
        "reference_kl_k3_nats",
        "k3 to the reference in its synchronous trainer, to the engine's policy in its asynchronous one",
    ),
    Alias("trl", "tools/call_frequency", "tool_calls_mean", _UNREAD),
    Alias("trl", "tools/failure_frequency", "tool_calls_failed_fraction", _UNREAD),
    Alias("trl", "rewards/accuracies", "pair_accuracy"),
    Alias("trl", "rewards/margins", "pair_margin_mean_nats", "it is times beta there"),
    Alias("trl", "grad_norm", "grad_norm"),
    Alias("trl", "learning_rate", "lr"),
    Alias(
        "trl",
        "sample/staleness_mean",
        "lag_steps",
        "it is over samples by their dispatch there, over tokens' version spans here",
    ),
    Alias("verl", "critic/score/mean", "reward_mean"),
    Alias("verl", "response_length/mean", "completion_tokens_mean"),
    Alias(
        "verl",
        "response_length/clip_ratio",
        "truncated_fraction",
        "a completion that stops exactly at the limit counts there",
    ),
    Alias(
        "verl",
        "training/rollout_probs_diff_max",
        "gap_abs_max_nats",
        "it is of probabilities there, of their logarithms here",
    ),
    Alias(
        "verl",
        "training/rollout_probs_diff_mean",
        "gap_abs_mean_nats",
        "it is of probabilities there, of their logarithms here",
    ),
    Alias("verl", "rollout_corr/k3_kl", "mismatch_kl_k3_nats"),
    Alias("verl", "rollout_corr/rollout_is_eff_sample_size", "mismatch_ess", _AFTER),
    Alias("verl", "rollout_corr/rollout_is_mean", "mismatch_ratio_mean", _AFTER),
    Alias("verl", "actor/ppo_kl", "policy_kl_k3_nats", "it is k1, signed, there"),
    Alias("verl", "actor/pg_clipfrac", "clip_fraction", "what the dual clip takes is counted apart there"),
    Alias("verl", "actor/entropy", "entropy_mean_nats", "it is aggregated by loss_agg_mode there"),
    Alias(
        "verl",
        "actor/kl_loss",
        "reference_kl_k3_nats",
        "it is clamped to ±10 and aggregated by loss_agg_mode there",
    ),
    Alias("verl", "actor/grad_norm", "grad_norm"),
    Alias("verl", "actor/lr", "lr"),
    Alias(
        "verl", "critic/vf_explained_var", "value_explained_variance", "1e-5 is added to the variance there"
    ),
    Alias("verl", "critic/vf_loss", "value_loss", "it is the mean over minibatches there"),
    Alias("pipelinerl", "rl/mean_abs_log_ratio_new_old", "gap_abs_mean_nats", _MIXED),
    Alias(
        "pipelinerl",
        "rl/ratio_new_old",
        "policy_ratio_mean",
        f"{_MIXED}; of its objective 'reinforce' after the clamp",
    ),
    Alias("pipelinerl", "rl/kl_new_old", "policy_kl_k3_nats", _MIXED),
    Alias("pipelinerl", "rl/ess", "policy_ess", f"{_MIXED}; of its objective 'reinforce' after the clamp"),
    Alias("pipelinerl", "rl/clamp_log_ratio_new_old_indicator", "outside_clip_fraction", _WHOLE),
    Alias("pipelinerl", "rl/entropy", "entropy_mean_nats", "it is averaged over sequences first there"),
    Alias("pipelinerl", "stats/lag", "lag_steps", "it is in samples there, in versions here"),
    Alias("pipelinerl", "stats/grad_norm", "grad_norm"),
)


def exported(metrics: Mapping[str, float], system: System) -> dict[str, float]:
    """A step's figures under a system's names: those alone whose formula is the same."""
    return {
        alias.name: metrics[alias.ours]
        for alias in ALIASES
        if alias.system == system and not alias.differs and alias.ours in metrics
    }


def alias_named(name: str, system: System | None = None) -> Alias:
    """The alias of a name, to be exported.

    Raises:
        UsageError: for a name that nobody has, and for one whose formula is another; says how it differs.
    """
    known = [alias for alias in ALIASES if system in (None, alias.system)]
    found = next((alias for alias in known if alias.name == name), None)
    if found is None:
        near = difflib.get_close_matches(name, [alias.name for alias in known], n=1)
        raise UsageError(
            "lockstep metrics",
            got=repr(name),
            expected=f"{near[0]!r} perhaps"
            if near
            else "a figure's name, of ours or of TRL, verl, PipelineRL",
            hint="lockstep metrics",
        )
    if found.differs:
        raise UsageError(
            f"alias {found.name} of {found.system}",
            got=f"a formula that is not that of {found.ours}: {found.differs}",
            expected="the same formula under both names",
            hint=f"lockstep metrics {found.ours}",
        )
    return found


def nearest_to(name: str) -> str | None:
    """The figure that is nearest to what another system calls so, whether or not its formula is the same.

    For reading a log whose curves are held against others of the same system. None where none is.
    """
    # A log's reader may have taken the logger's prefix off already (``report/trajectories.py``).
    bare = {alias.name.removeprefix(f"{alias.name.partition('/')[0]}/"): alias.ours for alias in _LOGGED}
    return next((alias.ours for alias in ALIASES if alias.name == name), bare.get(name))


_LOGGED = [alias for alias in ALIASES if alias.name.startswith(("rl/", "actor/", "stats/"))]
