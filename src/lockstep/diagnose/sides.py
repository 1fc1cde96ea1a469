"""One engine of an upgrade: what it resolves to, what it says, and what it does at a weight update.

recipe ─► as_it_comes: what Lockstep would set is left to the engine's own defaults
pair   ─► observed:    the same prompts and seeds on every engine; one draw to warm up, one that counts
       ─► at_update:   what its own weight update leaves out, planted and scored (layer 3 names it)
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.deep.switch import replay_switch
from lockstep.engines.audit import KnobRow, audit
from lockstep.engines.registry import checklist, choose, facts_of
from lockstep.faults.campaign import planted
from lockstep.faults.catalogue import FAULTS
from lockstep.metrics.reduce import mean_over_sequences, quantiles_abs
from lockstep.parity.canary import Canary
from lockstep.parity.ladder import PROOF_TOKENS
from lockstep.parity.layers import weights
from lockstep.parity.pair import Pair, draw
from lockstep.parity.probes import probe_prompts
from lockstep.parity.tolerances import DISTINGUISHING_TEMPERATURE, TELLING_LOG_T
from lockstep.records.samples import Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import Verdict
from lockstep.runs.manifest import steady

KEPT = {"skip_tokenizer_init", "trust_remote_code"}
"""Settings of Lockstep's that stay, for they say nothing of numbers, state or speed."""
LEFT_TO_IT = ("enable_chunked_prefill", "max_num_batched_tokens", "max_num_seqs")
"""Set by Lockstep on a CPU, beside what its facts declare. Not left to it: eager mode, for compiling takes
minutes, and blocks of 32 tokens, for a prefix shorter than a block is never cached."""
UPDATES = {
    "stale_head": "a weight update does not rebuild the head's packed copy",
    "stale_prefix_cache": "a weight update does not clear the prefix cache",
}
"""Planted fault → what the engine's own update leaves out; Lockstep's worker does both."""
IN_FLIGHT = "in_flight_update"
AT_ONCE = "a weight update pauses nothing: requests in flight go on over the old weights' cache"


class Side(Struct, frozen=True, kw_only=True):
    """One engine on the probes. All figures are of the same prompts and seeds."""

    engine: str
    """``vllm 0.18.1 (V1)``."""
    generation: str = ""
    temperature: float
    """The probes were drawn at."""
    n_tokens: int
    gap_mean_nats: float
    """Mean of trainer − engine at that temperature, with its sign: what a clip range sees."""
    gap_mean_error_nats: float
    """Standard error of that mean, by completion."""
    gap_abs_nats: dict[str, float]
    """|trainer − engine| at T = 1: p50, p999, max."""
    decode_to_prefill_nats: float
    """Largest |A − B| at T = 1; NaN where it cannot re-score."""
    prompt_temperature_nats: float
    """Mean |trainer at T − engine's score of the same tokens asked for at T|; NaN where it has none at T."""
    tokens_per_s: float
    load_s: float
    """Seconds that one weight update takes, as the engine timed it; NaN where it takes none."""
    can: dict[str, bool]
    how: dict[str, str]
    resolved: dict[str, str]
    rows: tuple[KnobRow, ...]
    """The audit: each setting that moves numbers or state."""


class Left(Struct, frozen=True, kw_only=True):
    """What the engine's own weight update leaves out."""

    fault: str
    what: str
    how: str = ""
    """How it was measured."""
    effect_nats: float = float("nan")
    ci95: tuple[float, float] = (float("nan"), float("nan"))
    reason: str = ""
    """Why it was not measured here."""
    fix: str = ""


@dataclass(frozen=True)
class FirstRun:
    """The new engine with its own defaults."""

    side: Side
    left: list[Left]
    untempered: float
    """What prompt log-probabilities at T = 1 are off by where the sampler's T is meant, nats."""
    verdicts: list[Verdict]


def as_it_comes(recipe: Recipe, version: str) -> Recipe:
    """The recipe on an engine version with that engine's own defaults.

    The recipe's own ``engine.options`` are its own version's, and go to no other.
    """
    engine = replace(recipe.engine, name="vllm", version=version, python="")
    own = recipe.engine.options if recipe.engine.version == version else {}
    # None in the place of Lockstep's own: the engine's default.
    names = {*facts_of(choose(replace(engine, options={}))).defaults, *LEFT_TO_IT} - KEPT
    return replace(recipe, engine=replace(engine, options=dict.fromkeys(sorted(names)) | own))


def telling_temperature(recipe: Recipe) -> float:
    """At which raw and tempered numbers differ: the recipe's, unless it is so near to 1 that they do not."""
    own = recipe.sampling.temperature
    return own if abs(np.log(own)) >= TELLING_LOG_T else DISTINGUISHING_TEMPERATURE


