"""Layer 3 at full depth: updates under requests in flight, proven by piecewise replay in both modes."""

import numpy as np

from lockstep.deep.switch import Replayed, replay_switch
from lockstep.parity.causes import finding
from lockstep.parity.evidence import within
from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import REPLAY_WRONG_MULTIPLE
from lockstep.records.verdicts import Finding, Verdict
from lockstep.records.versions import LoadMode

MODES: tuple[LoadMode, ...] = ("keep", "recompute")


def deepen(pair: Pair, weights: Verdict) -> Verdict:
    """Layer 3's verdict with both modes replayed besides; a mode that does not fit fails it."""
    capability = pair.engine.ready.capabilities["pause_keep"]
    if not capability.supported:
        summary = f"{weights.summary}; updates in flight not run: {capability.how}"
        return _with(weights, summary, [], {"in_flight_not_run": capability.how}, 0)
    figures = {}
    findings = []
    n = 0
    undisturbed_s = None
    for mode in MODES:
        replayed = replay_switch(pair, mode, undisturbed_s)
        undisturbed_s = replayed.undisturbed_s  # timed once: the second mode draws the same
        figures |= {
            f"in_flight_{mode}_{name}_abs_max_nats": float(part.max()) if part.size else float("nan")
            for name, part in (
                ("before", replayed.before),
                ("after", replayed.right),
                ("wrong_assumption", replayed.wrong),
            )
        }
        figures[f"in_flight_{mode}_n_spanning"] = replayed.n_spanning
        figures[f"in_flight_{mode}_n_tokens"] = replayed.right.size
        figures[f"in_flight_{mode}_told_apart"] = bool(
            replayed.right.size and replayed.wrong.mean() >= REPLAY_WRONG_MULTIPLE * replayed.right.mean()
        )
        n += replayed.before.size + replayed.right.size
        findings += _findings(pair, replayed)
    lone = [mode for mode in MODES if not figures[f"in_flight_{mode}_n_tokens"]]
    if lone and not findings:
        reason = (
            f"mode {lone[0]}: no completion spanned the switch, so nothing was compared; "
            "more probe tokens make it likelier"
        )
        return Verdict(
            layer="weights",
            status="NOT_RUN",
            summary="not judged",
            reason=reason,
            figures=weights.figures | figures,
        )
    proven = " and ".join(f"{figures[f'in_flight_{mode}_after_abs_max_nats']:.0e} ({mode})" for mode in MODES)
    return _with(weights, f"{weights.summary}; in flight, token by token, to {proven}", findings, figures, n)


def _findings(pair: Pair, replayed: Replayed) -> list[Finding]:
    if not replayed.right.size:
        return []
    right = np.r_[replayed.before, replayed.right]
    if within(pair.noise, right) and not replayed.fits_instead:
        return []
    text = (
        f"mode {replayed.mode}: before the switch {replayed.before.max():.1e} nats, "
        f"after it {replayed.right.max():.1e}, "
        f"under the other assumption {replayed.wrong.max():.1e} (largest); {replayed.fits_instead}"
    )
    return [
        finding(
            "in_flight_update", right, np.zeros(right.size, int), text, pair.engine.fix("in_flight_update")
        )
    ]


def _with(weights: Verdict, summary: str, findings: list[Finding], figures: dict, n: int) -> Verdict:
    return Verdict(
        layer="weights",
        status="FAIL" if findings else weights.status,
        summary=f"after an update in flight, {findings[0].evidence}" if findings else summary,
        n_tokens=weights.n_tokens + n,
        findings=(*weights.findings, *findings),
        figures=weights.figures | figures,
    )
