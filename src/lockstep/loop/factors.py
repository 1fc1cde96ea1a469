"""Full depth: one factor of the engine's path at a time, each on an engine that is started with it and compared with itself.

    recipe's engine ── passes ──►  same, prefill in portions      ─► A against its own B, corruption
                                   same, asynchronous scheduling  ─► …
                                   same, a starved KV cache       ─► …

The trainer has no part in it, so only engines are started. What an engine cannot be started with is NOT_RUN, and said.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from lockstep.errors import LockstepError
from lockstep.loop.session import Say, open_engine
from lockstep.metrics.reduce import quantiles_abs
from lockstep.parity.causes import finding
from lockstep.parity.corruption import corrupted
from lockstep.parity.evidence import within
from lockstep.parity.pair import Pair, Sampled
from lockstep.parity.probes import probe_prompts
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import Finding, Verdict

TOKENS = 16
PROMPTS = 16


@dataclass(frozen=True)
class Factor:
    """One way through the engine, by the engine's own options."""

    cause: str
    options: dict[str, Any]
    generations: tuple[str, ...] = ("V1",)


FACTORS = (
    # 64 tokens a step: the longer probes are prefilled in two or three portions beside the decodes of the others.
    Factor("chunked_prefill", {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 16}),
    Factor("async_scheduling", {"async_scheduling": True}),
    # The probes need some 40 blocks at once; with 20, one request of the full length still fits and the others are preempted.
    Factor("preemption", {"num_gpu_blocks_override": 20}),
)


def deepen(pair: Pair, say: Say, path: Verdict) -> Verdict:
    """Layer 2's verdict with every factor measured besides; a failing factor fails it."""
    ready, findings, figures, skipped = pair.engine.ready, list(path.findings), dict(path.figures), []
    for factor in FACTORS:
        if ready.engine != "vllm" or ready.generation not in factor.generations:
            skipped.append(f"{factor.cause}: no such switch in {ready.engine} {ready.version}")
            continue
        say(f"ladder: path: {factor.cause.replace('_', ' ')}")
        try:
            sample, rescored = _measure(pair, factor)
        except LockstepError as error:
            skipped.append(f"{factor.cause}: {error.got}")
            continue
        gap = sample.engine_logprobs - rescored
        figures |= {f"{factor.cause}_abs_{name}_nats": value for name, value in quantiles_abs(gap).items()}
        found = _judge(pair, factor, sample, rescored)
        findings += [found] if found is not None else []
    figures["factors_not_run"] = skipped
    told = [factor.cause.replace("_", " ") for factor in FACTORS if f"{factor.cause}_abs_max_nats" in figures]
    summary = f"{path.summary}; {', '.join(told) or 'no factor'} too{'; not run: ' + '; '.join(skipped) if skipped else ''}"
    if findings:
        summary = f"the engine disagrees with itself: {findings[0].cause.replace('_', ' ')}"
    return Verdict(
        layer="path",
        status="FAIL" if findings else path.status,
        summary=summary,
        n_tokens=path.n_tokens,
        findings=tuple(findings),
        figures=figures,
    )


def _measure(pair: Pair, factor: Factor) -> tuple[Sampled, np.ndarray]:
    """A sample and its own re-score on an engine with the factor on. No seeds: vLLM 0.32 cannot chunk a seeded prompt."""
    recipe = replace(pair.recipe, engine=replace(pair.recipe.engine, options=pair.recipe.engine.options | factor.options))
    prompts = probe_prompts(pair, PROMPTS, pair.seed)
    plain = SamplingParams(max_tokens=TOKENS)
    with (
        tempfile.TemporaryDirectory(prefix="lockstep-factor-") as scratch,
        open_engine(recipe, Path(scratch) / "engine.log", lambda text: None) as engine,
    ):
        sample = Sampled(prompts, engine.sample(prompts, [plain] * len(prompts)), plain)
        return sample, sample.rescored(engine)


def _judge(pair: Pair, factor: Factor, sample: Sampled, rescored: np.ndarray) -> Finding | None:
    gap = sample.engine_logprobs - rescored
    found = corrupted(pair, sample, rescored)
    if found is None and within(pair, gap):
        return None
    text = found.evidence() if found is not None else f"A − B reaches {np.abs(gap).max():.1e} nats with {factor.options}"
    return finding(factor.cause, np.abs(gap), sample.owners, text, pair.engine.fix(factor.cause))
