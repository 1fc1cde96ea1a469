"""One fixed battery of questions to an engine version: what ``lockstep atlas`` puts in a column.

    as it comes          ─► one sample, its own update, seeds, batches      (``sides.py`` measures)
    with Lockstep's ways ─► the whole ladder

Each answer is PASS, FAIL or NOT_RUN: is it what online RL needs, without anything done about it? With its
effect in nats where there is one. What was not asked is NOT_RUN with the reason, never left out.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from lockstep.deep.switch import replay_switch
from lockstep.diagnose.sides import IN_FLIGHT, Left, Side, at_update, observed, telling_temperature
from lockstep.engines.base import Engine
from lockstep.parity.ladder import climb
from lockstep.parity.pair import Pair, draw
from lockstep.parity.probes import probe_prompts
from lockstep.parity.tolerances import SAME_NATS
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import Status

ALONE = 4
"""Completions drawn once more by themselves."""

QUESTIONS = {
    "logprobs": "sampled tokens' log-probabilities are of the distribution they were drawn from",
    "prompt_logprobs": "prompt log-probabilities are of the request's temperature",
    "generation_config": "a checkpoint's generation_config.json is not applied",
    "prefix_cache": "a weight update clears the prefix cache",
    "stale_head": "a weight update reaches a tied head's packed copy",
    "in_flight": "an update holds requests in flight, or ends them",
    "keep": "requests held over an update go on as their cache says (mode keep)",
    "recompute": "requests held over an update go on over a new cache (mode recompute)",
    "batch": "a completion is the same alone and in a batch",
    "seed": "a request's seed gives the same completion again",
    "mixed_seeds": "so too where other requests of the batch have no seed",
    "head": "the last product can be in fp32 under a bf16 body, by an option of its own",
    "path": "decode agrees with its own prefill",
    "logprob_token_ids": "log-probabilities of chosen tokens, in a batch where others ask for none",
    "clamped": "−inf is reported as such, and not as −9999",
    "hybrid": "a hybrid and an MoE model take a weight update",
    "ladder": "the whole check passes with Lockstep's defaults",
}
NOT_ASKED = {
    "logprob_token_ids": "Lockstep's requests ask for sampled tokens' numbers alone",
    "clamped": "only its HTTP server clamps, and no server was started",
    "hybrid": "no such model comes in a package",
}

HEADS = {
    True: 'hf_overrides = {"head_dtype": "float32"}',
    False: "no option that holds for generating models; Lockstep's plugin does it, and is probed",
}


class Cell(Struct, frozen=True, kw_only=True):
    """One answer."""

    question: str
    status: Status
    says: str
    effect_nats: float = float("nan")
    unit: str = ""


def as_it_is(pair: Pair) -> tuple[list[Cell], Side]:
    """The answers of a running engine with its own defaults."""
    side = observed(pair)
    left = {one.fault: one for one in at_update(pair)}
    prompts = probe_prompts(pair, pair.recipe.parity.probe_prompts, pair.seed)
    own = SamplingParams(
        max_tokens=pair.recipe.parity.probe_tokens, temperature=telling_temperature(pair.recipe)
    )
    sample = draw(pair, prompts, own, pair.seed)
    return [
        *_semantics(pair, side, sample),
        _update("prefix_cache", left["stale_prefix_cache"]),
        _update("stale_head", left["stale_head"]),
        _update("in_flight", left[IN_FLIGHT]),
        *_held(pair),
        *_draws(pair, sample),
        _head(side),
        _path(side),
        *(Cell(question=name, status="NOT_RUN", says=why) for name, why in NOT_ASKED.items()),
    ], side


def as_it_is_set(pair: Pair) -> Cell:
    """The ladder's answer, of an engine with Lockstep's defaults."""
    verdicts = climb(pair).verdicts
    failed = next((one for one in verdicts if one.status == "FAIL"), None)
    if failed is not None:
        one = failed.findings[0]
        says = f"layer {failed.layer}: {one.cause.replace('_', ' ')}"
        return Cell(
            question="ladder", status="FAIL", says=says, effect_nats=one.effect_nats, unit="mean |gap|"
        )
    open_ = [f"{one.layer}: {one.reason}" for one in verdicts if one.status != "PASS"]
    if open_:
        return Cell(question="ladder", status="NOT_RUN", says="; ".join(open_))
    largest = next(one for one in verdicts if one.layer == "numerics").figures.get("gap_abs_max_nats", np.nan)
    return Cell(
        question="ladder", status="PASS", says="five layers", effect_nats=float(largest), unit="largest |gap|"
    )


def _semantics(pair: Pair, side: Side, sample: Samples) -> Iterator[Cell]:
    tempered = sample.scored(pair.trainer)
    raw = np.concatenate(pair.trainer.score(sample.groups, 1.0))
    mode = next((row.resolved for row in side.rows if row.knob == "log-probability mode"), "-")
    fits = _fits(sample.engine_logprobs, tempered, raw)
    yield Cell(
        question="logprobs",
        status="PASS" if fits == "tempered" else "FAIL",
        says=f"{'no choice' if mode in ('None', '-') else mode}, measures as {fits}",
        effect_nats=side.gap_mean_nats,
        unit=f"mean of trainer − engine at T = {side.temperature:g}",
    )
    if side.can["rescore"]:
        asked = sample.rescored(_AsAsked(pair.engine), side.temperature)
        fits = _fits(asked, tempered, raw)
        yield Cell(
            question="prompt_logprobs",
            status="PASS" if fits == "tempered" else "FAIL",
            says=f"asked at T = {side.temperature:g}, measure as {fits}",
            effect_nats=float(np.abs(tempered - asked).mean()),
            unit="mean |trainer at T − engine|",
        )
    else:
        yield Cell(question="prompt_logprobs", status="NOT_RUN", says=side.how["rescore"])
    config = next(row for row in side.rows if row.knob == "generation_config")
    yield Cell(
        question="generation_config",
        status="PASS" if config.verdict == "ok" else "FAIL",
        says=f"{config.resolved} by default; a request that sets every field is not touched",
    )


class _AsAsked(Struct, frozen=True):
    """An engine that re-scores at any temperature it is asked for, whatever its adapter says of that."""

    engine: Engine

    def score(self, sequences: Sequence[np.ndarray], temperature: float) -> Sequence[np.ndarray]:
        """See :class:`~lockstep.records.samples.Rescorer`."""
        return self.engine.score_as_asked(sequences, temperature)


def _fits(engine: np.ndarray, tempered: np.ndarray, raw: np.ndarray) -> str:
    """Which of the two the engine's numbers are: by the median, for a mixture would fit neither."""
    off = {
        "tempered": float(np.median(np.abs(engine - tempered))),
        "raw": float(np.median(np.abs(engine - raw))),
    }
    best = min(off, key=lambda name: off[name])
    return (
        best if off[best] <= SAME_NATS else f"neither (tempered {off['tempered']:.1e}, raw {off['raw']:.1e})"
    )


