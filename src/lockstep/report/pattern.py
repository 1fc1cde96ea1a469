"""Which layer a pattern of differences points at. It points, and proves nothing: ``lockstep check`` does."""

from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.report.statistics import Judged

MISMATCH = (
    "gap_abs_mean_nats",
    "gap_abs_p50_nats",
    "mismatch_kl_k3_nats",
    "mismatch_ess",
    "mismatch_ratio_mean",
    "phantom_clip_fraction",
)
TAIL = ("gap_abs_p999_nats", "gap_abs_max_nats")
POLICY = (
    "clip_fraction",
    "outside_clip_fraction",
    "policy_kl_k3_nats",
    "policy_ratio_mean",
    "policy_ess",
)
"""Peers that log one ratio of trainer now to engine at sampling have both in these."""
LAG = ("lag_steps",)
OUTCOME = ("reward_mean", "entropy_mean_nats", "completion_tokens_mean", "truncated_fraction")
JUDGED = (*OUTCOME, *POLICY, *MISMATCH, *TAIL, *LAG)
"""What is judged unasked: figures of the policy and of the backend, none of time."""
FIRST_STEPS = 2
"""A difference that begins in so many steps was there before an update could bring it."""


@dataclass(frozen=True)
class Pattern:
    """Where to look first."""

    layer: str
    """One of the five; empty where nothing points at one."""
    why: str


@dataclass(frozen=True)
class Since:
    """When a figure parted: its place among the common steps; None where no step is told."""

    place: int | None

    @property
    def at_once(self) -> bool:
        """Before any update could bring it."""
        return self.place is not None and self.place < FIRST_STEPS


def points_at(judged: Mapping[str, Judged], since: Mapping[str, Since]) -> Pattern:
    """The first layer, in the ladder's order, that the different figures are typical of."""
    different = {name for name, figure in judged.items() if figure.verdict == "different"}
    if not different:
        return Pattern("", "no figure is different")
    known = [name for name in MISMATCH if name in judged]
    mismatch = [name for name in known if name in different]
    tail, lag = different & set(TAIL), different & set(LAG)
    policy, outcome = different & set(POLICY), different & set(OUTCOME)
    if mismatch and any(since[name].at_once for name in mismatch):
        if "mismatch_ratio_mean" in different:
            why = "the numbers differ from the first step on, their mean ratio too: another distribution"
            return Pattern("semantics", why)
        return Pattern(
            "numerics", f"{_names(mismatch)} differs from the first step on, the mean ratio does not"
        )
    if mismatch:
        why = "is alike at first and parts later: updates do not arrive whole, or a cache outlives them"
        return Pattern("weights", f"{_names(mismatch)} {why}")
    if tail:
        return Pattern(
            "path", f"{_names(sorted(tail))} differs and the middle does not: some tokens on some way"
        )
    if lag:
        return Pattern("weights", "what is trained on is older: updates in flight, the pause and its cache")
    if policy and known and all(judged[name].verdict == "equivalent" for name in known):
        return Pattern("objective", f"{_names(sorted(policy))} differs while the mismatch is the same")
    if policy and any(since[name].at_once for name in policy):
        why = (
            f"{_names(sorted(policy))} differs from the first step on, when the ratio should be 1 in both; "
            f"{'the mismatch cannot be told apart' if known else 'no mismatch is logged apart from it'}"
        )
        return Pattern("semantics", why)
    if policy:
        return Pattern("weights", f"{_names(sorted(policy))} is alike at first and parts later")
    if outcome:
        return Pattern("", f"{_names(sorted(outcome))} alone: prompts, rewards or sampling, before any layer")
    return Pattern("", f"{_names(sorted(different))} is of no layer")


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
