"""Syncs that the canary cannot prove are proven by the rollouts themselves, or refuted before any training.

    sync k ─► canary: too small an update for its noise (bf16) ─► version k draws step k ─► gate
                ─► trainer scores the tokens under the version proven last, and under k ─► share of the update
                   that is missing (``parity/delivered.py``):  proven │ not yet, tokens add up │ refuted

One tensor of hundreds moves a token by a twentieth of what the whole update does, and hides in it: that each
arrives, layer 3 shows, which moves every tensor far. The version proven last is kept while the canary sees
nothing: one copy of the weights.
"""

import time
from dataclasses import dataclass

import numpy as np

from lockstep.parity.causes import finding
from lockstep.parity.delivered import Missing, Moves, missing
from lockstep.parity.pair import Pair
from lockstep.policy.parameters import Snapshot
from lockstep.policy.variants import Earlier
from lockstep.records.samples import Samples
from lockstep.records.verdicts import Verdict
from lockstep.training.step import AtSampling

CANARY = "the canary"
ROLLOUTS = "their rollouts"


@dataclass(eq=False)
class Deliveries:
    """Which version is proven, by whatever, and what rollouts have said since of the update from it on."""

    proven: int = 0
    how: str = "the ladder"
    """What proved it."""
    each: int = 0
    """The version at which every tensor was last seen to arrive."""
    spent_s: float = 0.0
    """On the step under way."""
    _before: Snapshot | None = None
    """The weights of the version ``proven``."""
    _moves: Moves | None = None
    """Tokens of the versions since."""

    def settle(self, version: int, how: str) -> None:
        """``version`` is proven."""
        self.proven = version
        self.how = how
        self._before = None
        self._moves = None
        if how != ROLLOUTS:
            self.each = version

    def told(self, version: int) -> str:
        """What has proven the last sync, ``version``, or since when none has; for people."""
        if self.proven == version:
            return f"proven by {self.how}"
        syncs = version - self.proven
        return f"proven by {self.how} to version {self.proven}, {syncs} sync{'s' * (syncs > 1)} not yet"

    def judge(self, pair: Pair, version: int, rollouts: Samples, tokens: AtSampling) -> Verdict | None:
        """What a step's rollouts say of the version that is to have drawn them, before they are trained on.

        None where nothing is to be proven, or nothing is there to hold it against.

        Args:
            tokens: those that the model sampled, as both sides score them.
        """
        began = time.perf_counter()
        verdict = None
        if self.proven < version and self._before is not None:
            moves = _moved(pair, self._before, rollouts, tokens)
            self._moves = moves if self._moves is None else self._moves.with_more(moves)
            verdict = _verdict(pair, missing(self._moves), version, moves)
            if verdict.status == "PASS":
                self.settle(version, ROLLOUTS)
        # While the canary proves, no copy is kept. What it misses first layer 3 proves, within
        # ``parity.prove_within`` versions, and from that version on there is one.
        if self.proven == version and self._before is None and self.how != CANARY:
            self._before = pair.trainer.snapshot()
        self.spent_s = time.perf_counter() - began
        return verdict


def _moved(pair: Pair, before: Snapshot, rollouts: Samples, tokens: AtSampling) -> Moves:
    """In fp32 on both weights: the trainer's rounding would be in the gap and in the move, and pass for one
    another."""
    with pair.exactly():
        new = rollouts.scored(pair.trainer)[rollouts.loss_mask].astype(np.float64)
        with pair.trainer.holding(Earlier(before)):
            old = rollouts.scored(pair.trainer)[rollouts.loss_mask]
    # Completions of one prompt share what rounding does to it.
    prompts = tokens.owners // rollouts.group_size
    return Moves(tokens.engine_logprobs - new, new - old, new, prompts)


def _verdict(pair: Pair, lacking: Missing, version: int, moves: Moves) -> Verdict:
    figures = {"update_missing_share": lacking.share, "update_missing_error": lacking.error}
    if lacking.proven:
        return Verdict(
            layer="weights",
            status="PASS",
            summary=f"version {version} drew its rollouts: {lacking.told()}",
            n_tokens=lacking.n_tokens,
            figures=figures,
        )
    if not lacking.refuted:
        return Verdict(
            layer="weights",
            status="NOT_RUN",
            summary=f"version {version} is not refuted by its rollouts: {lacking.told()}",
            n_tokens=lacking.n_tokens,
            reason=f"not yet: about {lacking.more_needed} more tokens like these are needed",
            figures=figures,
        )
    # Within its error all of the update may be missing.
    cause = "not_delivered" if lacking.share + lacking.error >= 1.0 else "partly_delivered"
    effect = np.abs(lacking.share * moves.moved)
    fix = pair.engine.fix(cause)
    named = finding(cause, effect, moves.owners, lacking.told(), fix, lacking.n_tokens)
    return Verdict.failed(
        "weights", f"version {version} did not draw its rollouts: {lacking.told()}", named, figures
    )
