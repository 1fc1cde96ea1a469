"""Layer 3: does the engine serve the weights it is sent?

Perturb → sync → prove. Every tensor of the trainer gets noise, the weights are published and loaded, and both sides score
known tokens. Where they differ by more than they did before, the residue is explained by the hypothesis that fits: nothing
delivered; the head old under a new body; one or some tensors old (``attribution.py``). Then the weights are put back, exactly,
and proven again. Prompts that were in the prefix cache before the update are drawn from after it, to show a stale cache.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.parity.canary import Canary
from lockstep.parity.causes import finding
from lockstep.parity.explain.weights import attribution
from lockstep.parity.pair import Pair, draw
from lockstep.parity.tolerances import CANARY_FLOOR, CANARY_MULTIPLE, EXPLAINS, PERTURBATION_OVER_NOISE
from lockstep.policy.variants import EarlierHead, Perturbed
from lockstep.records.samples import Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import Verdict

PROBE_VERSION = 10**9
"""Version number of perturbed weights: no training run counts as far."""
CACHE_TOKENS = 2
CACHE_PROMPTS = 4


@dataclass(eq=False)
class Measured:
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
    back: np.ndarray = None  # type: ignore[assignment]
    """The engine after the old weights were loaded again."""

    @property
    def ground(self) -> np.ndarray:
        """|engine − trainer| before anything was synced."""
        return np.abs(self.first - self.old)

    @property
    def shift(self) -> float:
        """How far the perturbation moved the trainer's own scores, mean, nats: what a lost update would show."""
        return float(np.abs(self.new - self.old).mean())

    @property
    def blurred(self) -> bool:
        """True when the sides differed so much before that scores tell nothing of this update: then moves are compared.

        Either a lost update would pass for delivered, or an earlier one was lost. Sides that agree after it are not blurred.
        """
        if float(np.abs(self.engine - self.new).mean()) <= self.noise:
            return False
        return self.limit >= self.shift or float(self.ground.mean()) > self.limit

    def residue(self, scores: np.ndarray) -> float:
        """mean |engine − scores|, nats; where that is blurred, of the moves that led there."""
        if self.blurred:
            return float(np.abs((self.engine - self.first) - (scores - self.old)).mean())
        return float(np.abs(self.engine - scores).mean())

    @property
    def delivered(self) -> bool:
        """True when the engine serves what it was sent; where that is blurred, when it moved, and not as with an old head."""
        new, old, old_head = (self.residue(scores) for scores in (self.new, self.old, self.old_head))
        return old > self.noise and old_head > EXPLAINS * new if self.blurred else new <= self.limit


def judge(pair: Pair, canary: Canary, sample: Samples) -> Verdict:
    """The verdict of layer 3. Leaves trainer and engine with the weights they had, and the canary with its clean gap.

    Args:
        sample: drawn under the weights that both sides are meant to hold.
    """
    measured = _measure(pair, canary, sample)
    restored = canary.measure(pair)
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
    }
    if not measured.shift >= PERTURBATION_OVER_NOISE * pair.noise.p50:
        reason = f"the perturbation moved the canary by {measured.shift:.1e} nats only: no stale weight could be seen"
        return Verdict(layer="weights", status="NOT_RUN", summary="nothing proven", reason=reason, figures=figures)
    failed = _failed(pair, canary, sample, measured, restored.gap_abs_mean_nats)
    if failed is not None:
        cause, summary, size, owners, text = failed
        found = finding(cause, size, owners, text, pair.engine.fix(cause), 2 * canary.scores.size + measured.cache_gap.size)
        return Verdict(
            layer="weights", status="FAIL", summary=summary, n_tokens=found.n_tokens, findings=(found,), figures=figures
        )
    canary.clean_gap_nats = restored.gap_abs_mean_nats
    new = figures["residue_all_new_abs_mean_nats"]
    seen = [] if measured.blurred else ["no stale tensor or head"]
    seen += ["no stale prefix cache"] if _cache_limit(pair, measured) < measured.shift else []
    seen = seen or ["one stale tensor would be lost in what the sides differ by anyway"]
    summary = f"a change of {measured.shift:.2f} nats arrived to within {new:.1e}, and back again; {', '.join(seen)}"
    n = 2 * canary.scores.size + measured.cache_gap.size
    return Verdict(layer="weights", status="PASS", summary=summary, n_tokens=n, figures=figures)


