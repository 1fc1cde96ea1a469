"""Layer 1: are tokens drawn under a mask (a grammar, a pattern, a list of allowed tokens) that nobody asked
for?

A mask renormalises: each number is higher than the whole distribution's by −log(mass of what is allowed).
What is allowed is read off what was drawn: tokens of those characters alone, or of characters of those
Unicode categories. A mask that changes with what came before it, as JSON's, is of neither form and stays
unexplained.
"""

from collections.abc import Iterator, Set
from unicodedata import category

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lockstep.parity.explain.fitting import miss_of
from lockstep.parity.explain.semantics.held import Held
from lockstep.parity.explain.semantics.sampler import Explained
from lockstep.parity.pair import Pair
from lockstep.parity.search_tolerances import EXPLAINS
from lockstep.parity.tolerances import RARELY_ABOVE
from lockstep.records.samples import Samples

SHOWN = 24
"""Characters of the evidence."""


def hidden_mask(pair: Pair, sample: Samples, held: Held, limit: float) -> Explained | None:
    """The mask that explains the numbers; None where none does.

    Args:
        held: of ``sample``.
        limit: a fit is an explanation when it misses by at most this, nats.
    """
    logprobs = (held.logits / sample.temperature).log_softmax(-1)
    above = held.engine - logprobs.gather(1, held.ids[:, None])[:, 0]
    if float((above < -limit).float().mean()) > RARELY_ABOVE:
        return None
    texts = texts_of(pair.renderer.tokenizer, logprobs.shape[1])
    drawn = np.unique(np.concatenate([group.completions[0] for group in sample.groups]))
    enough = min(limit, EXPLAINS * miss_of(above))
    for name, allowed in masks(texts, drawn):
        outside = torch.from_numpy(~allowed).to(logprobs.device)
        mass = logprobs.masked_fill(outside, float("-inf")).logsumexp(-1)
        miss = miss_of(above + mass)
        if miss <= enough:
            return Explained("vocabulary_masked", name, miss)
    return None


def texts_of(tokenizer: PreTrainedTokenizerBase, n: int) -> list[str]:
    """Each token's text; empty for special tokens and for ids past the tokenizer's last, which no pattern
    speaks of."""
    texts = tokenizer.batch_decode([[token] for token in range(min(n, len(tokenizer)))])
    special = set(tokenizer.all_special_ids)
    return ["" if token in special else text for token, text in enumerate(texts)] + [""] * (n - len(texts))


def masks(texts: list[str], drawn: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Masks that allow all that was drawn, each with its name: bool [V]."""
    seen = np.zeros(len(texts), bool)
    seen[drawn] = True
    chars = {char for token in drawn for char in texts[token]}
    categories = {category(char) for char in chars}
    alphabet = {char for text in texts for char in text}
    wider = {char for char in alphabet if category(char) in categories}
    shown = f"{''.join(sorted(chars))[:SHOWN]!a}{'…' if len(chars) > SHOWN else ''}"
    for name, letters in (
        (f"a mask that allows only the characters {shown}", chars),
        (f"a mask that allows only characters of the categories {', '.join(sorted(categories))}", wider),
        (
            f"a mask that allows only ASCII of the categories {', '.join(sorted(categories))}",
            {c for c in wider if c.isascii()},
        ),
    ):
        # What was drawn is allowed in any case: special tokens have no text that a pattern could speak of.
        yield name, seen | made_of(letters, texts)


def made_of(letters: Set[str], texts: list[str]) -> np.ndarray:
    """Which texts have no other characters than these, and are not empty: bool [V]."""
    return np.array([bool(text) and letters >= set(text) for text in texts])