def _update(question: str, one: Left) -> Cell:
    if one.reason:
        nothing = "nothing of the kind" in one.reason
        return Cell(question=question, status="PASS" if nothing else "NOT_RUN", says=one.reason)
    return Cell(
        question=question,
        status="FAIL",
        says=one.how,
        effect_nats=one.effect_nats,
        unit="mean |engine − trainer| after it",
    )


def _held(pair: Pair) -> Iterator[Cell]:
    can = pair.engine.ready.capabilities["pause_keep"]
    for mode in ("keep", "recompute"):
        if not can.supported:
            yield Cell(question=mode, status="NOT_RUN", says=can.how)
            continue
        replayed = replay_switch(pair, mode)
        if not replayed.right.size:
            yield Cell(question=mode, status="NOT_RUN", says="no completion of the probe spanned the update")
            continue
        largest = float(replayed.right.max())
        yield Cell(
            question=mode,
            status="PASS" if largest <= SAME_NATS else "FAIL",
            says=f"{replayed.n_spanning} completions, {replayed.right.size} tokens after it; "
            f"the other assumption is off by {replayed.wrong.max():.1e}",
            effect_nats=largest,
            unit="largest |trainer − engine|",
        )


def _draws(pair: Pair, sample: Samples) -> Iterator[Cell]:
    """Completions drawn again: alone, with the same seeds, and among others that have none."""
    prompts = sample.prompts
    sampling = sample.sampling
    # Row i of a draw has the i-th seed after the first.
    alone = [draw(pair, prompts[i : i + 1], sampling, pair.seed + i)[0] for i in range(ALONE)]
    yield _same("batch", alone, sample[:ALONE])
    yield _same("seed", draw(pair, prompts, sampling, pair.seed), sample)
    params = [replace(sampling, seed=None if row % 2 else pair.seed + row) for row in range(len(prompts))]
    mixed = Samples.of(prompts, pair.engine.sample(prompts, params), sampling)
    yield _same("mixed_seeds", mixed[::2], sample[::2])


def _same(question: str, one: Sequence[Sample], other: Sequence[Sample]) -> Cell:
    same = sum(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(one, other, strict=True))
    return Cell(
        question=question,
        status="PASS" if same == len(one) else "FAIL",
        says=f"{same} of {len(one)} completions token for token the same",
    )


def _head(side: Side) -> Cell:
    native = side.resolved.get("worker.head_by_option") == "True"
    return Cell(question="head", status="PASS" if native else "FAIL", says=HEADS[native])


def _path(side: Side) -> Cell:
    off = side.decode_to_prefill_nats
    return Cell(
        question="path",
        status="NOT_RUN" if np.isnan(off) else "PASS" if off <= SAME_NATS else "FAIL",
        says=side.how["rescore"] if np.isnan(off) else "at T = 1",
        effect_nats=off,
        unit="largest |decode − prefill|",
    )