def _measure(pair: Pair, canary: Canary, sample: Samples) -> Measured:
    cached = sorted(sample.prompts, key=len)[-CACHE_PROMPTS:]  # the longest fill blocks of the prefix cache
    few = SamplingParams(max_tokens=CACHE_TOKENS)
    filling = draw(pair, cached, few, pair.seed)
    old = canary.trainer_scores(pair)
    first = canary.engine_scores(pair)
    limit = CANARY_MULTIPLE * max(canary.clean_gap_nats or float(np.abs(first - old).mean()), CANARY_FLOOR)
    noise = perturbed(pair)
    with pair.trainer.holding(noise):
        pair.sync(PROBE_VERSION)
        engine, new = canary.engine_scores(pair), canary.trainer_scores(pair)
        after = draw(pair, cached, few, pair.seed)
        cache_gap = after.scored(pair.trainer) - after.engine_logprobs
        with pair.trainer.holding(EarlierHead(noise.before)):
            old_head = canary.trainer_scores(pair)
        measured = Measured(limit, pair.noise.p50, first, old, new, engine, old_head, filling, after, cache_gap)
        plain = (measured.residue(scores) for scores in (new, old, old_head))
        if not measured.blurred and not min(plain) <= measured.limit:
            pair.say("weights: not all arrived; looking for the tensors, which can take a minute")
            measured.named = (
                attribution.rounded(pair, canary, engine, measured.limit)
                or attribution.stale(pair, canary, noise.before, engine, measured.limit)
                or attribution.scaled(pair, canary, engine, measured.limit)
            )
    pair.sync(pair.version)
    measured.back = canary.engine_scores(pair)
    return measured


def _failed(
    pair: Pair, canary: Canary, sample: Samples, measured: Measured, restored: float
) -> tuple[str, str, np.ndarray, np.ndarray, str] | None:
    """Cause, summary, effect per token, owners and evidence of what is wrong; None when nothing is."""
    size, owners, limit = np.abs(measured.engine - measured.new), canary.owners, measured.limit
    told = ", ".join(
        f"{name}: {measured.residue(scores):.1e}"
        for name, scores in {"all new": measured.new, "none delivered": measured.old, "head old": measured.old_head}.items()
    )
    text = f"mean |engine − trainer|, nats, by hypothesis: {told}"
    served = "after a sync the engine does not serve the weights it was sent: "
    if not measured.delivered:
        best = min(measured.residue(measured.old), measured.residue(measured.old_head))
        close = measured.blurred or best <= limit
        if close and measured.residue(measured.old) == best:
            moved = measured.back - measured.first
            behind = np.abs(moved - (measured.new - measured.old)).mean() < np.abs(moved).mean()
            cause = "one_version_behind" if behind else "not_delivered"
            return cause, served + cause.replace("_", " "), size, owners, text
        if close:
            summary = served + "its lm_head is stale: a packed copy holds the old weights"
            return "stale_head", summary, size, owners, text
        if measured.named is not None:
            named = measured.named
            if named.factor != 1.0 or named.change:
                change = named.change or f"times {named.factor:.4g}"
                text = f"in the engine {named.label} is {change} (then it agrees to {named.miss:.1e}); {text}"
                return "altered_on_load", f"{served}{named.label} is {change}", size, owners, text
            text = f"old in the engine: {named.label} (then it agrees to {named.miss:.1e}); {text}"
            return "stale_tensors", f"{served}{named.label} is old", size, owners, text
        return "unexplained_weights", served + "no mixture of old and new explains it", size, owners, text
    wrong = _wrong_version(pair, sample, pair.version) or _wrong_version(pair, measured.cached, PROBE_VERSION)
    if wrong:
        return "version_tag", wrong, np.zeros(owners.size), owners, wrong
    if not np.abs(measured.cache_gap).max() <= _cache_limit(pair, measured):
        largest = np.abs(measured.cache_gap).max()
        text = f"tokens drawn over prompts that were cached before the update are off by up to {largest:.1e} nats"
        summary = "after a sync the engine answers from a prefix cache of the old weights"
        return "stale_prefix_cache", summary, np.abs(measured.cache_gap), measured.cached.owners, text
    if not restored <= limit:
        still = float(np.abs(measured.back - measured.new).mean())
        cause = "not_delivered" if still <= limit else "unexplained_weights"
        text = f"mean |engine − trainer| {restored:.1e} nats; against the weights before that sync {still:.1e}"
        return cause, "weights that were put back did not arrive", np.full(owners.size, restored), owners, text
    first = not canary.clean_gap_nats
    if first and measured.ground.mean() > max(CANARY_MULTIPLE * max(restored, CANARY_FLOOR), 2 * pair.noise.p50):
        summary = "before the first sync the engine held other weights than the trainer"
        return "checkpoint_differs", summary, measured.ground, owners, f"a sync brought the gap to {restored:.1e} nats"
    return None


def _cache_limit(pair: Pair, measured: Measured) -> float:
    """Largest |gap| over a prompt that was cached before the update, nats.

    What the sides differ by over the same prompts before it is no sign of a stale cache; it is scored where something is off.
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
    return "" if said <= {version} else f"completions of version {version} say that they are of {sorted(said)}"


def perturbed(pair: Pair) -> Perturbed:
    """Noise on every parameter of the trainer, large against what arithmetic brings."""
    return Perturbed(pair.trainer.snapshot(), pair.noise.perturbation, pair.seed)
