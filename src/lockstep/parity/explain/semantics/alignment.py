"""Layer 1, tokens: does each number stand beside its own token, and are the tokens those that were drawn?

Judged on ``neutral`` (T = 1; a log's own T), where no choice of distribution plays a part. A is first held
against B, the same engine's own re-score, row by row. Where most rows do not agree, each way in which rows
are known to be mangled is tried; the first that makes them agree is the cause. Where they do agree and the
trainer's do not, the prompt may have been edited on its way to the engine.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from msgspec.structs import replace

from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.rows import Explanation, off, rows_of
from lockstep.parity.explain.semantics.portions import where
from lockstep.parity.explain.semantics.prompt_edits import edited_prompts, miscounted_prompts
from lockstep.parity.explain.semantics.sampler import distributions
from lockstep.parity.explain.semantics.transforms import transform
from lockstep.parity.pair import Pair, draw
from lockstep.parity.search import Looks, keep_looking
from lockstep.parity.search_tolerances import LEAST_ROWS, MOST_ROWS, PROVING_TOKENS, TELLING_NATS
from lockstep.records.samples import Group, Samples

STOP_TOKENS = 4
SCREENED = 3
"""Rows that an explanation is tried on before it is tried on all."""
FARTHEST_SHIFT = 3
SWAP_TOKENS = 8
"""How many tokens of a completion are held against every row's prompt."""
NEAREST = 8
"""Tokens of the right log-probability that are tried in the place of an edited one."""
MOST_EDITS = 4


def examine(pair: Pair, evidence: Evidence) -> Explanation | None:
    """The first explanation that fits the rows that are off, if more than one is."""
    neutral = evidence.neutral
    ours = rows_of(neutral.engine_logprobs, neutral.owners)
    theirs = rows_of(evidence.rescored, neutral.owners)
    wrong = _rows_off(ours, theirs, pair.noise.p50)
    strange = _rows_off(ours, rows_of(evidence.trainer, neutral.owners), pair.noise.p50)

    def of(rows: np.ndarray, look: Callable[[], Explanation | None]) -> Callable[[], Explanation | None]:
        return lambda: _naming_rows(neutral, rows, look())

    looks: list[Looks[Explanation]] = []
    if len(wrong) >= LEAST_ROWS:
        some, others = [ours[i] for i in wrong], [theirs[i] for i in wrong]
        looks.append(
            ("numbers beside other tokens", of(wrong, lambda: _shifted(some, others, pair.noise.p50)))
        )
    # Whatever the medians are: behind an edit late in the row most of its numbers are right.
    looks.append(("tokens that are others", lambda: _edited(pair, evidence, ours, theirs)))
    if len(strange) >= LEAST_ROWS:
        looks.append(("edited prompts", of(strange, lambda: edited_prompts(pair, evidence, ours, strange))))
        looks.append(("prompts of another length", lambda: miscounted_prompts(neutral)))
    if len(wrong) >= LEAST_ROWS:
        looks.append(
            ("rows of other requests", of(wrong, lambda: _swapped(pair, evidence, ours, theirs, wrong)))
        )
    return pair.search.first(looks)


def _rows_off(ours: list[np.ndarray], others: list[np.ndarray], limit: float) -> np.ndarray:
    """The rows in which two scores do not agree in the median, int [R]."""
    return np.array([i for i, (a, b) in enumerate(zip(ours, others, strict=True)) if off(a, b, limit)], int)


def _naming_rows(samples: Samples, rows: np.ndarray, found: Explanation | None) -> Explanation | None:
    """An explanation that says which rows it is of, where those are not most."""
    if found is None or len(rows) >= MOST_ROWS * len(samples):
        return found
    return Explanation(found.cause, f"in {where(samples, rows)}: {found.evidence}")


