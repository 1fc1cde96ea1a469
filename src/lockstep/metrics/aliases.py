"""What TRL, verl and PipelineRL call a figure: exported where the formula is the same, refused where not.

TRL 1.16, verl 0.9.1, PipelineRL 58d3934. A quantity of one name and another formula is how two systems come
to be compared that cannot be. Where the formula is the same under some recipes alone, it is exported under
those alone.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from lockstep.config.recipe import Recipe
from lockstep.errors import UsageError

System = Literal["trl", "verl", "pipelinerl"]
SYSTEMS: tuple[System, ...] = ("trl", "verl", "pipelinerl")


class Condition(Struct, frozen=True):
    """The recipes under which a formula is the same."""

    said: str
    """What people are told behind *with*."""
    holds: Callable[[Recipe], bool]


class Alias(Struct, frozen=True):
    """Another system's name for a quantity."""

    system: System
    name: str
    """The figure's name as the other logs it."""
    ours: str
    """The figure of the catalog that is nearest to it; empty: none measures the same, and it is refused."""
    differs: str = ""
    """How its formula differs; empty where it is the same, and then alone it is exported."""
    only: Condition | None = None
    """None: the formula is the same under every recipe."""

    @property
    def told(self) -> str:
        """Whether it is exported, and if not, how it differs: to people."""
        if self.differs:
            return f"refused: {self.differs}"
        return f"exported with {self.only.said}" if self.only is not None else "exported"


def _clips_plainly(recipe: Recipe) -> bool:
    objective = recipe.objective
    plain = math.isinf(objective.options.get("dual_clip", math.inf))
    return objective.name in ("grpo", "reinforce++", "ppo") and plain and objective.old_logprobs != "engine"


_PLAIN_CLIP = Condition(
    "objective.name grpo, reinforce++ or ppo, no dual_clip, and the trainer's old_logprobs", _clips_plainly
)
_ONE_TURN = Condition("tasks of one turn", lambda recipe: not recipe.task.environment)
_OWN_STOPS = Condition(
    "no sampling.stop_token_ids, and tasks of one turn",
    lambda recipe: not (recipe.sampling.stop_token_ids or recipe.task.environment),
)
_AFTER = "the ratio is bounded before it is averaged there; here never"
_MIXED = "its denominator is the engine's: staleness and mismatch are in one number there"
_UNREAD = "a call that cannot be read is none there; here it is one, in vain"
_WHOLE = "it is counted whatever the advantage's sign in both, but averaged over sequences first there"
_SIDE = "it is of one side of the clip alone there"
_SPREAD = "it is the shortest or the longest there; here the mean alone is kept"
_ENDED = "it is over the completions that ended with the end token alone there"
_PROBABILITIES = "it is of probabilities there, of their logarithms here"
_BOUNDS = "it is of the ratios after their bound, or of what the bound takes, there"

