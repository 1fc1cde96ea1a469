"""Layer 3: does the engine serve the weights it is sent?

Perturb → sync → prove. Every tensor of the trainer gets noise, the weights are published and loaded, and both
sides score known tokens. Where they differ by more than they did before, the residue is explained by the
hypothesis that fits: nothing delivered; the head old under a new body; one or some tensors old
(``attribution.py``). Then the weights are put back, exactly, and proven again. Prompts that were in the
prefix cache before the update are drawn from after it, to show a stale cache.

Where the sides differ by so much anyway that one old tensor would be lost in it (bf16), each tensor is asked
besides (``left_behind.py``).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.parity.canary import Canary
from lockstep.parity.causes import finding
from lockstep.parity.explain.weights import attribution
from lockstep.parity.left_behind import left_behind, proven_each
from lockstep.parity.pair import Pair, draw
from lockstep.parity.perturbation import PROBE_VERSION, perturbed
from lockstep.parity.search_tolerances import EXPLAINS
from lockstep.parity.tolerances import (
    CANARY_FLOOR,
    CANARY_MULTIPLE,
    LEAST_TENSOR,
    OTHER_CHECKPOINT,
    PERTURBATION_OVER_NOISE,
)
from lockstep.policy.variants import EarlierHead
from lockstep.records.samples import Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import Verdict

CACHE_TOKENS = 2
"""Drawn of each prompt: the first of them reads the prompt's cached blocks already."""
CACHE_PROMPTS = 4


@dataclass(eq=False)
class PerturbationScores:
    """Scores around one perturbation; float32 [T] of the canary's tokens."""

    limit: float
    """Mean |gap| that a delivered update may leave, nats."""
    noise: float
    """What arithmetic may bring between the two sides, median, nats."""

    first: np.ndarray
    """The engine before anything was synced."""
    old: np.ndarray
    """The trainer under the old weights."""
    new: np.ndarray
    """The trainer under the perturbed weights."""
    engine: np.ndarray
    """The engine after the perturbed weights were loaded."""
    old_head: np.ndarray
    """The trainer's new body with the old head."""
    filling: Samples
    """Drawn before the update, which put its prompts into the prefix cache."""
    cached: Samples
    """Drawn after the update from the same prompts."""
    cache_gap: np.ndarray
    named: attribution.Named | None = None
    """Tensors that were not delivered."""
    back: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """The engine after the old weights were loaded again; empty until they were."""

    @property
    def ground(self) -> np.ndarray:
        """|engine − trainer| before anything was synced."""
        return np.abs(self.first - self.old)

    @property
    def shift(self) -> float:
        """How far the perturbation moved the trainer's own scores, mean, nats: what a lost update would
        show."""
        return float(np.abs(self.new - self.old).mean())

    @property
    def blurred(self) -> bool:
        """True when the sides differed so much before this update that scores alone tell nothing of it.

        Then the engine's move is compared with the trainer's. Either a lost update would pass for delivered,
        or an earlier one was lost. Sides that agree after the update are not blurred.
        """
        if float(np.abs(self.engine - self.new).mean()) <= self.noise:
            return False
        return self.limit >= self.shift or float(self.ground.mean()) > self.limit

    def hides_a_tensor(self, n_tensors: int) -> bool:
        """True when one tensor of so many could be old within the limit.

        What single tensors do to a token adds up by squares, so that one of n moves it by 1/√n of the shift,
        and the least of them by a few times less.
        """
        return LEAST_TENSOR * self.limit * n_tensors**0.5 >= self.shift

    def residue(self, scores: np.ndarray) -> float:
        """mean |engine − scores|, nats; where the sides are blurred, the same of the moves that led to
        both."""
        if self.blurred:
            return float(np.abs((self.engine - self.first) - (scores - self.old)).mean())
        return float(np.abs(self.engine - scores).mean())

    @property
    def delivered(self) -> bool:
        """True when the engine serves what it was sent.

        Where the sides are blurred: when the engine moved at all, and not as it would with an old head.
        """
        new = self.residue(self.new)
        if not self.blurred:
            return new <= self.limit
        return self.residue(self.old) > self.noise and self.residue(self.old_head) > EXPLAINS * new


