"""Layer 1, tokens: are the numbers beside the tokens that they are of, and are the tokens those that were drawn?

Judged on ``neutral`` (T = 1; a log's own T), where no choice of distribution plays a part. A is first held against B, the same
engine's own re-score, row by row. Where most rows do not agree, each way in which rows are known to be mangled is tried; the
first that makes them agree is the cause. Where they do agree and the trainer's do not, the prompt may have been edited on its way
to the engine.
"""

import re
from collections.abc import Callable

import numpy as np
import torch
from msgspec.structs import replace

from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.rows import MOST, Mangled, off, rows_of
from lockstep.parity.explain.semantics.portions import LEAST_ROWS, where
from lockstep.parity.explain.semantics.prompt_edits import edited_prompts, miscounted_prompts
from lockstep.parity.explain.semantics.sampler import distributions
from lockstep.parity.explain.semantics.transforms import transform
from lockstep.parity.pair import Pair, draw
from lockstep.parity.search import keep_looking
from lockstep.records.samples import Group, Samples

STOP_TOKENS = 4
SCREENED = 3
"""Rows that an explanation is tried on before it is tried on all."""
FARTHEST_SHIFT = 3
SWAP_TOKENS = 8
"""Of each completion, held against every row's prompt."""
NEAREST = 8
"""Tokens of the right log-probability that are tried in the place of an edited one."""
MOST_EDITS = 4
PROVING = 1
"""Tokens after an edited one that must agree once it is put right: one in a thousand agrees by chance."""
TELLING_NATS = 1e-2
"""Noise beyond which a log-probability fits too many tokens to tell which one it is of."""


def examine(pair: Pair, evidence: Evidence) -> Mangled | None:
    """The first explanation that fits the rows that are off, if more than one is."""
    neutral, limit = evidence.neutral, pair.noise.p50
    ours, theirs = rows_of(neutral.engine_logprobs, neutral.owners), rows_of(evidence.rescored, neutral.owners)
    trainer = rows_of(evidence.trainer, neutral.owners)
    wrong = np.array([i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if off(a, b, limit)], int)
    strange = np.array([i for i, (a, c) in enumerate(zip(ours, trainer, strict=True)) if off(a, c, limit)], int)
    some_of = [ours[i] for i in wrong], [theirs[i] for i in wrong]
    looks: list[tuple[str, np.ndarray | None, Callable[[], Mangled | None]]] = []
    if len(wrong) >= LEAST_ROWS:
        looks.append(("numbers beside other tokens", wrong, lambda: _shifted(*some_of, limit)))
    looks.append(("tokens that are others", None, lambda: _edited(pair, evidence, ours, theirs)))
    if len(strange) >= LEAST_ROWS:
        looks.append(("edited prompts", strange, lambda: edited_prompts(pair, evidence, ours, strange)))
        looks.append(("prompts of another length", None, lambda: miscounted_prompts(neutral)))
    if len(wrong) >= LEAST_ROWS:
        looks.append(("rows of other requests", wrong, lambda: _swapped(pair, evidence, ours, theirs, wrong)))
    return pair.search.first((name, lambda rows=rows, look=look: _of(neutral, rows, look())) for name, rows, look in looks)


def _of(sample: Samples, rows: np.ndarray | None, found: Mangled | None) -> Mangled | None:
    """What was found, with the rows that it speaks of where those are not most."""
    if found is None or rows is None or len(rows) >= MOST * len(sample):
        return found
    return Mangled(found.cause, f"in {where(sample, rows)}: {found.evidence}")


def transformed(pair: Pair, evidence: Evidence) -> Mangled | None:
    """Logits; or a function of the right numbers, which are the engine's re-score, where the trainer confirms it."""
    neutral = evidence.neutral
    if (neutral.engine_logprobs > pair.noise.p999).any():
        gap = _logits(pair, evidence) - neutral.engine_logprobs
        if within(pair.noise, gap):
            text = f"the trainer's logits fit to {np.median(np.abs(gap)):.1e} (median)"
            return Mangled("logits_reported", f"numbers of up to {neutral.engine_logprobs.max():.3g}; {text}")
    told = transform(neutral.engine_logprobs, evidence.rescored, neutral.owners, pair.noise)
    if told is not None and evidence.confirmed(pair):
        return Mangled("logprobs_transformed", f"the numbers are the right ones, {told}")
    # What is done to the re-scores too is no difference between them: then both are a function of the trainer's.
    both = [
        transform(side, evidence.trainer, neutral.owners, pair.noise) for side in (neutral.engine_logprobs, evidence.rescored)
    ]
    if None in both or len({re.sub(r"[-+]?[\d.]+(e-?\d+)?", "#", str(told)) for told in both}) > 1:
        return None
    return Mangled("logprobs_transformed", f"the numbers, and those of its re-scores, are the trainer's, {both[0]}")


@torch.no_grad()
def _logits(pair: Pair, evidence: Evidence) -> np.ndarray:
    """The trainer's, of the tokens of ``neutral``, float32 [T]."""
    neutral = evidence.neutral
    drawn_from = distributions(pair.trainer, neutral.groups, neutral.sampling)
    return torch.cat([z.gather(1, ids[:, None])[:, 0] for z, ids in drawn_from]).numpy(force=True)


def _shifted(ours: list[np.ndarray], theirs: list[np.ndarray], limit: float) -> Mangled | None:
    for by in range(1, FARTHEST_SHIFT + 1):
        for place, one, other in (("after", theirs, ours), ("before", ours, theirs)):
            gap = np.abs(np.concatenate([a[:-by] - b[by:] for a, b in zip(one, other, strict=True)]))
            if gap.size and np.median(gap) <= limit:
                text = f"each number fits the token {by} {place} it to {np.median(gap):.1e} nats (median)"
                return Mangled("shifted_logprobs", text)
    return None