def observed(pair: Pair) -> Side:
    """Measure one running pair."""
    parity = pair.recipe.parity
    ready = pair.engine.ready
    temperature = telling_temperature(pair.recipe)
    prompts = probe_prompts(pair, parity.probe_prompts, pair.seed)
    neutral = SamplingParams(max_tokens=parity.probe_tokens)
    plain = draw(pair, prompts, neutral, pair.seed)  # also warms up what compiles at the first tokens
    own = replace(neutral, temperature=temperature)
    began = time.perf_counter()
    sample = draw(pair, prompts, own, pair.seed)
    seconds = time.perf_counter() - began
    mean, error = mean_over_sequences(sample.scored(pair.trainer) - sample.engine_logprobs, sample.owners)
    at_one = plain.scored(pair.trainer) - plain.engine_logprobs
    can = {name: capability.supported for name, capability in ready.capabilities.items()}
    known = checklist()
    before = plain.rescored(pair.engine) if can["rescore"] else np.full(1, np.nan)
    return Side(
        engine=f"{ready.engine} {ready.version} ({ready.generation})",
        generation=ready.generation,
        temperature=temperature,
        n_tokens=int(sample.engine_logprobs.size),
        gap_mean_nats=mean,
        gap_mean_error_nats=error,
        gap_abs_nats=quantiles_abs(at_one),
        decode_to_prefill_nats=float(np.abs(plain.engine_logprobs - before).max()),
        prompt_temperature_nats=_prompts_at(pair, sample, temperature, can=can["rescore_at_temperature"]),
        tokens_per_s=sample.engine_logprobs.size / seconds,
        load_s=_load(pair) if can["load"] else float("nan"),
        can=can,
        how={name: capability.how for name, capability in ready.capabilities.items()},
        resolved={name: str(value) for name, value in steady(ready.resolved).items()},
        rows=tuple(audit(pair.engine, pair.recipe, known, known.versions[0])),
    )


def _prompts_at(pair: Pair, sample: Samples, temperature: float, *, can: bool) -> float:
    if not can:
        return float("nan")
    scores = sample.rescored(pair.engine, temperature)
    return float(np.abs(sample.scored(pair.trainer) - scores).mean())


def untempered_nats(pair: Pair) -> float:
    """What prompt log-probabilities at T = 1 are off by where T is meant: mean |C(T) − C(1)|, nats."""
    parity = pair.recipe.parity
    prompts = probe_prompts(pair, parity.probe_prompts, pair.seed)
    own = SamplingParams(max_tokens=parity.probe_tokens, temperature=telling_temperature(pair.recipe))
    sample = draw(pair, prompts, own, pair.seed)
    at_one = np.concatenate(pair.trainer.score(sample.groups, 1.0))
    return float(np.abs(sample.scored(pair.trainer) - at_one).mean())


def _load(pair: Pair) -> float:
    # The weights that the engine has already: a whole update that changes nothing.
    pair.sync(pair.version)
    return pair.receipt.load_s if pair.receipt is not None else float("nan")


def at_update(pair: Pair) -> list[Left]:
    """Plant what the engine's own update leaves out; layer 3 scores it. The pair is then as it was."""
    parity = pair.recipe.parity
    prompts = probe_prompts(pair, parity.probe_prompts, pair.seed)
    plain = draw(pair, prompts, SamplingParams(max_tokens=parity.probe_tokens), pair.seed)
    return [*(_left(pair, plain, fault, what) for fault, what in UPDATES.items()), _in_flight(pair)]


def _left(pair: Pair, plain: Samples, name: str, what: str) -> Left:
    ready = pair.engine.ready
    reason = cannot(name, ready.generation, ready.resolved)
    if reason:
        return Left(fault=name, what=what, reason=reason)
    pair.begin_search()
    with planted(pair, FAULTS[name]):
        verdict = weights.judge(pair, Canary.of(plain, PROOF_TOKENS), plain)
    if not verdict.findings:
        return Left(fault=name, what=what, reason=verdict.reason or "it moved no token here")
    named = verdict.findings[0]
    return Left(
        fault=name,
        what=what,
        how="so by itself: planted by leaving Lockstep's mend out, and scored",
        effect_nats=named.effect_nats,
        ci95=named.ci95,
        fix=named.fix,
    )


def _in_flight(pair: Pair) -> Left:
    """What an update under requests in flight makes of their later tokens, where the cache is kept."""
    can = pair.engine.ready.capabilities["pause_keep"]
    if not can.supported:
        return Left(fault=IN_FLIGHT, what=AT_ONCE, reason=can.how)
    replayed = replay_switch(pair, "keep")
    if not replayed.kept.size:
        return Left(fault=IN_FLIGHT, what=AT_ONCE, reason="no completion of the probe spanned the update")
    told = f"completions that spanned one: {replayed.n_spanning}; old cache and new weights explain them to"
    return Left(
        fault=IN_FLIGHT,
        what=AT_ONCE,
        how=f"so by itself: {told} {replayed.kept.max():.0e} nats",
        effect_nats=float(replayed.recomputed.mean()),
        fix="pause before a load: pause_generation(mode='wait'), or 'keep' and a trainer that replays it",
    )


def cannot(name: str, generation: str, resolved: Mapping[str, Any]) -> str:
    """Why an update of this engine leaves nothing of the kind out; empty where it does."""
    if generation not in FAULTS[name].generations:
        return f"a {generation} engine has nothing of the kind"
    if name == "stale_head" and str(resolved.get("worker.head_packed")) == "False":
        return "no packed copy of the head is kept on this processor; one with AVX-512 keeps one"
    if name == "stale_prefix_cache" and str(resolved.get("cache_config.enable_prefix_caching")) == "False":
        return "the prefix cache is off"
    return ""
