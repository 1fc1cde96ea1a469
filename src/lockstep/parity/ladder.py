"""Run the layers in order and stop at the first that does not hold: a semantic error looks like noise further
down.

own, neutral, telling ──► 1 semantics ─► 2 path ─► 3 weights ─► 4 numerics ─► 5 objective ─► certificate
    (evidence.py)
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from lockstep.parity.canary import Canary
from lockstep.parity.evidence import Evidence, gather, steadied
from lockstep.parity.explain.numerics.precision import presumed_dtype
from lockstep.parity.layers import directions, numerics, objective, path, semantics, weights
from lockstep.parity.pair import Pair
from lockstep.records.verdicts import LAYERS, LayerName, Status, Verdict

PROOF_TOKENS = 64
"""Tokens that layer 3 draws: more than the canary has, so that a tensor can be named."""
STEADIED: tuple[LayerName, ...] = ("semantics", "path", "weights")
"""Layers that do not judge the trainer's own noise, which is layer 4's."""


@dataclass(eq=False)
class LadderResult:
    """All five verdicts, in order, and the canary for the syncs to come."""

    verdicts: list[Verdict]
    canary: Canary

    @property
    def status(self) -> Status:
        """PASS when every layer passed, FAIL when one failed, NOT_RUN otherwise."""
        statuses = {verdict.status for verdict in self.verdicts}
        if "FAIL" in statuses:
            return "FAIL"
        return "NOT_RUN" if "NOT_RUN" in statuses else "PASS"

    @property
    def passed(self) -> bool:
        """True when every layer passed."""
        return self.status == "PASS"

    @property
    def failed(self) -> Verdict | None:
        """The layer that failed, if one did."""
        return next((verdict for verdict in self.verdicts if verdict.status == "FAIL"), None)


def climb(
    pair: Pair,
    on_layer: Callable[[LayerName], None] = lambda layer: None,
    deeper: Mapping[LayerName, Callable[[Verdict], Verdict]] = MappingProxyType({}),
) -> LadderResult:
    """Run the ladder on a live pair.

    Args:
        on_layer: told of each layer before it runs.
        deeper: what else is measured once a layer has passed; returns that layer's verdict anew.
    """
    on_layer("semantics")
    pair.begin_search()
    evidence = gather(pair)
    pair.presumed_dtype = presumed_dtype(pair, evidence)
    proof = Canary.of(evidence.neutral, PROOF_TOKENS)
    steps: dict[LayerName, Callable[[list[Verdict]], Verdict]] = {
        "semantics": lambda done: semantics.judge(pair, evidence),
        "path": lambda done: path.judge(pair, evidence),
        "weights": lambda done: weights.judge(pair, proof, evidence.neutral),
        "numerics": lambda done: _numerics(pair, evidence, done[1]),
        "objective": lambda done: objective.judge(pair, pair.seed),
    }
    unable = _unable(pair)
    verdicts: list[Verdict] = []
    for layer in LAYERS:
        reason = _not_judged(layer, verdicts, unable)
        if reason:
            verdicts.append(Verdict.not_judged(layer, reason))
            continue
        if layer != "semantics":  # which was told of above, before its tokens were drawn
            on_layer(layer)
        with steadied(pair, evidence.floors) if layer in STEADIED else nullcontext():
            verdict = steps[layer](verdicts)
            if verdict.status == "PASS" and layer in deeper:
                verdict = deeper[layer](verdict)
        verdicts.append(verdict)
    return LadderResult(verdicts, _canary(pair, evidence))


def _numerics(pair: Pair, evidence: Evidence, path: Verdict) -> Verdict:
    """What is left; a gap that is too wide and that nothing explains may have a direction for a name."""
    verdict = numerics.judge(pair, evidence, path)
    nameless = verdict.status == "FAIL" and verdict.findings[0].cause == numerics.UNEXPLAINED
    return directions.deepen(pair, verdict) if pair.coarse and nameless else verdict


def _unable(pair: Pair) -> dict[LayerName, str]:
    """Layers that this engine cannot be judged in, and why."""
    ready = pair.engine.ready
    load, rescore = ready.capabilities["load"], ready.capabilities["rescore"]
    unable: dict[LayerName, str] = {}
    if not load.supported:
        unable["weights"] = f"{ready.engine} takes no weights: {load.how}"
    if not rescore.supported:
        unable["path"] = unable["weights"] = f"{ready.engine} cannot re-score: {rescore.how}"
    return unable


def _not_judged(layer: LayerName, verdicts: Sequence[Verdict], unable: Mapping[LayerName, str]) -> str:
    """Why a layer is not judged; empty where it is.

    What the engine cannot do is NOT_RUN with its own reason, and does not keep the layers after it from being
    judged.
    """
    for verdict in verdicts:
        if verdict.status != "PASS" and verdict.layer not in unable:
            return f"layer {verdict.layer} did not pass"
    return unable.get(layer, "")


def _canary(pair: Pair, evidence: Evidence) -> Canary:
    """The canary for the syncs to come, with the gap that is clean on this pair."""
    canary = Canary.of(evidence.neutral, pair.recipe.parity.canary_tokens)
    if pair.engine.ready.capabilities["rescore"].supported:
        # The mean of few tokens may be small by chance, and would then refuse the next sync by chance.
        of_all = float(np.abs(evidence.rescored - evidence.trainer).mean())
        with pair.as_beside_a_load():
            side = canary.trainer_side(pair)
        canary.clean_gap_nats = max(canary.measure(pair, side).gap_abs_mean_nats, of_all)
    return canary