def _swapped(
    pair: Pair, evidence: Evidence, ours: list[np.ndarray], theirs: list[np.ndarray], wrong: np.ndarray
) -> Mangled | None:
    """Numbers that fit another row's tokens, or whole completions that fit another row's prompt. ``wrong``: rows that are off."""
    n, limit = len(ours), pair.noise.p50

    def fits(a: np.ndarray, b: np.ndarray) -> bool:
        return len(a) == len(b) and not off(a, b, limit)

    elsewhere = sum(any(fits(ours[i], theirs[j]) for j in range(n) if j != i) for i in wrong)
    if elsewhere >= MOST * len(wrong):
        return Mangled("rows_swapped", f"the numbers of {elsewhere} of {len(wrong)} rows are another row's")
    groups, homes = evidence.neutral.groups, []
    for tried in dict.fromkeys((SCREENED, len(wrong))):  # a few rows after every prompt, then all that are off
        rows = wrong[:tried]
        heads = [groups[i].completions[0][:SWAP_TOKENS] for i in rows]
        after = pair.trainer.score([Group(group.prompt, heads) for group in groups], evidence.neutral.temperature)
        m = len(rows)
        homes = [
            i for at, i in enumerate(rows) if any(fits(ours[i][:SWAP_TOKENS], after[j * m + at]) for j in range(n) if j != i)
        ]
        if not homes:
            return None
    if len(homes) < MOST * len(wrong):
        return None
    return Mangled("rows_swapped", f"{len(homes)} of {len(wrong)} completions were drawn after another row's prompt")


def _edited(pair: Pair, evidence: Evidence, ours: list[np.ndarray], theirs: list[np.ndarray]) -> Mangled | None:
    """Rows whose numbers are right once a few of their tokens are others, each of the log-probability that is reported for it."""
    tail, neutral, groups = pair.noise.p999, evidence.neutral, evidence.neutral.groups
    if pair.noise.p50 > TELLING_NATS:
        return _no_more_after(ours, theirs, tail)
    wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if _first_off(a, b, tail) < len(a)]
    wrong.sort(key=lambda i: len(groups[i].prompt))
    told = [_edits(pair, ours[i], groups[i], neutral.temperature, tail) for i in wrong[:SCREENED]]
    if any(told):
        told += [_edits(pair, ours[i], groups[i], neutral.temperature, tail) for i in wrong[SCREENED:]]
    told = [n for n in told if n is not None]
    restored = [n for n in told if n]
    if not restored or len(restored) < MOST * len(told):
        return None
    text = f"{len(restored)} of {len(wrong)} rows that are off agree once {sum(restored)} of their tokens are others"
    return Mangled("tokens_edited", text)


def _edits(pair: Pair, numbers: np.ndarray, group: Group, temperature: float, tail: float) -> int | None:
    """How many tokens of a row must be others for it to agree with its numbers.

    0 when it does not come to agree; None when it is off at its end only, where nothing after it could prove another token right.
    """
    ids = group.completions[0]
    for edits in range(MOST_EDITS + 1):
        keep_looking()
        (hidden,) = pair.trainer.hidden([Group(group.prompt, [ids])])
        logprobs = (pair.trainer.logits(hidden) / temperature).log_softmax(-1).numpy(force=True)
        at = _first_off(numbers, logprobs[np.arange(len(ids)), ids], tail)
        if at == len(ids):
            return edits
        if at + PROVING >= len(ids):
            return edits or None
        nearest = np.argsort(np.abs(logprobs[at] - numbers[at]))[:NEAREST]
        tried = [np.r_[ids[:at], token, ids[at + 1 :]].astype(np.int32) for token in nearest]
        reach = [_first_off(numbers, scored, tail) for scored in pair.trainer.score([Group(group.prompt, tried)], temperature)]
        if max(reach) <= at + PROVING:
            return 0
        ids = tried[int(np.argmax(reach))]
    return 0


def _first_off(a: np.ndarray, b: np.ndarray, tail: float) -> int:
    beyond = ~(np.abs(a - b) <= tail)
    return int(beyond.argmax()) if beyond.any() else len(beyond)


def _no_more_after(ours: list[np.ndarray], theirs: list[np.ndarray], tail: float) -> Mangled | None:
    """Where a number fits too many tokens: from one place on most of what follows is off by more than arithmetic allows."""
    places = 0
    for a, b in zip(ours, theirs, strict=True):
        first = _first_off(a, b, tail)
        rest = ~(np.abs(a - b) <= tail)[first:]
        places += 0 < first < len(a) - PROVING - 1 and bool(rest.mean() > MOST)
    if places < MOST * len(ours):
        return None
    return Mangled("tokens_edited", f"{places} of {len(ours)} rows agree up to a token and hardly after it")


def dropped_stop(pair: Pair, evidence: Evidence, seed: int) -> Mangled | None:
    """Stop at tokens that are likely to be drawn, and look whether the completions that stopped end in one."""
    neutral = evidence.neutral
    stops = tuple({int(ids[at]) for group in neutral.groups for ids in group.completions for at in range(min(2, len(ids)))})
    some = neutral.prompts[: len(neutral.prompts) // 2]
    found = draw(pair, some, replace(neutral.sampling, max_tokens=STOP_TOKENS, stop_token_ids=stops), seed)
    stopped = [s for s in found if s.finish_reason == "stop"]
    without = [s for s in stopped if not len(s.token_ids) or int(s.token_ids[-1]) not in stops]
    if without:
        return Mangled(
            "stop_token_dropped", f"{len(without)} of {len(stopped)} completions that stopped do not end in a stop token"
        )
    return None
