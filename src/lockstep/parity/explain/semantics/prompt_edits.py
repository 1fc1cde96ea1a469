"""Layer 1: was the prompt edited on its way to the engine?

The trainer edits its own prompts alike and scores again; the edit under which it agrees with the engine is
the evidence. Where a prompt is cut, at either end, by so many tokens or down to so many, the number is
fitted.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lockstep.parity.evidence import Evidence
from lockstep.parity.explain.rows import Explanation, off, rows_of
from lockstep.parity.pair import Pair
from lockstep.parity.search import keep_looking
from lockstep.parity.search_tolerances import MOST_ROWS, UNEDITED_AT_MOST
from lockstep.records.samples import Group, Samples

SCREENED = 2
"""Rows that an edit is tried on before it is tried on all: the shortest, and a middling one."""


def edited_prompts(
    pair: Pair, evidence: Evidence, ours: list[np.ndarray], strange: np.ndarray
) -> Explanation | None:
    """The edit of its own prompts under which the trainer agrees with the engine.

    Args:
        ours: score A of ``neutral``, by row.
        strange: the rows in which it does not, int [R].
    """
    groups = evidence.neutral.groups
    rows = sorted(
        (i for i in strange.tolist() if len(groups[i].prompt) > 2), key=lambda i: len(groups[i].prompt)
    )

    def agree(edit: Callable[[np.ndarray], np.ndarray], some: list[int]) -> np.ndarray:
        keep_looking()
        edited = [Group(edit(groups[i].prompt), groups[i].completions) for i in some]
        scored = pair.trainer.score(edited, evidence.neutral.temperature)
        return np.array([not off(ours[i], c, pair.noise.p50) for i, c in zip(some, scored, strict=True)])

    if not rows:
        return None
    first = [rows[at] for at in np.unique(np.linspace(0, len(rows) - 1, 3).astype(int))[:SCREENED]]
    for cause, name, edit in chain(_additions(pair), _cuts(pair, evidence, ours)):
        # Half of them is enough: a cut may leave nothing of the shortest.
        screened = 2 * agree(edit, first).sum() >= len(first)
        if screened and agree(edit, rows).mean() > 1 - UNEDITED_AT_MOST:
            return Explanation(
                cause, f"the trainer agrees with the engine once its prompts are edited: {name}"
            )
    return None


class PromptEdit(NamedTuple):
    """What may have been done to every prompt."""

    cause: str
    name: str
    """What was done, for people."""
    edit: Callable[[np.ndarray], np.ndarray]
    """What it makes of a prompt, int32 [P]."""


def _additions(pair: Pair) -> Iterator[PromptEdit]:
    """A special token or a newline before or after every prompt."""
    tokenizer = pair.renderer.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for token in dict.fromkeys(t for t in (bos, eos, *newline[:1]) if t is not None):
        cause = "bos_doubled" if token == bos else "prompt_edited"
        name = ascii(tokenizer.decode([token]))
        yield PromptEdit(cause, f"{name} put before them", lambda p, t=token: np.r_[t, p].astype(np.int32))
        after = f"{name} put after them"
        yield PromptEdit("prompt_edited", after, lambda p, t=token: np.r_[p, t].astype(np.int32))
    for special in (False, True):
        yield PromptEdit(
            "prompt_edited",
            f"decoded to text and tokenised again{', with special tokens added' if special else ''}",
            partial(retokenised, tokenizer, add_special_tokens=special),
        )


def retokenised(
    tokenizer: PreTrainedTokenizerBase, prompt: np.ndarray, *, add_special_tokens: bool = False
) -> np.ndarray:
    """The ids that a prompt's own text has, which need not be those it was made of."""
    ids = tokenizer.encode(tokenizer.decode(prompt), add_special_tokens=add_special_tokens)
    return np.array(ids or prompt[:1], np.int32)  # no prompt may be empty


def _cuts(pair: Pair, evidence: Evidence, ours: list[np.ndarray]) -> Iterator[PromptEdit]:
    """Cuts, fitted on the shortest row that is off: so many tokens left out at one end, or so many kept."""
    pairs = zip(
        ours, evidence.neutral.groups, rows_of(evidence.trainer, evidence.neutral.owners), strict=True
    )
    cut = [
        (len(group.prompt), row)
        for row, (numbers, group, scored) in enumerate(pairs)
        if len(group.prompt) > 2 and off(numbers, scored, pair.noise.p50)
    ]
    if not cut:
        return
    n, row = min(cut)
    numbers = ours[row]
    group = evidence.neutral.groups[row]
    for end, other, left in (
        ("first", "last", lambda p, k: p[k:]),
        ("last", "first", lambda p, k: p[: len(p) - k]),
    ):
        shorter = [Group(left(group.prompt, k), group.completions) for k in range(1, n)]
        scores = pair.trainer.score(shorter, evidence.neutral.temperature)
        k = 1 + int(np.argmin([np.median(np.abs(numbers - c)) for c in scores]))
        yield PromptEdit("prompt_edited", f"the {end} {k} tokens left out", partial(_left, left, k))
        yield PromptEdit(
            "prompt_edited", f"only the {other} {n - k} tokens kept", partial(_kept, left, n - k)
        )


def _left(left: Callable[[np.ndarray, int], np.ndarray], k: int, prompt: np.ndarray) -> np.ndarray:
    return left(prompt, k) if len(prompt) > k else prompt


def _kept(left: Callable[[np.ndarray, int], np.ndarray], n: int, prompt: np.ndarray) -> np.ndarray:
    return left(prompt, max(len(prompt) - n, 0))


def miscounted_prompts(samples: Samples) -> Explanation | None:
    """Prompts of another length by the engine's own count: something was put in that cannot be guessed."""
    counts = [(s.prompt_tokens, len(s.prompt_ids)) for s in samples if s.prompt_tokens]
    wrong = [(counted, sent) for counted, sent in counts if counted != sent]
    if not wrong or len(wrong) < MOST_ROWS * len(counts):
        return None
    counted, sent = wrong[0]
    text = (
        f"the engine counts another number of tokens in {len(wrong)} of {len(counts)} prompts: "
        f"{counted} where {sent} were sent"
    )
    return Explanation("prompt_edited", text)


def doubled_bos(pair: Pair, prompt: np.ndarray) -> Explanation | None:
    """A doubled BOS in one of the task's own prompts, which no score shows: both sides are sent the same."""
    bos = pair.renderer.tokenizer.bos_token_id
    if bos is not None and len(prompt) > 1 and prompt[0] == prompt[1] == bos:
        return Explanation("bos_doubled", f"the task's prompts begin with token {bos} twice")
    return None