def transformed(pair: Pair, evidence: Evidence) -> Explanation | None:
    """Numbers that are logits, or a function of the right ones.

    Of its re-scores, where the trainer confirms these.
    """
    neutral = evidence.neutral
    if (neutral.engine_logprobs > pair.noise.p999).any():  # no log-probability is above 0
        gap = _logits(pair, evidence) - neutral.engine_logprobs
        if within(pair.noise, gap):
            text = f"the trainer's logits fit to {np.median(np.abs(gap)):.1e} (median)"
            return Explanation(
                "logits_reported", f"numbers of up to {neutral.engine_logprobs.max():.3g}; {text}"
            )
    change = transform(neutral.engine_logprobs, evidence.rescored, neutral.owners, pair.noise)
    if change is not None and evidence.confirmed(pair):
        return Explanation("logprobs_transformed", f"the numbers are the right ones, {change}")
    # What is done to the re-scores too is no difference between them: then both are a function of the
    # trainer's.
    drawn = transform(neutral.engine_logprobs, evidence.trainer, neutral.owners, pair.noise)
    rescored = transform(evidence.rescored, evidence.trainer, neutral.owners, pair.noise)
    if drawn is None or rescored is None or _kind(drawn) != _kind(rescored):
        return None
    text = f"the numbers, and those of its re-scores, are the trainer's, {drawn}"
    return Explanation("logprobs_transformed", text)


def _kind(change: str) -> str:
    """A change without its numbers: what is fitted to two samples differs between them."""
    return re.sub(r"[-+]?[\d.]+(e-?\d+)?", "#", change)


@torch.no_grad()
def _logits(pair: Pair, evidence: Evidence) -> np.ndarray:
    """The trainer's logits of the tokens of ``neutral``, float32 [T]."""
    neutral = evidence.neutral
    drawn_from = distributions(pair.trainer, neutral.groups, neutral.sampling)
    return torch.cat([z.gather(1, ids[:, None])[:, 0] for z, ids in drawn_from]).numpy(force=True)


def _shifted(ours: list[np.ndarray], theirs: list[np.ndarray], limit: float) -> Explanation | None:
    """Numbers that are right, and stand beside a token before or after their own."""
    for by in range(1, FARTHEST_SHIFT + 1):
        # A number that stands beside the token after its own fits the token before the one it stands beside.
        for place, one, other in (("before", theirs, ours), ("after", ours, theirs)):
            gap = np.abs(np.concatenate([a[:-by] - b[by:] for a, b in zip(one, other, strict=True)]))
            if gap.size and np.median(gap) <= limit:
                text = f"each number fits the token {by} {place} it to {np.median(gap):.1e} nats (median)"
                return Explanation("shifted_logprobs", text)
    return None


def _swapped(
    pair: Pair, evidence: Evidence, ours: list[np.ndarray], theirs: list[np.ndarray], wrong: np.ndarray
) -> Explanation | None:
    """Numbers that fit another row's tokens, or whole completions that fit another row's prompt.

    Args:
        ours: score A, by row.
        theirs: score B, by row.
        wrong: the rows in which they do not agree, int [R].
    """
    limit = pair.noise.p50
    elsewhere = sum(_fits_another(ours[i], theirs, i, limit) for i in wrong)
    if elsewhere >= MOST_ROWS * len(wrong):
        return Explanation(
            "rows_swapped", f"the numbers of {elsewhere} of {len(wrong)} rows are another row's"
        )
    # Every completion after every prompt is a quadratic number of scores, so a few rows must fit before all
    # are tried.
    if not _after_another_prompt(pair, evidence, ours, wrong[:SCREENED]):
        return None
    homes = _after_another_prompt(pair, evidence, ours, wrong)
    if not homes or homes < MOST_ROWS * len(wrong):
        return None
    return Explanation(
        "rows_swapped", f"{homes} of {len(wrong)} completions were drawn after another row's prompt"
    )


def _fits_another(numbers: np.ndarray, rows: Sequence[np.ndarray], own: int, limit: float) -> bool:
    """True when a row's numbers agree with another row's in the median."""
    others = (row for j, row in enumerate(rows) if j != own)
    return any(len(numbers) == len(row) and not off(numbers, row, limit) for row in others)


def _after_another_prompt(pair: Pair, evidence: Evidence, ours: list[np.ndarray], rows: np.ndarray) -> int:
    """How many of these rows' completions fit their numbers after the prompt of another row."""
    groups = evidence.neutral.groups
    heads = [groups[i].completions[0][:SWAP_TOKENS] for i in rows]
    after_each = [Group(group.prompt, heads) for group in groups]
    scores = pair.trainer.score(after_each, evidence.neutral.temperature)  # by prompt, then by completion
    fitting = 0
    for at, row in enumerate(rows):
        fitting += _fits_another(ours[row][:SWAP_TOKENS], scores[at :: len(rows)], row, pair.noise.p50)
    return fitting