ALIASES: tuple[Alias, ...] = (
    Alias("trl", "reward", "reward_mean"),
    Alias("trl", "reward_std", "reward_std", "it is by n − 1 there"),
    Alias("trl", "frac_reward_zero_std", "flat_group_fraction"),
    Alias("trl", "completions/mean_length", "completion_tokens_mean"),
    Alias("trl", "completions/min_length", "", _SPREAD),
    Alias("trl", "completions/max_length", "", _SPREAD),
    Alias("trl", "completions/mean_terminated_length", "", _ENDED),
    Alias("trl", "completions/min_terminated_length", "", _ENDED),
    Alias("trl", "completions/max_terminated_length", "", _ENDED),
    # There it asks whether the last token is the end token's or a pad, whatever made the sampler stop.
    Alias("trl", "completions/clipped_ratio", "truncated_fraction", only=_OWN_STOPS),
    Alias("trl", "sampling/sampling_logp_difference/mean", "gap_abs_mean_nats"),
    Alias("trl", "sampling/sampling_logp_difference/max", "gap_abs_max_nats"),
    Alias("trl", "sampling/importance_sampling_ratio/mean", "mismatch_ratio_mean", _AFTER),
    Alias("trl", "sampling/importance_sampling_ratio/min", "", _BOUNDS),
    Alias("trl", "sampling/importance_sampling_ratio/max", "", _BOUNDS),
    Alias("trl", "ratio", "policy_ratio_mean", f"of its asynchronous trainer; {_MIXED}"),
    # There it leaves out what ``delta``, the dual clip, takes, and DPO, TOPR and the like have none.
    Alias("trl", "clip_ratio/region_mean", "clip_fraction", only=_PLAIN_CLIP),
    Alias("trl", "clip_ratio/low_mean", "", _SIDE),
    Alias("trl", "clip_ratio/low_min", "", f"{_SIDE}, and of the sequence that has least of it"),
    Alias("trl", "clip_ratio/high_mean", "", _SIDE),
    Alias("trl", "clip_ratio/high_max", "", f"{_SIDE}, and of the sequence that has most of it"),
    Alias(
        "trl",
        "cispo_clip_ratio",
        "",
        "it counts ratios above epsilon_high with A > 0 there; CISPO takes no token's gradient",
    ),
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
    Alias(
        "trl",
        "sample/staleness_max",
        "lag_max_steps",
        "it is over samples by their dispatch there, over tokens' version spans here",
    ),
    Alias(
        "trl",
        "sample/dropped_stale_total",
        "dropped_samples",
        "it is since the last log and of what is too old there, since the run's start and of all here",
    ),
    Alias(
        "trl",
        "sample/rollout_queue_size",
        "queue_samples",
        "it is the mean over the samples as each is taken there, when the step is recorded here",
    ),
    Alias("trl", "sample/time_in_queue_s", "", "how long a sample lay there is not measured here"),
    Alias("trl", "perf/rollout_wait_s", "wait_s"),
    Alias(
        "trl",
        "perf/weight_sync_s",
        "sync_s",
        "here the trainer scores the canary meanwhile, and it ends with what the engine says of its load",
    ),
    Alias(
        "trl",
        "rollout/backpressure_s",
        "engine_idle_s",
        "it is the worker's wait for a full queue there, any time without work of the engine here",
    ),
    Alias("verl", "critic/score/mean", "reward_mean"),
    # There a conversation's length counts what tools answered.
    Alias("verl", "response_length/mean", "completion_tokens_mean", only=_ONE_TURN),
    Alias("verl", "response_length/min", "", _SPREAD),
    Alias("verl", "response_length/max", "", _SPREAD),
    Alias(
        "verl",
        "response_length/clip_ratio",
        "truncated_fraction",
        "a completion that stops exactly at the limit counts there",
    ),
    Alias("verl", "training/rollout_probs_diff_max", "gap_abs_max_nats", _PROBABILITIES),
    Alias("verl", "training/rollout_probs_diff_mean", "gap_abs_mean_nats", _PROBABILITIES),
    Alias("verl", "training/rollout_probs_diff_std", "", _PROBABILITIES),
    Alias(
        "verl",
        "training/rollout_actor_probs_pearson_corr",
        "",
        "it is a correlation of probabilities there: whatever moves all of them alike leaves it at 1",
    ),
    Alias("verl", "rollout_corr/k3_kl", "mismatch_kl_k3_nats"),
    Alias("verl", "rollout_corr/kl", "", "it is k1, mean(ℓ_engine − ℓ_trainer), signed, there"),
    Alias("verl", "rollout_corr/rollout_is_eff_sample_size", "mismatch_ess", _AFTER),
    Alias("verl", "rollout_corr/rollout_is_mean", "mismatch_ratio_mean", _AFTER),
    Alias("verl", "rollout_corr/rollout_is_min", "", _BOUNDS),
    Alias("verl", "rollout_corr/rollout_is_max", "", _BOUNDS),
    Alias("verl", "rollout_corr/rollout_is_std", "", _BOUNDS),
    Alias("verl", "rollout_corr/rollout_is_oob_ratio", "", _BOUNDS),
    Alias("verl", "actor/ppo_kl", "policy_kl_k3_nats", "it is k1, signed, there"),
    # There what the dual clip takes, which is always on, is counted apart.
    Alias("verl", "actor/pg_clipfrac", "clip_fraction", only=_PLAIN_CLIP),
    Alias(
        "verl",
        "actor/pg_clipfrac_lower",
        "",
        "it is of the dual clip alone there, what it takes beside the others here",
    ),
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
    Alias(
        "verl",
        "training/off_policy/trajectory_staleness/mean",
        "lag_steps",
        "it is over samples by the last version that drew them there, over tokens here",
    ),
    Alias("verl", "training/off_policy/trajectory_staleness_worst/max", "lag_max_steps"),
    Alias(
        "verl",
        "training/off_policy/evicted_samples",
        "dropped_samples",
        "it is of a step and of what is too old there, since the run's start and of all here",
    ),
    # There each turn of a conversation is a sequence, with all of its reward.
    Alias("pipelinerl", "rl/reward", "reward_mean", only=_ONE_TURN),
    Alias("pipelinerl", "rl/mean_abs_log_ratio_new_old", "gap_abs_mean_nats", _MIXED),
    Alias(
        "pipelinerl",
        "rl/ratio_new_old",
        "policy_ratio_mean",
        f"{_MIXED}; of its objective 'reinforce' after the clamp",
    ),
    Alias("pipelinerl", "rl/kl_new_old", "policy_kl_k3_nats", _MIXED),
    Alias(
        "pipelinerl",
        "rl/kl",
        "reference_kl_k3_nats",
        "it is clamped to ±10 and averaged over sequences first there",
    ),
    Alias("pipelinerl", "rl/ratio_new_old_sum", "", "it is a sum over tokens there, no mean"),
    Alias("pipelinerl", "rl/ratio_new_old_squared_sum", "", "it is a sum over tokens there, no mean"),
    Alias("pipelinerl", "rl/ess", "policy_ess", f"{_MIXED}; of its objective 'reinforce' after the clamp"),
    Alias("pipelinerl", "rl/clamp_log_ratio_new_old_indicator", "outside_clip_fraction", _WHOLE),
    Alias("pipelinerl", "rl/entropy", "entropy_mean_nats", "it is averaged over sequences first there"),
    Alias("pipelinerl", "stats/lag", "lag_steps", "it is in samples there, in versions here"),
    Alias("pipelinerl", "stats/grad_norm", "grad_norm"),
    Alias(
        "pipelinerl",
        "stats/samples_too_old_to_queue",
        "dropped_samples",
        "drops of every cause are counted here, of what is too old for the queue alone there",
    ),
    Alias(
        "pipelinerl",
        "stats/samples_too_old_to_train",
        "",
        "it is trained on there, and only counted; here nothing that is too old is trained on",
    ),
    Alias("pipelinerl", "stats/time_waiting_for_data", "wait_s", "it is summed since the start there"),
    Alias(
        "pipelinerl",
        "actor/result_queue_size",
        "queue_samples",
        "it is in groups that the trainer's own queue does not hold yet there, in samples here",
    ),
    Alias("pipelinerl", "actor/problem_queue_size", "", "questions wait in no queue here"),
)


