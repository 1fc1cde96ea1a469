"""Layer 1: requests for several samples, as training makes them. All else is judged on requests for one."""

from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.fitting import miss_of
from lockstep.parity.explain.rows import Explanation
from lockstep.parity.explain.semantics.alignment import examine, transformed
from lockstep.parity.explain.semantics.draws import draw_groups
from lockstep.parity.explain.semantics.unasked import unasked
from lockstep.parity.pair import Pair
from lockstep.parity.probes import probe_prompts
from lockstep.parity.search_tolerances import EXPLAINS
from lockstep.parity.tolerances import LOG_CHANCE
from lockstep.records.samples import Group, Samples
from lockstep.records.tokens import SamplingParams

PROMPTS = 4
TOKENS = 8
"""So many are drawn for each sample."""


class Grouped(NamedTuple):
    """Requests for several samples, and what became of them."""

    wrong: Explanation | None
    """None where nothing is."""
    sample: Samples
    gap: np.ndarray
    """Trainer − engine, float32 [T]; one NaN where a token came without a number."""


def examine_groups(pair: Pair, asked: SamplingParams) -> Grouped:
    """Draw ``training.group_size`` samples of a few prompts, and say what is wrong with them.

    Only where one sample a request is right: then what is wrong here is wrong because of n. The prompts are
    new ones, for a warm prefix cache is layer 2's.
    """
    shortest = sorted(probe_prompts(pair, 2 * PROMPTS, pair.seed + 1), key=len)[:PROMPTS]
    sampling = replace(asked, n=pair.recipe.training.group_size, max_tokens=TOKENS)
    sample = draw_groups(pair, shortest, sampling)
    if sample.missing:
        text = (
            f"{sample.missing} of {sample.engine_logprobs.size} tokens came without a finite log-probability"
        )
        missing = Explanation("missing_logprobs", _only(sampling, text))
        return Grouped(missing, sample, np.full(1, np.nan, np.float32))
    trainer = sample.scored(pair.trainer)
    gap = trainer - sample.engine_logprobs
    agrees = within(pair.noise, gap)
    wrong = _repeated(sample.groups, trainer) if agrees else _explained(pair, sample.apart(), trainer)
    told = None if wrong is None else Explanation(wrong.cause, _only(sampling, wrong.evidence))
    return Grouped(told, sample, gap)


def _only(sampling: SamplingParams, text: str) -> str:
    return f"only where one request asks for n = {sampling.n} samples: {text}"


def _repeated(groups: list[Group], trainer: np.ndarray) -> Explanation | None:
    """Samples of one prompt that are alike more often than chance makes them."""
    log_chance = 0.0
    count = 0
    at = 0
    for group in groups:
        known: set[bytes] = set()
        for ids in group.completions:
            if ids.tobytes() in known:
                # Its own chance times the samples that it may repeat: a bound, and no chance is above 1.
                log_chance += min(
                    float(trainer[at : at + len(ids)].sum()) + np.log(len(group.completions)), 0.0
                )
                count += 1
            known.add(ids.tobytes())
            at += len(ids)
    if log_chance >= LOG_CHANCE:
        return None
    return Explanation(
        "draws_differ",
        f"{count} samples repeat another of their prompt; the chance of that is e^{log_chance:.0f}",
    )


def _explained(pair: Pair, samples: Samples, trainer: np.ndarray) -> Explanation:
    """What is wrong with the numbers, as far as layer 1 knows it."""
    evidence = Evidence.by_trainer(samples, trainer)
    size = np.abs(trainer - samples.engine_logprobs)
    cause = transformed(pair, evidence)
    if cause is None:
        hidden = unasked(pair, samples, min(pair.noise.p50, EXPLAINS * miss_of(size)))
        if hidden is not None:
            cause = Explanation(hidden.cause, f"{hidden.name} fits to {hidden.miss:.1e} nats")
    differs = f"the trainer differs by {np.median(size):.1e} nats in the median, {size.max():.1e} at most"
    return (
        cause
        or examine(pair, evidence)
        or Explanation("unexplained_semantics", f"{differs}{pair.search.told()}")
    )