def judge(pair: Pair, canary: Canary, sample: Samples) -> Verdict:
    """The verdict of layer 3. Leaves trainer and engine with the weights they had, and the canary with its
    clean gap.

    Args:
        sample: drawn under the weights that both sides are meant to hold.
    """
    measured = _measure(pair, canary, sample)
    restored = canary.measure(pair)
    measured.back = canary.served
    n_tokens = 2 * canary.scores.size + measured.cache_gap.size  # the canary is scored after either sync
    figures: dict[str, Any] = {
        "before_sync_abs_mean_nats": float(measured.ground.mean()),
        "residue_all_new_abs_mean_nats": measured.residue(measured.new),
        "residue_none_delivered_abs_mean_nats": measured.residue(measured.old),
        "residue_head_old_abs_mean_nats": measured.residue(measured.old_head),
        "shift_abs_mean_nats": measured.shift,
        "after_restore_abs_max_nats": restored.gap_abs_max_nats,
        "cache_abs_max_nats": float(np.abs(measured.cache_gap).max()),
        "minimal_detectable_effect_nats": min(measured.limit, measured.shift),
        "judged_by": "moves" if measured.blurred else "scores",
        **_receipt_figures(pair),
    }
    if not measured.shift >= PERTURBATION_OVER_NOISE * pair.noise.p50:
        reason = (
            f"the perturbation moved the canary by {measured.shift:.1e} nats only: "
            "no stale weight could be seen"
        )
        summary = "nothing proven"
        return Verdict(layer="weights", status="NOT_RUN", summary=summary, reason=reason, figures=figures)
    failed = _failed(pair, canary, sample, measured, restored.gap_abs_mean_nats)
    if failed is not None:
        fix = pair.engine.fix(failed.cause)
        named = finding(failed.cause, failed.size, failed.owners, failed.evidence, fix, n_tokens)
        return Verdict.failed("weights", failed.summary, named, figures)
    canary.clean_gap_nats = restored.gap_abs_mean_nats
    new = figures["residue_all_new_abs_mean_nats"]
    excluded = [] if measured.blurred else ["no stale tensor or head"]
    if measured.hides_a_tensor(len(pair.trainer.parameter_names())):
        seen, left = proven_each(pair)
        figures |= {"tensors": seen.n_tensors, "tensors_seen": seen.n_seen}
        if left:
            what = f"{SERVED}{left[0].place.place} is old"
            return Verdict.failed("weights", what, left_behind(pair, left), figures)
        excluded = [f"no stale tensor, where {seen.n_seen} of {seen.n_tensors} would have shown"]
    if _cache_limit(pair, measured) < measured.shift:
        excluded.append("no stale prefix cache")
    proven = ", ".join(excluded)
    summary = f"a change of {measured.shift:.2f} nats arrived to within {new:.1e}, and back again; {proven}"
    return Verdict(layer="weights", status="PASS", summary=summary, n_tokens=n_tokens, figures=figures)


def _receipt_figures(pair: Pair) -> dict[str, Any]:
    """What the engine said of the last sync, to be held beside what scoring showed of it."""
    receipt = pair.receipt
    if receipt is None:
        return {}
    return {
        "receipt_n_tensors": receipt.n_tensors,
        "receipt_load_s": receipt.load_s,
        "receipt_repacked": ", ".join(receipt.repacked),
        "receipt_cache_cleared": receipt.cache_cleared,
    }