def aliases_of(system: System, recipe: Recipe) -> tuple[Alias, ...]:
    """The names that a run of this recipe exports: those alone whose formula is the same under it."""
    return tuple(
        alias
        for alias in ALIASES
        if alias.system == system and not alias.differs and (alias.only is None or alias.only.holds(recipe))
    )


def left_out(system: System, recipe: Recipe) -> str:
    """What a run that asks for a system's names is told of those that it does not get: one sentence."""
    given = len(aliases_of(system, recipe))
    others = sum(alias.system == system for alias in ALIASES) - given
    return (
        f"recording.aliases: {given} names of {system} go to the sinks, {others} do not, for their formula "
        f"is another; lockstep metrics --aliases {system} says how"
    )


def exported(metrics: Mapping[str, float], aliases: Sequence[Alias]) -> dict[str, float]:
    """A step's figures under the names of :func:`aliases_of`."""
    return {alias.name: metrics[alias.ours] for alias in aliases if alias.ours in metrics}


def alias_named(name: str, system: System | None = None) -> Alias:
    """The alias of a name, to be exported.

    Raises:
        UsageError: for a name that nobody has, and for one whose formula is another; says how it differs.
    """
    known = [alias for alias in ALIASES if system in (None, alias.system)]
    alias = next((alias for alias in known if alias.name == name), None)
    if alias is None:
        near = difflib.get_close_matches(name, [alias.name for alias in known], n=1)
        raise UsageError(
            "lockstep metrics",
            got=repr(name),
            expected=f"{near[0]!r} perhaps"
            if near
            else "a figure's name, of ours or of TRL, verl, PipelineRL",
            hint="lockstep metrics",
        )
    if alias.differs:
        nearest = f"that of {alias.ours}" if alias.ours else "that of any figure here"
        raise UsageError(
            f"alias {alias.name} of {alias.system}",
            got=f"a formula that is not {nearest}: {alias.differs}",
            expected="the same formula under both names",
            hint=f"lockstep metrics {alias.ours}".rstrip(),
        )
    return alias


def nearest_to(name: str) -> str | None:
    """The figure that is nearest to what another system calls so, whether or not its formula is the same.

    For reading a log whose curves are held against others of the same system. None where none is.
    """
    # A log's reader may have taken the logger's prefix off already (``report/trajectories.py``).
    bare = {alias.name.removeprefix(f"{alias.name.partition('/')[0]}/"): alias.ours for alias in _LOGGED}
    return next((alias.ours for alias in ALIASES if alias.ours and alias.name == name), bare.get(name))


_LOGGED = [alias for alias in ALIASES if alias.ours and alias.name.startswith(("rl/", "actor/", "stats/"))]