def _edited(
    pair: Pair, evidence: Evidence, ours: list[np.ndarray], theirs: list[np.ndarray]
) -> Explanation | None:
    """Rows whose numbers become right when a few of their tokens are put back.

    Which token stood there is read off its number: it is one of those with the log-probability reported.
    """
    neutral = evidence.neutral
    groups = neutral.groups
    tail = pair.noise.p999
    if pair.noise.p50 > TELLING_NATS:
        return _no_more_after(ours, theirs, tail)
    wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if _first_off(a, b, tail) < len(a)]
    # A row is tried by several whole passes: short ones decide whether the others are worth theirs.
    wrong.sort(key=lambda i: len(groups[i].prompt))
    edits = [_edits(pair, ours[i], groups[i], neutral.temperature, tail) for i in wrong[:SCREENED]]
    if any(edits):
        edits += [_edits(pair, ours[i], groups[i], neutral.temperature, tail) for i in wrong[SCREENED:]]
    judged = [n for n in edits if n is not None]
    restored = [n for n in judged if n]
    if not restored or len(restored) < MOST_ROWS * len(judged):
        return None
    text = (
        f"{len(restored)} of {len(wrong)} rows that are off agree "
        f"once {sum(restored)} of their tokens are others"
    )
    return Explanation("tokens_edited", text)


def _edits(pair: Pair, numbers: np.ndarray, group: Group, temperature: float, tail: float) -> int | None:
    """How many tokens of a row must be others for it to agree with its numbers.

    0 when it does not come to agree; None when it is off at its end only, where nothing after it could prove
    another token right.
    """
    ids = group.completions[0]
    for edits in range(MOST_EDITS + 1):
        keep_looking()
        (hidden,) = pair.trainer.hidden([Group(group.prompt, [ids])])
        logprobs = (pair.trainer.logits(hidden) / temperature).log_softmax(-1).numpy(force=True)
        at = _first_off(numbers, logprobs[np.arange(len(ids)), ids], tail)
        if at == len(ids):
            return edits
        if at + PROVING_TOKENS >= len(ids):
            return edits or None
        # The token that was drawn has the log-probability that was reported for it; a few others are as near.
        nearest = np.argsort(np.abs(logprobs[at] - numbers[at]))[:NEAREST]
        tried = [np.r_[ids[:at], token, ids[at + 1 :]].astype(np.int32) for token in nearest]
        scores = pair.trainer.score([Group(group.prompt, tried)], temperature)
        reach = [_first_off(numbers, row, tail) for row in scores]
        if max(reach) <= at + PROVING_TOKENS:
            return 0
        ids = tried[int(np.argmax(reach))]
    return 0


def _first_off(a: np.ndarray, b: np.ndarray, tail: float) -> int:
    """The first place at which two rows differ by more than ``tail``; their length where none is."""
    beyond = ~(np.abs(a - b) <= tail)
    return int(beyond.argmax()) if beyond.any() else len(beyond)


def _no_more_after(ours: list[np.ndarray], theirs: list[np.ndarray], tail: float) -> Explanation | None:
    """Rows that agree up to one token and mostly not after it, which is all that is seen where a number fits
    too many tokens."""
    places = 0
    for a, b in zip(ours, theirs, strict=True):
        first = _first_off(a, b, tail)
        rest = ~(np.abs(a - b) <= tail)[first:]
        places += 0 < first < len(a) - PROVING_TOKENS - 1 and bool(rest.mean() > MOST_ROWS)
    if places < MOST_ROWS * len(ours):
        return None
    return Explanation(
        "tokens_edited", f"{places} of {len(ours)} rows agree up to a token and hardly after it"
    )


def dropped_stop(pair: Pair, evidence: Evidence, seed: int) -> Explanation | None:
    """Stop at tokens that are likely to be drawn, and look whether the completions that stopped end in
    one."""
    neutral = evidence.neutral
    stops = tuple(
        {
            int(ids[at])
            for group in neutral.groups
            for ids in group.completions
            for at in range(min(2, len(ids)))
        }
    )
    # With the prompts and seeds of ``neutral`` most completions begin as they did, and stop there.
    some = neutral.prompts[: len(neutral.prompts) // 2]
    sampling = replace(neutral.sampling, max_tokens=STOP_TOKENS, stop_token_ids=stops)
    stopped = [s for s in draw(pair, some, sampling, seed) if s.finish_reason == "stop"]
    without = [s for s in stopped if not len(s.token_ids) or int(s.token_ids[-1]) not in stops]
    if without:
        text = f"{len(without)} of {len(stopped)} completions that stopped do not end in a stop token"
        return Explanation("stop_token_dropped", text)
    return None
