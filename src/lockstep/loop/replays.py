"""One sequence that spans each update in flight, replayed piece by piece before anything trains on it.

    scores of the tokens that earlier versions drew ─┐
    the step's own forward pass: those of now ───────┴► every token of an audited sequence ─► spans.judge
    a sequence that is not audited ─► a pass of its own ──────────────────────────────────────┘

So a replay costs a pass of its own only where none of an update's sequences is audited, and now and then one
over the other cache, which says whether a wrong cache rule would have shown.
"""

import time

import numpy as np

from lockstep.errors import WeightSyncError
from lockstep.loop.run import Run
from lockstep.parity import spans
from lockstep.records.samples import Samples
from lockstep.records.verdicts import InFlight
from lockstep.rollout import store
from lockstep.training.versions import Before

POWER_SHARE = 0.005
"""Share of a run's time that is given to replays over the other cache."""


def replay(run: Run, step: int, rollouts: Samples, before: Before) -> dict[str, float]:
    """Replay one sequence across each update of the step; what does not fit stops the run, named.

    Args:
        rollouts: with the trainer's scores.

    Returns figures by catalog name.

    Raises:
        WeightSyncError: names cache rule, span or version.
    """
    if run.override is not None:
        return {}  # numbers that the ladder refused are no others' measure
    began = time.perf_counter()
    audited = [bool(known.all()) for known in np.split(before.audited, np.cumsum(rollouts.lengths)[:-1])]
    seen: set[int] = set()
    gap = None
    replayer = spans.Replay.of(run.pair, step)
    # First those that need no pass of their own.
    for row in sorted(range(len(rollouts)), key=lambda row: not audited[row]):
        entered = {span.version for span in rollouts[row].version_spans[1:]} - seen
        # Of what was drawn before an interruption the weights may be gone, and the scores be there alone.
        judged = audited[row] or replayer.knows(rollouts[row].version_spans)
        if entered and judged and rollouts[row].known.any():
            seen |= entered
            gap = _one(run, replayer, rollouts, row, max(entered), scored=audited[row])
    entered = {span.version for sample in rollouts for span in sample.version_spans[1:]} - seen
    if entered:
        told = ", ".join(map(str, sorted(entered)))
        run.say(f"step {step + 1}: no answer that an update to version {told} entered can be replayed")
    figures = {"replay_s": time.perf_counter() - began}
    return figures if gap is None else figures | {"replay_gap_abs_max_nats": gap}


def _one(
    run: Run, replayer: spans.Replay, rollouts: Samples, row: int, version: int, *, scored: bool
) -> float:
    """The widest gap of a sequence that the update to ``version`` entered, nats.

    Args:
        scored: its scores are the trainer's; else the engine's own stand in their place.
    """
    sample = rollouts[row]
    began = time.perf_counter()
    due = run.power_s <= POWER_SHARE * (began - run.began)  # so the first one always
    power = due and replayer.knows(sample.version_spans)
    verdict = spans.judge(
        replayer,
        sample,
        kept=run.recipe.rollout.update == "keep",
        power=power,
        scores=sample.sampling_logprobs if scored else None,
    )
    if power:
        run.power_s += time.perf_counter() - began
    run.recorder.verdict(InFlight(version), verdict)
    if verdict.status != "PASS":
        store.refuse(run.layout, replayer.version)
        raise WeightSyncError(
            f"update in flight to version {version}",
            got=verdict.summary,
            expected="each token as the version that the engine names draws it, over the rule's cache",
            hint=verdict.findings[0].fix,
        )
    return verdict.figures["replay_gap_abs_max_nats"]
