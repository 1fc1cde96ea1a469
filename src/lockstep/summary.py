"""From a run directory to what a person reads. No torch."""

from math import nan
from statistics import fmean

from msgspec import Struct, structs

from lockstep.records.verdicts import AfterSync, OfRollouts, Status
from lockstep.runs.read import RunRecord, Steps


class RunSummary(Struct, frozen=True, kw_only=True):
    """A run in a dozen figures: rates and mismatch over all steps, rewards over its first and last quarter.

    What a run without steps, or steps without the figure, cannot say is NaN.
    """

    run: str
    """The run directory."""
    override: str = ""
    """Layer and the recipe's reason, where the run trained although the ladder did not pass; else empty."""
    alarms: int = 0
    """How many were given."""
    planted: tuple[str, ...] = ()
    """Faults that were planted on purpose; with any, the run certifies nothing."""
    steps: int = 0
    reward_first_quarter: float = nan
    reward_last_quarter: float = nan
    reward_gain: float = nan
    """Last quarter less first."""
    clip_fraction: float = nan
    policy_kl_k3_nats: float = nan
    mismatch_kl_k3_nats: float = nan
    gap_abs_max_nats: float = nan
    """The largest of any step."""
    phantom_clip_fraction: float = nan
    entropy_first_nats: float = nan
    entropy_last_nats: float = nan
    tokens_per_s: float = nan
    samples_per_s: float = nan
    seconds_per_step: float = nan
    training_s: float = 0.0
    """Wall time of the steps that have one of their own."""
    steps_timed: int = 0
    """How many these are: one that was replayed after a kill has none."""
    syncs: int = 0
    syncs_proven: int = 0
    syncs_too_small_to_prove: int = 0


def summarise(run: RunRecord) -> RunSummary:
    """The figures of a run, from what it recorded.

    Raises:
        RunError: for a damaged file.
    """
    steps = run.steps
    bare = RunSummary(
        run=str(run.layout.root),
        planted=run.manifest.planted,
        override=run.override,
        alarms=len(run.alarms),
    )
    if not len(steps):
        return bare
    # Of fewer than eight steps a quarter is one step, and of a single step both quarters are that one.
    quarter = max(1, len(steps) // 4)
    first = _mean(Steps(steps.records[:quarter]), "reward_mean")
    last = _mean(Steps(steps.records[-quarter:]), "reward_mean")
    syncs = _syncs(run)
    seconds = steps.column("step_s")[steps.measured("step_s")].tolist()
    entropy = steps.column("entropy_mean_nats").tolist()
    return structs.replace(
        bare,
        steps=len(steps),
        reward_first_quarter=first,
        reward_last_quarter=last,
        reward_gain=last - first,
        clip_fraction=_mean(steps, "clip_fraction"),
        policy_kl_k3_nats=_mean(steps, "policy_kl_k3_nats"),
        mismatch_kl_k3_nats=_mean(steps, "mismatch_kl_k3_nats"),
        # Over all steps, means over measured ones: a step without a number may have had the largest.
        gap_abs_max_nats=float(steps.column("gap_abs_max_nats").max()),
        phantom_clip_fraction=_mean(steps, "phantom_clip_fraction"),
        entropy_first_nats=entropy[0],
        entropy_last_nats=entropy[-1],
        tokens_per_s=_mean(steps, "tokens_per_s"),
        samples_per_s=_mean(steps, "samples_per_s"),
        seconds_per_step=_mean(steps, "step_s"),
        training_s=sum(seconds),
        steps_timed=len(seconds),
        syncs=len(syncs),
        syncs_proven=list(syncs.values()).count("PASS"),
        syncs_too_small_to_prove=list(syncs.values()).count("NOT_RUN"),
    )


def _syncs(run: RunRecord) -> dict[int, Status]:
    """Each version's, by the canary or by the rollouts that it drew, whichever proves it."""
    syncs: dict[int, Status] = {}
    for record in run.verdicts:
        when = record.when
        status = record.verdict.status
        # A proof stays one: the other way may see too little of the same update, which takes nothing back.
        if isinstance(when, AfterSync | OfRollouts) and syncs.get(when.version) != "PASS":
            syncs[when.version] = status
    return syncs


def _mean(steps: Steps, name: str) -> float:
    """The mean over the steps that have the figure."""
    values = steps.column(name)[steps.measured(name)].tolist()
    return fmean(values) if values else nan


def summary_table(summary: RunSummary) -> str:
    """The summary as plain text."""
    s = summary
    if not s.steps:
        return f"no step was trained; files are in {s.run}"
    rows = [
        (
            "reward, first → last quarter",
            f"{s.reward_first_quarter:.3f} → {s.reward_last_quarter:.3f}  ({s.reward_gain:+.3f})",
        ),
        ("clip rate (policy ratio)", f"{s.clip_fraction:.4f}"),
        ("policy KL (k3)", f"{s.policy_kl_k3_nats:.2e} nats"),
        ("mismatch KL (k3)", f"{s.mismatch_kl_k3_nats:.2e} nats"),
        ("mismatch |gap|, largest", f"{s.gap_abs_max_nats:.2e} nats"),
        ("phantom clips", f"{s.phantom_clip_fraction:.4f}"),
        ("entropy, first → last step", f"{s.entropy_first_nats:.3f} → {s.entropy_last_nats:.3f} nats"),
        ("speed", _speed(s)),
        ("training time", f"{s.training_s:.0f} s for {s.steps_timed} of {s.steps} steps"),
        ("weight syncs proven", f"{s.syncs_proven} of {s.syncs}{_too_small(s.syncs_too_small_to_prove)}"),
        *([("not proven", s.override)] if s.override else []),
        *([("alarms", f"{s.alarms}, in alarms.jsonl")] if s.alarms else []),
        *(
            [("planted on purpose", f"{', '.join(s.planted)}: this run certifies nothing")]
            if s.planted
            else []
        ),
        ("files", s.run),
    ]
    return "\n".join(f"{name:<30} {value}" for name, value in rows)


def _speed(s: RunSummary) -> str:
    if not s.steps_timed:
        return "not measured: every step was replayed"
    return (
        f"{s.tokens_per_s:.0f} tokens/s, {s.samples_per_s:.1f} samples/s, {s.seconds_per_step:.1f} s a step"
    )


def _too_small(n: int) -> str:
    return (
        f"; {n} moved the canary less than the noise, and the way was proven by a perturbation instead"
        if n
        else ""
    )
