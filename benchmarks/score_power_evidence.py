"""What ``score_power.py`` is made on: the engine's tokens, the slopes of every direction at each, and the
trainer's scores with each fault. Nothing runs here."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from score_power_faults import LEFT_OLD, faults_of, older

from lockstep.config.recipe import Recipe
from lockstep.loop.open import open_session
from lockstep.parity.explain.numerics.by_token import all_slopes
from lockstep.parity.explain.numerics.direction import SCALED, of_tensors, rounding, row_classes
from lockstep.parity.explain.numerics.systematic import by_tokens
from lockstep.parity.pair import Pair, draw
from lockstep.parity.probes import probe_prompts
from lockstep.policy.pulls import Asked, Pulls, scale
from lockstep.policy.variants import QUANTISED, InDtype
from lockstep.records.samples import Group, Sample, Samples
from lockstep.records.versions import VersionSpan
from lockstep.training.trainer import Trainer

TOKENS, LONGEST, CHUNK = 32, 32, 64
"""Of a completion; of a prompt at most; sequences of one request."""


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def drawn(recipe: Recipe, work: Path, n: int) -> None:
    """The engine's tokens, numbers and re-scores, a file for each request."""
    wanted = [work / f"drawn-{number:03d}.npz" for number in range(-(-n // CHUNK))]
    if all(path.exists() for path in wanted):
        return
    with open_session(recipe, work / "engine.log", say) as session:
        for number, path in enumerate(wanted):
            if not path.exists():
                _keep(path, **_request(session.pair, 1_000 + number))
                say(path.name)


def _request(pair: Pair, seed: int) -> dict[str, np.ndarray]:
    sampling = replace(pair.recipe.sampling, max_tokens=TOKENS, stop_token_ids=())
    # The product's probes, cut to what keeps a study of this machine's size: first ids tell them apart.
    prompts = [
        np.r_[ids[:1], ids[1:][-(LONGEST - 1) :]].astype(np.int32) for ids in probe_prompts(pair, CHUNK, seed)
    ]
    sample = draw(pair, prompts, sampling, seed)
    return {
        "prompts": np.concatenate(prompts),
        "prompt_lengths": np.array([len(ids) for ids in prompts]),
        "tokens": sample.token_ids,
        "lengths": sample.lengths,
        "engine": sample.engine_logprobs,
        "rescored": sample.rescored(pair.engine),
    }


def _keep(path: Path, **arrays: np.ndarray) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.rename(path)


def evidence_of(recipe: Recipe, work: Path) -> tuple[Samples, np.ndarray]:
    """All sequences that were drawn, and the engine's re-scores of their tokens."""
    samples: list[Sample] = []
    rescored = []
    for path in sorted(work.glob("drawn-*.npz")):
        kept = np.load(path)
        prompts = np.split(kept["prompts"], kept["prompt_lengths"].cumsum()[:-1])
        ends = kept["lengths"].cumsum()[:-1]
        tokens, engine = np.split(kept["tokens"], ends), np.split(kept["engine"], ends)
        for prompt, ids, numbers in zip(prompts, tokens, engine, strict=True):
            row = len(samples)
            samples.append(
                Sample(
                    group=row,
                    sample=0,
                    item=row,
                    prompt_ids=prompt,
                    token_ids=ids,
                    loss_mask=np.ones(len(ids), bool),
                    engine_logprobs=numbers,
                    version_spans=(VersionSpan(0, len(ids), version=0),),
                    finish_reason="length",
                )
            )
        rescored.append(kept["rescored"])
    return Samples(samples, replace(recipe.sampling, max_tokens=TOKENS)), np.concatenate(rescored)


def slopes(recipe: Recipe, model: Path, work: Path) -> None:
    """∂ log p_i / ∂θ_k, float32 [K, T], at the trainer's weights in fp32."""
    sample, _ = evidence_of(recipe, work)
    for first in range(0, len(sample), CHUNK):
        path = work / f"slopes-{first:05d}.npz"
        if path.exists():
            continue
        trainer = Trainer.load(model, recipe)
        part = sample[first : first + CHUNK]
        with trainer.holding(InDtype("float32", "float32")):
            # A copy for each token, up to it: its pull is then that token's alone.
            copies = [
                Group(one.prompt_ids, [one.token_ids[: n + 1]])
                for one in part
                for n in range(len(one.token_ids))
            ]
            lasts = np.concatenate([np.r_[np.zeros(len(group.completions[0]) - 1), 1.0] for group in copies])
            ways = {SCALED: scale, LEFT_OLD: older, **{form: rounding(form) for form in QUANTISED}}
            (pulled,) = trainer.pulls(copies, [Asked(lasts, ways)], 1.0)
            pair = Pair(None, trainer, None, None, recipe)  # type: ignore[arg-type]  # no engine is asked
            felt = all_slopes(pair, part, part.scored(trainer))
        names, values = _flat(part, pulled, felt)
        (work / "directions.json").write_text(json.dumps(names))
        _keep(path, slopes=values.astype(np.float32))
        say(path.name)


def _flat(part: Samples, pulled: Pulls, felt: dict[str, np.ndarray]) -> tuple[list, np.ndarray]:
    """Directions as the product has them, token by token: [K] and [K, T]."""
    found = list(of_tensors(pulled))
    for only, rows in row_classes(part).items():
        scales = [(way, values) for way, values in found if way.family == SCALED and not way.only]
        found += [(dataclasses.replace(way, only=only), values * rows[part.owners]) for way, values in scales]
    found += by_tokens(part, felt)
    names = [[way.family, list(way.tensors), way.place, way.only] for way, _ in found]
    return names, np.stack([values for _, values in found])


def planted(recipe: Recipe, model: Path, work: Path) -> None:
    """The trainer's bf16 scores, clean and with each fault and size; and fp32's, for its own noise."""
    sample, _ = evidence_of(recipe, work)
    trainer = Trainer.load(model, recipe)
    pair = Pair(None, trainer, None, None, recipe)  # type: ignore[arg-type]  # no engine is asked
    clean = work / "clean.npz"
    if not clean.exists():
        with trainer.holding(InDtype("float32", "float32")):
            exact = sample.scored(trainer)
        _keep(clean, bf16=sample.scored(trainer), exact=exact)
    bf16 = np.load(clean)["bf16"]
    for which in (1, 2, 0):  # the middle size of all first, so that what is cut short is a study of one size
        for number, fault in enumerate(faults_of(trainer)):
            path = work / f"fault-{number:02d}-{fault.sizes[which]:g}.npz"
            if not path.exists():
                _keep(path, scores=fault.scores(pair, sample, bf16, fault.sizes[which]))
                say(f"{fault.name} {fault.sizes[which]:g}")
