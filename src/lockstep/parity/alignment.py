"""Layer 1, tokens: are the numbers beside the tokens that they are of, and are the tokens those that were drawn?

Judged on ``neutral`` (T = 1), where no choice of distribution plays a part. A is first held against B, the same engine's own
re-score, row by row. Where most rows do not agree, each way in which rows are known to be mangled is tried; the first that makes
them agree is the cause. Where they do agree and the trainer's do not, the prompt may have been edited on its way to the engine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from lockstep.parity.evidence import Evidence
from lockstep.parity.pair import Pair, draw
from lockstep.policy.packing import Group
from lockstep.records.tokens import INT32

MOST = 0.5
"""Of the rows: a mangling concerns at least this share; corruption, which layer 2 looks for, concerns fewer."""
STOP_TOKENS = 4


@dataclass(frozen=True)
class Mangled:
    """How rows were mangled."""

    cause: str
    evidence: str


def examine(pair: Pair, evidence: Evidence) -> Mangled | None:
    """The first explanation that fits, if most rows need one."""
    neutral, limit = evidence.neutral, pair.noise.p50
    ours, theirs = _rows(evidence.neutral.engine_logprobs, neutral.owners), _rows(evidence.rescored, neutral.owners)
    trainer = _rows(evidence.trainer, neutral.owners)
    most_off = np.mean([_off(a, b, limit) for a, b in zip(ours, theirs, strict=True)]) >= MOST
    found = (_shifted(ours, theirs, limit) if most_off else None) or _edited(ours, theirs, pair.noise.p999, limit)
    if found is not None:
        return found
    if most_off:
        return _swapped(pair, evidence, ours, theirs, limit) or _prompt(pair, evidence, ours)
    if np.mean([_off(a, c, limit) for a, c in zip(ours, trainer, strict=True)]) >= MOST:
        return _prompt(pair, evidence, ours)
    return None


def _rows(values: np.ndarray, owners: np.ndarray) -> list[np.ndarray]:
    return [values[owners == i] for i in np.unique(owners)]


def _off(a: np.ndarray, b: np.ndarray, limit: float) -> bool:
    return not np.median(np.abs(a - b)) <= limit


def _shifted(ours: list[np.ndarray], theirs: list[np.ndarray], limit: float) -> Mangled | None:
    for place, pairs in {
        "after": [(a[1:], b[:-1]) for a, b in zip(ours, theirs, strict=True)],
        "before": [(a[:-1], b[1:]) for a, b in zip(ours, theirs, strict=True)],
    }.items():
        gap = np.abs(np.concatenate([a - b for a, b in pairs]))
        if gap.size and np.median(gap) <= limit:
            return Mangled("shifted_logprobs", f"each number fits the token {place} it to {np.median(gap):.1e} nats (median)")
    return None


def _swapped(pair: Pair, evidence: Evidence, ours: list[np.ndarray], theirs: list[np.ndarray], limit: float) -> Mangled | None:
    """Numbers that fit another row's tokens, or whole completions that fit another row's prompt."""
    n = len(ours)

    def fits(a: np.ndarray, b: np.ndarray) -> bool:
        return len(a) == len(b) and not _off(a, b, limit)

    elsewhere = sum(any(fits(ours[i], theirs[j]) for j in range(n) if j != i) for i in range(n))
    if elsewhere >= MOST * n:
        return Mangled("rows_swapped", f"the numbers of {elsewhere} of {n} rows are another row's")
    groups = evidence.neutral.groups
    homes: set[int] = set()
    for other in (lambda i: (i + 1) % n, lambda i: i - 1, lambda i: min(i ^ 1, n - 1), lambda i: n - 1 - i):
        moved = pair.policy.score([Group(groups[other(i)].prompt, groups[i].completions) for i in range(n)], 1.0)
        homes |= {i for i in range(n) if other(i) % n != i and fits(ours[i], moved[i])}
    if len(homes) >= MOST * n:
        return Mangled("rows_swapped", f"{len(homes)} of {n} completions were drawn after another row's prompt")
    return None


def _edited(ours: list[np.ndarray], theirs: list[np.ndarray], tail: float, limit: float) -> Mangled | None:
    """From one place on nothing agrees any more: the tokens after it were drawn in another context than the one returned."""
    places = []
    for a, b in zip(ours, theirs, strict=True):
        off = ~(np.abs(a - b) <= tail)
        first = int(off.argmax()) if off.any() else len(off)
        rest = ~(np.abs(a - b) <= limit)[first:]
        if 0 < first < len(off) - 3 and rest.mean() > MOST:
            places.append(first)
    if len(places) >= MOST * len(ours):
        return Mangled("tokens_edited", f"{len(places)} of {len(ours)} rows agree up to a token and hardly after it")
    return None


def _prompt(pair: Pair, evidence: Evidence, ours: list[np.ndarray]) -> Mangled | None:
    limit = pair.noise.p50
    for cause, name, edit in _prompt_edits(pair):
        groups = [Group(edit(group.prompt), group.completions) for group in evidence.neutral.groups if len(group.prompt) > 2]
        kept = [a for a, group in zip(ours, evidence.neutral.groups, strict=True) if len(group.prompt) > 2]
        off = [_off(a, c, limit) for a, c in zip(kept, pair.policy.score(groups, 1.0), strict=True)]
        if np.mean(off) < MOST / 2:
            return Mangled(cause, f"the trainer agrees with the engine once its prompts are edited: {name}")
    return None


def _prompt_edits(pair: Pair) -> Iterator[tuple[str, str, Callable[[np.ndarray], np.ndarray]]]:
    tokenizer = pair.renderer.tokenizer
    for role in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, role)
        if token is not None:
            cause = "bos_doubled" if role == "bos_token_id" else "prompt_edited"
            yield cause, f"{tokenizer.decode([token])!r} put before them", lambda p, t=token: np.r_[t, p].astype(np.int32)
    yield "prompt_edited", "the first token left out", lambda p: p[1:]
    yield "prompt_edited", "the last token left out", lambda p: p[:-1]


def doubled_bos(pair: Pair) -> Mangled | None:
    """Looks at the prompts themselves: both sides would agree on a doubled BOS."""
    bos = pair.renderer.tokenizer.bos_token_id
    prompt = pair.renderer.prompt(pair.task.messages(pair.task.item(0)))
    if bos is not None and len(prompt) > 1 and prompt[0] == prompt[1] == bos:
        return Mangled("bos_doubled", f"the task's prompts begin with token {bos} twice")
    return None


def dropped_stop(pair: Pair, evidence: Evidence, seed: int) -> Mangled | None:
    """Stop at tokens that are likely to be drawn, and look whether the completions that stopped end in one."""
    neutral = evidence.neutral
    stops = tuple({int(ids[at]) for group in neutral.groups for ids in group.completions for at in range(min(2, len(ids)))})
    some = neutral.prompts[: len(neutral.prompts) // 2]
    found = draw(pair, some, replace(neutral.sampling, max_tokens=STOP_TOKENS, stop_token_ids=stops), seed)
    stopped = [c for c in found.completions if c.finish_reason == "stop"]
    without = [c for c in stopped if not c.token_ids or int(np.frombuffer(c.token_ids, INT32)[-1]) not in stops]
    if without:
        return Mangled(
            "stop_token_dropped", f"{len(without)} of {len(stopped)} completions that stopped do not end in a stop token"
        )
    return None