def _measure(pair: Pair, canary: Canary, sample: Samples) -> PerturbationScores:
    # The prefix cache keeps whole blocks of tokens, which only the longest prompts fill.
    cached = sorted(sample.prompts, key=len)[-CACHE_PROMPTS:]
    few = SamplingParams(max_tokens=CACHE_TOKENS)
    filling = draw(pair, cached, few, pair.seed)
    old = canary.trainer_scores(pair)
    first = canary.engine_scores(pair)
    limit = CANARY_MULTIPLE * max(canary.clean_gap_nats or float(np.abs(first - old).mean()), CANARY_FLOOR)
    noise = perturbed(pair)
    with pair.trainer.holding(noise):
        pair.sync(PROBE_VERSION)
        engine = canary.engine_scores(pair)
        new = canary.trainer_scores(pair)
        after = draw(pair, cached, few, pair.seed)
        cache_gap = after.scored(pair.trainer) - after.engine_logprobs
        with pair.trainer.holding(EarlierHead(noise.before)):
            old_head = canary.trainer_scores(pair)
        measured = PerturbationScores(
            limit=limit,
            noise=pair.noise.p50,
            first=first,
            old=old,
            new=new,
            engine=engine,
            old_head=old_head,
            filling=filling,
            cached=after,
            cache_gap=cache_gap,
        )
        plain = (measured.residue(scores) for scores in (new, old, old_head))
        # Gradients at the perturbed weights name the tensors, so they are looked for while the trainer holds
        # these.
        if not measured.blurred and not min(plain) <= measured.limit:
            pair.say("weights: not all arrived; looking for the tensors, which can take a minute")
            # A rounding costs two passes and is asked first; the other two a backward pass for each token.
            measured.named = (
                attribution.rounded(pair, canary, engine, measured.limit)
                or attribution.stale(pair, canary, noise.before, engine, measured.limit)
                or attribution.scaled(pair, canary, engine, measured.limit)
            )
    pair.sync(pair.version)  # the trainer's own weights, which it holds again past the block
    return measured


@dataclass(frozen=True, eq=False)
class Failed:
    """What is wrong with a sync."""

    cause: str
    summary: str
    evidence: str
    size: np.ndarray
    """What it does to each token, nats: float32 [T]."""
    owners: np.ndarray
    """The completion of each, int [T]."""


CLAIMED = ", though the engine said that it cleared its cache"
SERVED = "after a sync the engine does not serve the weights it was sent: "


def _failed(
    pair: Pair, canary: Canary, sample: Samples, measured: PerturbationScores, restored: float
) -> Failed | None:
    """The first thing that is wrong: the update, its version, the prefix cache, the way back, the start. None
    when nothing is.

    Args:
        restored: mean |engine − trainer| after the old weights were put back, nats.
    """
    if not measured.delivered:
        return _not_served(canary, measured)
    wrong = _wrong_version(pair, sample, pair.version) or _wrong_version(pair, measured.cached, PROBE_VERSION)
    if wrong:
        # The numbers are right: a wrong tag moves no log-probability.
        return Failed("version_tag", wrong, wrong, np.zeros(canary.owners.size), canary.owners)
    return (
        _stale_cache(pair, measured)
        or _not_put_back(canary, measured, restored)
        or _other_checkpoint(pair, canary, measured, restored)
    )


