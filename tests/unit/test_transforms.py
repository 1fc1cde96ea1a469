"""Numbers that are a function of the right ones are recognised.

Numbers that are right, or merely noisy, are left alone.
"""

import numpy as np
import pytest

from lockstep.parity.explain.semantics.transforms import transform
from lockstep.parity.tolerances import NOISE

FP32 = NOISE["torch.float32"]
OWNERS = np.repeat(np.arange(4), 16)


@pytest.fixture
def right():
    return -np.random.default_rng(0).gamma(1.0, 2.0, OWNERS.size).astype(np.float32)


def noisy(values, seed=1):
    return (values + np.random.default_rng(seed).normal(0, 1e-5, values.size)).astype(np.float32)


def rows(values, change):
    return np.concatenate([change(values[i == OWNERS]) for i in range(4)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x / np.log(10), "log10"),
        (lambda x: x / np.log(2), "log2"),
        (lambda x: -x, "sign"),
        (np.exp, "probabilities"),
        (lambda x: rows(x, np.cumsum), "running sums"),
        (lambda x: rows(x, lambda row: np.full_like(row, row.mean())), "mean"),
        (lambda x: rows(x, lambda row: row[::-1]), "reverse"),
        (lambda x: np.maximum(x, -3.0), "floor of -3"),
        (lambda x: x - 0.5, "-0.5 to each"),
        (lambda x: x * 0.9, "times 0.900"),
        (np.zeros_like, "for each"),
    ],
)
def test_a_function_of_the_right_numbers_is_named(right, change, told):
    named = transform(noisy(change(right)), noisy(right, 2), OWNERS, FP32)
    assert named is not None
    assert told in named


@pytest.mark.parametrize(("decimals", "told"), [(1, "1 decimals"), (2, "2 decimals")])
def test_rounding_is_named(right, decimals, told):
    named = transform(np.round(right, decimals), noisy(right), OWNERS, FP32)
    assert named is not None
    assert told in named


def test_a_coarse_number_format_is_named(right):
    import torch

    named = transform(torch.from_numpy(right).bfloat16().float().numpy(), noisy(right), OWNERS, FP32)
    assert named == "rounded to bfloat16"


def test_what_is_right_or_merely_off_is_not_explained(right):
    assert transform(noisy(right), noisy(right, 2), OWNERS, FP32) is None
    off = right + np.random.default_rng(3).normal(0, 0.1, right.size).astype(np.float32)
    assert transform(off, right, OWNERS, FP32) is None
    shuffled = np.random.default_rng(4).permutation(right)
    assert transform(shuffled, right, OWNERS, FP32) is None
    assert transform(np.full_like(right, np.nan), right, OWNERS, FP32) is None
