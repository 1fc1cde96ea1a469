"""Full depth: one factor of the engine's path at a time, on an engine started with it, against itself.

    recipe's engine ── passes ──►  same, prefill in portions      ─► A against its own B, corruption
                                   same, asynchronous scheduling  ─► …
                                   same, a starved KV cache       ─► …

Which factors there are, and by which options, the engine's adapter declares. The trainer has no part in it,
so only engines are started. What an engine cannot be started with is NOT_RUN, and said.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.engines.base import Engine, PathFactor
from lockstep.errors import EngineDied, LockstepError
from lockstep.metrics.reduce import quantiles_abs
from lockstep.parity.causes import finding
from lockstep.parity.evidence import within
from lockstep.parity.explain.path.corruption import corrupted
from lockstep.parity.pair import Pair
from lockstep.parity.probes import LONGEST, ROOM, probe_prompts
from lockstep.records.samples import Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import Finding, Verdict

PROMPTS = 16


Opener = Callable[[Recipe, Path, Callable[[str], None]], AbstractContextManager[Engine]]
"""Starts an engine on a recipe, with its log file and someone to tell."""


def deepen(pair: Pair, path: Verdict, open_engine: Opener) -> Verdict:
    """Layer 2's verdict with every factor measured besides, each on an engine that ``open_engine`` starts.

    A failing factor fails the layer.
    """
    ready = pair.engine.ready
    factors = pair.engine.facts.factors
    findings = list(path.findings)
    figures = dict(path.figures)
    skipped = []
    for factor in factors:
        pair.say(f"ladder: path: {factor.cause.replace('_', ' ')}")
        options = factor.options(ready, LONGEST + ROOM)
        try:
            sample, rescored, counted = _measure(pair, factor, options, open_engine)
        except _NotStartedError as error:
            skipped.append(f"{factor.cause}: {error}")
            continue
        except EngineDied as error:
            size = np.full(1, np.nan)
            text = f"the engine died with {options}: {error.got}"
            findings.append(
                finding(factor.cause, size, np.zeros(1, int), text, pair.engine.fix(factor.cause))
            )
            continue
        gap = sample.engine_logprobs - rescored
        figures |= {factor.counter: counted} if factor.counter else {}
        figures |= {f"{factor.cause}_abs_{name}_nats": value for name, value in quantiles_abs(gap).items()}
        named = _judge(pair, factor, options, sample, rescored)
        findings += [named] if named is not None else []
    if not factors:
        skipped.append(f"no factor can be switched in {ready.engine} {ready.version}")
    figures["factors_not_run"] = skipped
    told = [factor.cause.replace("_", " ") for factor in factors if f"{factor.cause}_abs_max_nats" in figures]
    summary = (
        f"{path.summary}; {', '.join(told) or 'no factor'} too"
        f"{'; not run: ' + '; '.join(skipped) if skipped else ''}"
    )
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


class _NotStartedError(Exception):
    """The engine does not start with the factor, or ignores it."""


class _Measured(NamedTuple):
    sample: Samples
    rescored: np.ndarray
    """Scores by the same engine, float32 [T]."""
    counted: float
    """What the factor's counter counted; 0 where it has none."""


def _measure(pair: Pair, factor: PathFactor, options: dict[str, Any], open_engine: Opener) -> _Measured:
    """On an engine with the factor on.

    No seeds: an engine may not be able to prefill a seeded prompt in portions.
    """
    recipe = replace(
        pair.recipe, engine=replace(pair.recipe.engine, options=pair.recipe.engine.options | options)
    )
    prompts = probe_prompts(pair, PROMPTS, pair.seed)
    room = int(options.get("max_model_len", recipe.engine.max_model_len)) - max(map(len, prompts)) - 1
    plain = SamplingParams(max_tokens=min(factor.tokens, room))
    with tempfile.TemporaryDirectory(prefix="lockstep-factor-") as scratch, ExitStack() as stack:
        try:
            engine = stack.enter_context(open_engine(recipe, Path(scratch) / "engine.log", lambda text: None))
        except LockstepError as error:
            raise _NotStartedError(ascii(error.got)) from error
        # By an option's own name, without the section that it is resolved in.
        resolved = {key.rpartition(".")[2]: value for key, value in engine.ready.resolved.items()}
        ignored = [name for name, value in options.items() if resolved.get(name, value) != value]
        if ignored:
            raise _NotStartedError(f"{ignored[0]} resolved to {resolved[ignored[0]]}")
        sample = Samples.of(prompts, engine.sample(prompts, [plain] * len(prompts)), plain)
        counted = engine.counters().get(factor.counter, 0.0)
        if factor.counter and not counted:
            raise _NotStartedError(f"the engine counts no {factor.counter}")
        return _Measured(sample, sample.rescored(engine), counted)


def _judge(
    pair: Pair, factor: PathFactor, options: dict[str, Any], sample: Samples, rescored: np.ndarray
) -> Finding | None:
    gap = sample.engine_logprobs - rescored
    corruption = corrupted(pair, sample, rescored)
    if corruption is None and within(pair.engine_noise, gap):
        return None
    text = (
        corruption.evidence()
        if corruption is not None
        else f"A − B reaches {np.abs(gap).max():.1e} nats with {options}"
    )
    return finding(factor.cause, np.abs(gap), sample.owners, text, pair.engine.fix(factor.cause))