def _not_served(canary: Canary, measured: PerturbationScores) -> Failed:
    """Which mixture of old and new weights the engine serves after the update."""
    residues = {
        "all new": measured.residue(measured.new),
        "none delivered": measured.residue(measured.old),
        "head old": measured.residue(measured.old_head),
    }
    hypotheses = ", ".join(f"{name}: {residue:.1e}" for name, residue in residues.items())
    evidence = f"mean |engine − trainer|, nats, by hypothesis: {hypotheses}"
    size = np.abs(measured.engine - measured.new)

    def failed(cause: str, what: str, first: str = "") -> Failed:
        return Failed(cause, SERVED + what, first + evidence, size, canary.owners)

    best = min(residues["none delivered"], residues["head old"])
    if measured.blurred or best <= measured.limit:
        if residues["none delivered"] != best:
            return failed("stale_head", "its lm_head is stale: a packed copy holds the old weights")
        # Loading the old weights again moved it as the perturbation should have: it serves each update one
        # sync late.
        moved = measured.back - measured.first
        behind = np.abs(moved - (measured.new - measured.old)).mean() < np.abs(moved).mean()
        cause = "one_version_behind" if behind else "not_delivered"
        return failed(cause, cause.replace("_", " "))
    named = measured.named
    if named is None:
        return failed("unexplained_weights", "no mixture of old and new explains it")
    agrees = f"(then it agrees to {named.miss:.1e}); "
    if named.factor != 1.0 or named.change:
        change = named.change or f"times {named.factor:.4g}"
        altered = f"{named.label} is {change}"
        return failed("altered_on_load", altered, f"in the engine {altered} {agrees}")
    return failed("stale_tensors", f"{named.label} is old", f"old in the engine: {named.label} {agrees}")


def _stale_cache(pair: Pair, measured: PerturbationScores) -> Failed | None:
    """Tokens drawn after the update over prompts that were cached before it are not of the new weights."""
    size = np.abs(measured.cache_gap)
    if size.max() <= _cache_limit(pair, measured):
        return None
    summary = "after a sync the engine answers from a prefix cache of the old weights"
    evidence = (
        f"tokens drawn over prompts that were cached before the update are off by up to {size.max():.1e} nats"
        f"{CLAIMED if pair.receipt is not None and pair.receipt.cache_cleared else ''}"
    )
    return Failed("stale_prefix_cache", summary, evidence, size, measured.cached.owners)


def _not_put_back(canary: Canary, measured: PerturbationScores, restored: float) -> Failed | None:
    """The second sync, which puts the old weights back, did not arrive."""
    if restored <= measured.limit:
        return None
    still = float(np.abs(measured.back - measured.new).mean())
    cause = "not_delivered" if still <= measured.limit else "unexplained_weights"
    evidence = (
        f"mean |engine − trainer| {restored:.1e} nats; against the weights before that sync {still:.1e}"
    )
    size = np.full(canary.owners.size, restored)
    return Failed(cause, "weights that were put back did not arrive", evidence, size, canary.owners)


def _other_checkpoint(
    pair: Pair, canary: Canary, measured: PerturbationScores, restored: float
) -> Failed | None:
    """The gap that the first sync ever closed was there because the engine had been started on other
    weights."""
    if canary.clean_gap_nats:  # a sync was measured before: the engine has had the trainer's weights
        return None
    after = max(CANARY_MULTIPLE * max(restored, CANARY_FLOOR), OTHER_CHECKPOINT * pair.noise.p50)
    if not measured.ground.mean() > after:
        return None
    summary = "before the first sync the engine held other weights than the trainer"
    evidence = f"a sync brought the gap to {restored:.1e} nats"
    return Failed("checkpoint_differs", summary, evidence, measured.ground, canary.owners)


def _cache_limit(pair: Pair, measured: PerturbationScores) -> float:
    """Largest |gap| over a prompt that was cached before the update, nats.

    What the sides differ by over the same prompts before it is no sign of a stale cache; it is scored where
    something is off.
    """
    limit = max(pair.noise.p999, CANARY_MULTIPLE * float(measured.ground.max()))
    if np.abs(measured.cache_gap).max() <= limit:
        return limit
    before = measured.filling.scored(pair.trainer) - measured.filling.engine_logprobs
    return max(limit, CANARY_MULTIPLE * float(np.abs(before).max()))


def _wrong_version(pair: Pair, sample: Samples, version: int) -> str:
    if not pair.engine.ready.capabilities["version_spans"].supported:
        return ""
    said = {span.version for s in sample for span in s.version_spans}
    return (
        "" if said <= {version} else f"completions of version {version} say that they are of {sorted(said)}"
    )
