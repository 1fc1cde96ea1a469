"""The pulls of every direction, from one backward pass, are those that a gradient for each sequence gives."""

import gc

import numpy as np
import pytest
import torch

from lockstep.policy.model import EAGER, load_policy
from lockstep.policy.parameters import parameters_of
from lockstep.policy.pulls import HEAD, Asked, pulls, scale
from lockstep.records.samples import Group

T = 0.8


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load_policy(tiny_model_dir, "float32", "float32")


def drawn(rng, n):
    return [rng.integers(3, 97, rng.integers(1, 12)).astype(np.int32) for _ in range(n)]


@pytest.fixture(scope="module")
def groups():
    """Prompts that begin alike, so that they would share it in a row of scores, of 1 to 4 completions."""
    rng = np.random.default_rng(0)
    begin = np.arange(3, 21, dtype=np.int32)
    rests = drawn(rng, 7)
    return [Group(np.r_[begin, rest], drawn(rng, 1 + row % 4)) for row, rest in enumerate(rests)]


@pytest.fixture(scope="module")
def policy_alone(tiny_model_dir):
    """The same weights in a model that takes no packed rows."""
    made = load_policy(tiny_model_dir, "float32", "float32")
    made.model.set_attn_implementation(EAGER)
    made.share_prompts = False
    return made


@pytest.fixture(scope="module")
def weights(groups):
    return np.random.default_rng(1).normal(size=sum(len(ids) for g in groups for ids in g.completions))


def wave(_, parameter):
    return torch.sin(torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter))


def by_gradients(policy, groups, weights, direction):
    """N_s the slow way: one backward pass into the parameters for each group."""
    found = {}
    start = 0
    for group in groups:
        (row,) = policy.rows([group], 1 << 20)
        n = sum(map(len, group.completions))
        at = torch.from_numpy(weights[start : start + n]).float()
        start += n
        parameters = parameters_of(policy.model)
        total = (policy.scores(row, T).logprobs * at).sum()
        grads = torch.autograd.grad(total, list(parameters.values()))
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            found.setdefault(name, []).append(float((grad * direction(name, parameter.detach())).sum()))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("direction", [scale, wave])
@pytest.mark.parametrize("alone", [False, True], ids=["groups share rows", "one sequence a row"])
def test_pulls_are_those_of_a_gradient_for_each_group(request, policy, groups, weights, direction, alone):
    packed = request.getfixturevalue("policy_alone") if alone else policy
    # A matrix's directions go by products where there is one, by its gradient where there are several.
    halved = Asked(weights / 2, {"d": direction, "more": scale, "third": wave})
    pulled, half = pulls(packed, groups, [Asked(weights, {"d": direction}), halved], T, 96)
    at_half = dict(zip(half.names, half.sums, strict=True))
    assert set(at_half) == {(family, name) for family in halved.families for _, name in pulled.names}
    for name, sums in zip(pulled.names, pulled.sums, strict=True):
        np.testing.assert_allclose(at_half[name] * 2, sums, rtol=1e-4, atol=1e-5)
    found = dict(zip(pulled.names, pulled.sums, strict=True))
    embedding = "model.embed_tokens.weight"  # tied: a gradient has both uses in one
    found["d", embedding] = found["d", embedding] + found.pop(("d", HEAD))
    wanted = by_gradients(policy, groups, weights, direction)
    assert {name for _, name in found} == set(wanted)
    assert pulled.uncovered == ()
    for name, values in wanted.items():
        assert found["d", name] == pytest.approx(values, rel=2e-3, abs=2e-4 * np.abs(values).max()), name


def test_the_slope_of_the_temperature_is_that_of_its_scores(policy, groups, weights):
    (pulled,) = pulls(policy, groups, [Asked(weights, {})], T, 1024)
    step = 1e-3
    high, low = (np.concatenate(policy.score(groups, T * np.exp(sign * step))) for sign in (1, -1))
    assert pulled.temperature == pytest.approx((high - low) / (2 * step), rel=1e-2, abs=2e-3)


def test_nothing_of_a_pass_stays_in_memory(policy, groups, weights):
    gc.collect()
    before = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    for _ in range(3):
        pulls(policy, groups, [Asked(weights, {"d": scale})], T, 64)
    gc.collect()
    assert sum(isinstance(each, torch.Tensor) for each in gc.get_objects()) <= before
