"""The draws' test: how often it raises a false alarm, and how often it sees what it claims to.

On simulated draws.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from lockstep.parity.explain.semantics.draws import CROWD, TILTS, BothWeighed, weigh
from lockstep.parity.search_tolerances import DRAWS_POWER
from lockstep.parity.tolerances import DRAWS_FALSE_ALARM

SIMULATIONS = 200
SINGLES, PROMPTS = 192, 45


@pytest.fixture(scope="module")
def contexts():
    """Zipf-like distributions over few tokens, so that a simulation is quick.

    var(log p) of 5 nats², as SmolLM2's at T = 0.7.
    """
    generator = torch.Generator().manual_seed(3)
    ranks = torch.arange(1, 1001).log()
    return (-1.1 * ranks + torch.randn(SINGLES, 1000, generator=generator)).log_softmax(-1)


@cache
def ladder(logprobs, temperature):
    """The rows' cumulative distributions one above the other, row r from r to r + 1: float64 [L · V]."""
    cumulative = (logprobs / temperature).double().softmax(-1).numpy().cumsum(-1)
    return (cumulative / cumulative[:, -1:] + np.arange(len(logprobs))[:, None]).ravel()


def drawn(logprobs, n, rng, temperature=1.0, best_of=1):
    """``n`` draws of each row: rows and ids, [L · n]."""
    rows = np.arange(len(logprobs))[:, None]
    size = logprobs.shape[1]
    uniform = rng.random((best_of, len(logprobs), n))
    tries = np.searchsorted(ladder(logprobs, temperature), uniform + rows) - rows * size
    tries = tries.clip(0, size - 1)  # [best_of, L, n]
    scores = np.stack([np.take_along_axis(logprobs.numpy(), t, 1) for t in tries])
    ids = np.take_along_axis(tries, scores.argmax(0)[None], 0)[0]
    return torch.arange(len(logprobs)).repeat_interleave(n), torch.from_numpy(ids.reshape(-1))


class Check:
    """Checks on the same contexts: what does not depend on the draws is weighed once."""

    def __init__(self, contexts):
        self.parts = {"singles": (contexts, 1), "crowd": (contexts[:PROMPTS], CROWD)}
        self.weighed, self.tables = {}, {}
        for name, (logprobs, n) in self.parts.items():
            rows, ids = drawn(logprobs, n, np.random.default_rng(0))
            self.weighed[name] = weigh(logprobs, rows, ids, TILTS[name])
            self.tables[name] = [
                t * logprobs - ((1 + t) * logprobs).logsumexp(-1, keepdim=True) for t in TILTS[name]
            ]
            assert self.products(name, rows, ids) == pytest.approx(self.weighed[name].log_products, abs=1e-2)

    def products(self, name, rows, ids):
        return tuple(float(table[rows, ids].double().sum()) for table in self.tables[name])

    def drawn(self, rng, **faults):
        """One check; ``faults``: how singles or crowd are drawn."""
        found = {}
        for name, (logprobs, n) in self.parts.items():
            products = self.products(name, *drawn(logprobs, n, rng, **faults.get(name, {})))
            found[name] = replace(self.weighed[name], log_products=products)
        return BothWeighed(**found)


@pytest.fixture(scope="module")
def check(contexts):
    return Check(contexts)


def share_seen(check, **faults):
    rng = np.random.default_rng(0)
    return np.mean([check.drawn(rng, **faults).odd for _ in range(SIMULATIONS)])


def test_honest_draws_raise_no_alarm(check):
    rng = np.random.default_rng(1)
    evidence = [check.drawn(rng).log_evidence for _ in range(SIMULATIONS)]
    assert max(evidence) < -np.log(DRAWS_FALSE_ALARM)
    # Markov's inequality at a level that these simulations can resolve: one in twenty at most beyond 1/20.
    assert np.mean(np.array(evidence) > np.log(20)) <= 1 / 20


def test_a_product_has_expectation_one(contexts):
    logprobs = contexts[:1, :500].log_softmax(-1)
    tilts = (-0.25, 0.25)
    each = [
        weigh(logprobs, torch.tensor([0]), torch.tensor([token]), tilts).log_products for token in range(500)
    ]
    expected = (logprobs[0].double().exp()[:, None] * torch.tensor(each, dtype=torch.float64).exp()).sum(0)
    np.testing.assert_allclose(expected.numpy(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.95, 1 / 0.95])
def test_a_temperature_off_by_five_percent_is_seen(check, temperature):
    assert share_seen(check, crowd={"temperature": temperature}) >= DRAWS_POWER


def test_the_better_of_two_behind_one_is_seen(check):
    told = check.drawn(np.random.default_rng(2)).power_of_two
    seen = share_seen(check, singles={"best_of": 2})
    assert seen >= 0.99
    assert told == pytest.approx(seen, abs=0.03)


def test_what_is_told_of_the_power_is_so(check):
    """At the effect that it names the test sees nine of ten, and at a third of it hardly any."""
    least = check.drawn(np.random.default_rng(2)).smallest_temperature
    assert 0.02 < least < 0.05
    assert share_seen(check, crowd={"temperature": 1 / (1 + least)}) == pytest.approx(DRAWS_POWER, abs=0.06)
    assert share_seen(check, crowd={"temperature": 1 / (1 + least / 3)}) < 0.05
