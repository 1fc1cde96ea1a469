"""Layer 1: which distribution are the engine's log-probabilities of, and is it the one the trainer scores?

The engine's numbers are identified by measurement on tokens drawn at T ≠ 1, where the hypotheses differ:

* *raw*: A equals B, the same engine's re-score of the same tokens, which is always of the raw logits. The trainer has no part
  in this comparison, so wrong weights or coarse arithmetic further down cannot disturb it.
* *tempered*: A equals the trainer's scores at that temperature, to within what trainer and engine differ by at T = 1 anyway.

Whether what the engine *is* matters depends on the recipe: at T = 1 without truncation or penalties, raw is what it should be.
"""

from dataclasses import dataclass

import numpy as np

from lockstep.metrics.reduce import bootstrap_mean_ci95
from lockstep.parity.pair import Pair, Sampled, trainer_hidden_by_row
from lockstep.parity.tolerances import SEMANTICS_MARGIN
from lockstep.policy.truncation import kept_log_mass
from lockstep.records.verdicts import Finding, Verdict


@dataclass(frozen=True)
class Identified:
    """What an engine's log-probabilities are of: ``raw``, ``tempered`` or ``unexplained``; with the fits that say so."""

    name: str
    fit_raw: float
    """median |A − B|, nats."""
    fit_tempered: float
    """median |trainer at T − A|, nats."""
    ground: float
    """median |trainer at 1 − B|: what the two sides differ by anyway, nats."""

    def evidence(self) -> str:
        """The fits, for people."""
        return (
            f"raw fits to {self.fit_raw:.1e} nats, tempered to {self.fit_tempered:.1e} (medians); "
            f"at T=1 the two sides differ by {self.ground:.1e}"
        )


def identify(pair: Pair, telling: Sampled, rescored: np.ndarray) -> Identified:
    """Decide between the hypotheses.

    Args:
        telling: drawn at T ≠ 1, not truncated, not penalised.
        rescored: score B of its tokens.
    """
    at_one, at_t = (np.concatenate(s) for s in pair.policy.score_at(telling.groups, (1.0, telling.sampling.temperature)))
    engine = telling.engine_logprobs
    fit_raw, fit_tempered = float(np.median(np.abs(engine - rescored))), float(np.median(np.abs(at_t - engine)))
    ground = float(np.median(np.abs(at_one - rescored)))
    if fit_raw <= pair.noise.p50 and fit_raw < fit_tempered:
        name = "raw"
    elif fit_tempered <= max(pair.noise.p50, SEMANTICS_MARGIN * ground) and fit_tempered < fit_raw:
        name = "tempered"
    else:
        name = "unexplained"
    return Identified(name, fit_raw, fit_tempered, ground)


def judge(pair: Pair, told: Identified, recipe_sample: Sampled, n_tokens: int, missing: int) -> Verdict:
    """The verdict of layer 1.

    Args:
        told: what the engine reports.
        recipe_sample: drawn with the recipe's own sampling; effects are measured on it.
        n_tokens: how many tokens the identification and the effects rest on.
        missing: how many of them have no finite log-probability.
    """
    sampling = recipe_sample.sampling
    declared = pair.engine.semantics(sampling).describe()
    figures = {
        "identified": told.name,
        "declared": declared,
        "fit_raw_p50_nats": told.fit_raw,
        "fit_tempered_p50_nats": told.fit_tempered,
        "ground_p50_nats": told.ground,
        "missing_logprobs": missing,
    }
    found = _finding(pair, told, recipe_sample, n_tokens, missing)
    if found is not None:
        summary = _SUMMARIES[found.cause].format(t=sampling.temperature, missing=missing, n=n_tokens)
        return Verdict(layer="semantics", status="FAIL", summary=summary, n_tokens=n_tokens, findings=(found,), figures=figures)
    note = " (raw, which is the same at T=1)" if told.name == "raw" else ""
    return Verdict(
        layer="semantics",
        status="PASS",
        summary=f"the engine reports what the trainer scores: the {declared}{note}",
        n_tokens=n_tokens,
        figures=figures,
    )


_SUMMARIES = {
    "missing_logprobs": "{missing} of {n} tokens came without a finite log-probability",
    "unexplained_semantics": "no hypothesis explains the engine's log-probabilities",
    "raw_logprobs": "the engine reports raw log-probabilities (T=1) of tokens that it drew at T={t:g}",
    "truncation_unmodelled": "tokens are drawn from a truncated distribution, the trainer scores the whole one",
    "penalties_unmodelled": "tokens are drawn under penalties that the trainer does not apply",
}


def _finding(pair: Pair, told: Identified, sample: Sampled, n_tokens: int, missing: int) -> Finding | None:
    sampling = sample.sampling
    if missing:
        cause, effects = "missing_logprobs", np.full(1, np.nan)
    elif told.name == "unexplained":
        cause, effects = "unexplained_semantics", _gap(pair, sample)
    elif told.name == "raw" and sampling.temperature != 1.0:
        cause, effects = "raw_logprobs", _gap(pair, sample)
    elif sampling.truncates:
        hidden = trainer_hidden_by_row(pair, sample.groups)
        cause = "truncation_unmodelled"
        effects = np.concatenate([-kept_log_mass(h, pair.policy.head, sampling).numpy(force=True) for h in hidden])
    elif sampling.penalises:
        cause, effects = "penalties_unmodelled", _gap(pair, sample)
    else:
        return None
    interval = bootstrap_mean_ci95(effects, sample.owners) if not missing else (float("nan"), float("nan"))
    return Finding(
        cause=cause,
        effect_nats=float(effects.mean()),
        ci95=interval,
        n_tokens=n_tokens,
        fix=pair.engine.fix(cause),
        evidence=told.evidence(),
    )


def _gap(pair: Pair, sample: Sampled) -> np.ndarray:
    """|what the trainer scores − what the engine reports| for each token of the recipe's own sampling."""
    trainer = np.concatenate(pair.policy.score(sample.groups, sample.sampling.temperature))
    return np.abs(trainer - sample.engine_logprobs)
