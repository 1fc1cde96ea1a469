"""Layer 1: was the prompt edited on its way to the engine?

The trainer edits its own prompts alike and scores again; the edit under which it agrees with the engine is the evidence. Where a
prompt is cut, at either end, by so many tokens or down to so many, the number is fitted.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import numpy as np

from lockstep.parity.evidence import Evidence
from lockstep.parity.pair import Pair, Sampled
from lockstep.parity.rows import MOST, Mangled, off, rows_of
from lockstep.policy.packing import Group

FEW = 0.25
"""Of the rows may stay off under the right edit: prompts so short that it left nothing of them."""


def edited_prompts(pair: Pair, evidence: Evidence, ours: list[np.ndarray]) -> Mangled | None:
    """The edit of its own prompts under which the trainer agrees with the engine.

    Args:
        ours: score A of ``neutral``, by row.
    """
    limit, temperature = pair.noise.p50, evidence.neutral.temperature
    for cause, name, edit in chain(_additions(pair), _cuts(pair, evidence, ours)):
        groups = [Group(edit(group.prompt), group.completions) for group in evidence.neutral.groups if len(group.prompt) > 2]
        kept = [a for a, group in zip(ours, evidence.neutral.groups, strict=True) if len(group.prompt) > 2]
        wrong = [off(a, c, limit) for a, c in zip(kept, pair.policy.score(groups, temperature), strict=True)]
        if np.mean(wrong) < FEW:
            return Mangled(cause, f"the trainer agrees with the engine once its prompts are edited: {name}")
    return None


def _additions(pair: Pair) -> Iterator[tuple[str, str, Callable[[np.ndarray], np.ndarray]]]:
    """A special token or a newline before or after every prompt."""
    tokenizer = pair.renderer.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for token in dict.fromkeys(t for t in (bos, eos, *newline[:1]) if t is not None):
        cause, name = "bos_doubled" if token == bos else "prompt_edited", ascii(tokenizer.decode([token]))
        yield cause, f"{name} put before them", lambda p, t=token: np.r_[t, p].astype(np.int32)
        yield "prompt_edited", f"{name} put after them", lambda p, t=token: np.r_[p, t].astype(np.int32)


def _cuts(
    pair: Pair, evidence: Evidence, ours: list[np.ndarray]
) -> Iterator[tuple[str, str, Callable[[np.ndarray], np.ndarray]]]:
    """The cut that is fitted on the shortest row that is off: so many tokens left out at one end, or so many kept."""
    pairs = zip(ours, evidence.neutral.groups, rows_of(evidence.trainer, evidence.neutral.owners), strict=True)
    cut = [(len(g.prompt), i) for i, (a, g, c) in enumerate(pairs) if len(g.prompt) > 2 and off(a, c, pair.noise.p50)]
    if not cut:
        return
    n, row = min(cut)
    numbers, group = ours[row], evidence.neutral.groups[row]
    for end, other, left in (("first", "last", lambda p, k: p[k:]), ("last", "first", lambda p, k: p[: len(p) - k])):
        shorter = [Group(left(group.prompt, k), group.completions) for k in range(1, n)]
        scores = pair.policy.score(shorter, evidence.neutral.temperature)
        k = 1 + int(np.argmin([np.median(np.abs(numbers - c)) for c in scores]))
        yield "prompt_edited", f"the {end} {k} tokens left out", partial(_left, left, k)
        yield "prompt_edited", f"only the {other} {n - k} tokens kept", partial(_kept, left, n - k)


def _left(left: Callable[[np.ndarray, int], np.ndarray], k: int, prompt: np.ndarray) -> np.ndarray:
    return left(prompt, k) if len(prompt) > k else prompt


def _kept(left: Callable[[np.ndarray, int], np.ndarray], n: int, prompt: np.ndarray) -> np.ndarray:
    return left(prompt, max(len(prompt) - n, 0))


def miscounted_prompts(sample: Sampled) -> Mangled | None:
    """Prompts that the engine itself says were longer or shorter than they were: something was put in that cannot be guessed."""
    counts = [(c.prompt_tokens, len(p)) for c, p in zip(sample.completions, sample.prompts, strict=True) if c.prompt_tokens]
    wrong = [(counted, sent) for counted, sent in counts if counted != sent]
    if not wrong or len(wrong) < MOST * len(counts):
        return None
    counted, sent = wrong[0]
    text = (
        f"the engine counts another number of tokens in {len(wrong)} of {len(counts)} prompts: {counted} where {sent} were sent"
    )
    return Mangled("prompt_edited", text)


def doubled_bos(pair: Pair, prompt: np.ndarray) -> Mangled | None:
    """Looks at one of the task's prompts itself: both sides would agree on a doubled BOS."""
    bos = pair.renderer.tokenizer.bos_token_id
    if bos is not None and len(prompt) > 1 and prompt[0] == prompt[1] == bos:
        return Mangled("bos_doubled", f"the task's prompts begin with token {bos} twice")
    return None
