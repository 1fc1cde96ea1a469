"""A mask that nobody asked for is read off what was drawn under it, if it alone explains every number."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lockstep.parity.explain.semantics.grammar import hidden_mask, masks
from lockstep.parity.explain.semantics.held import Held
from lockstep.records.samples import Group

TEXTS = ["", *"0123456789", *"abcdefghijklmnop", *(a + b for a in "abcé7 " for b in "xyzü3\n")]
LIMIT = 1e-4
FEW = 18
"""Drawn tokens that have not every allowed character, and every kind of them."""


class Tokenizer:
    all_special_ids = (0,)

    def __len__(self):
        return len(TEXTS)

    def batch_decode(self, rows):
        return [TEXTS[token] for (token,) in rows]


PAIR = SimpleNamespace(renderer=SimpleNamespace(tokenizer=Tokenizer()))


def drawn(allowed, seed=0, n=400):
    """Whole distributions, ids drawn where ``allowed(text)``, numbers of the distribution over those."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, len(TEXTS), generator=generator)
    mask = torch.tensor([allowed(text) for text in TEXTS])
    logprobs = logits.masked_fill(~mask, float("-inf")).log_softmax(-1)
    ids = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
    numbers = logprobs.gather(1, ids[:, None])[:, 0] + 2e-5 * torch.randn(n, generator=generator)
    groups = [Group(np.zeros(1, np.int32), [ids.numpy().astype(np.int32)])]
    return SimpleNamespace(groups=groups, temperature=1.0), Held(logits, ids, numbers)


@pytest.mark.parametrize(
    ("allowed", "n", "named"),
    [
        (str.isdigit, 400, "only the characters '0123456789'"),
        (lambda text: text.isalpha() and text.isascii(), FEW, "only ASCII of the categories Ll"),
        (str.isalpha, FEW, "only characters of the categories Ll"),
        (lambda text: text != "" and "\n" not in text, FEW, "only characters of the categories Ll, Nd, Zs"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mask_is_named_by_its_characters_or_their_kind(allowed, n, named, seed):
    found = hidden_mask(PAIR, *drawn(allowed, seed, n), LIMIT)
    assert found is not None
    assert found.cause == "vocabulary_masked"
    assert found.miss <= LIMIT
    assert named in found.name


def test_no_mask_is_named_without_one_nor_where_its_tokens_have_no_pattern():
    assert hidden_mask(PAIR, *drawn(lambda text: True), LIMIT) is None
    assert hidden_mask(PAIR, *drawn(lambda text: TEXTS.index(text) % 3 == 0), LIMIT) is None
    sample, held = drawn(str.isdigit)
    assert hidden_mask(PAIR, sample, held._replace(engine=held.engine - 0.5), LIMIT) is None


def test_every_mask_allows_what_was_drawn():
    tokens = np.array([3, 12, 0, 40])
    assert all(allowed[tokens].all() for _, allowed in masks(TEXTS, tokens))
