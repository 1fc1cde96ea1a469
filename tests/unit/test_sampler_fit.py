"""Settings that a sampler used without being asked are fitted from its numbers.

Draws that betray one are noticed.
"""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from lockstep.parity.explain.semantics.held import Held, tokens_of_every_part
from lockstep.parity.explain.semantics.hypotheses import candidate_logprobs, candidates_of
from lockstep.parity.explain.semantics.logit_bias import BiasFit
from lockstep.parity.explain.semantics.penalties import PenaltyFit, seen_before
from lockstep.parity.explain.semantics.sampler import (
    examine_draws,
    fitted_temperature,
    hidden_temperature,
    setting_hypotheses,
)
from lockstep.parity.explain.semantics.truncation import fitted_truncation
from lockstep.policy.model import load_policy
from lockstep.policy.truncation import kept
from lockstep.records.samples import Group, Samples
from lockstep.records.tokens import Completion, SamplingParams, pack_ids, pack_logprobs
from lockstep.training.trainer import Trainer

LIMIT = 1e-4
PLAIN = SamplingParams(max_tokens=16)


def sampled(logits, sampling, seed=0, noise=2e-5):
    """Ids drawn from, and numbers reported of, processed ``logits`` [N, V]."""
    z = logits / sampling.temperature
    if sampling.truncates:
        z = z.masked_fill(~kept(z.log_softmax(-1), sampling), float("-inf"))
    logprobs = z.log_softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
    numbers = logprobs.gather(1, ids[:, None])[:, 0]
    return ids, numbers + noise * torch.randn(len(ids), generator=generator)


@pytest.fixture(scope="module")
def logits():
    # Zipf-like, as a language model's: some rows sure, some not, a long tail far below the noise.
    generator = torch.Generator().manual_seed(1)
    return torch.randn(100, 4000, generator=generator) * torch.linspace(1.0, 6.0, 100)[:, None]


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"top_k": 5}, "top-k 5"),
        ({"top_k": 50}, "top-k 50"),
        ({"top_p": 0.9}, "top-p 0.9"),
        ({"top_p": 0.62}, "top-p 0.62"),
        ({"min_p": 0.1}, "min-p 0.1"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_hidden_truncation_is_fitted(logits, setting, name, seed):
    ids, numbers = sampled(logits, replace(PLAIN, **setting), seed)
    found = fitted_truncation(Held(logits, ids, numbers), LIMIT)
    assert found is not None
    assert found.name.split()[0] == name.split()[0]
    assert float(found.name.split()[1]) == pytest.approx(float(name.split()[1]), rel=0.05)


def test_nothing_is_fitted_where_nothing_is_hidden(logits):
    ids, numbers = sampled(logits, PLAIN)
    assert fitted_truncation(Held(logits, ids, numbers), LIMIT) is None
    ids, numbers = sampled(logits, replace(PLAIN, temperature=0.7))
    assert fitted_truncation(Held(logits, ids, numbers), LIMIT) is None


@pytest.mark.parametrize("noise", [1e-7, 1e-6, 1e-5])
def test_one_number_that_is_off_is_no_truncation(noise):
    """A flipped bit in a log: a min-p that cuts next to nothing leaves a median within the limit."""
    logits = torch.randn(128, 97, generator=torch.Generator().manual_seed(3))
    ids, numbers = sampled(logits, PLAIN, noise=noise)
    numbers[int(numbers.argmin())] += 2.0
    assert fitted_truncation(Held(logits, ids, numbers), LIMIT) is None


@pytest.mark.parametrize("temperature", [0.37, 0.9, 1.6])
def test_the_temperature_is_fitted(logits, temperature):
    ids, numbers = sampled(logits, replace(PLAIN, temperature=temperature))
    found, miss = fitted_temperature(logits, ids, numbers)
    assert found == pytest.approx(temperature, rel=1e-3)
    assert miss < LIMIT


def test_the_temperature_that_was_asked_for_is_never_the_cause(logits):
    ids, numbers = sampled(logits, PLAIN)
    numbers[::9] = 0.0  # the median still fits, and so does T = 1, which was asked for
    assert hidden_temperature(Held(logits, ids, numbers), PLAIN, 0.5) is None
    ids, numbers = sampled(logits, replace(PLAIN, temperature=0.9))
    other = hidden_temperature(Held(logits, ids, numbers), PLAIN, LIMIT)
    assert other is not None
    assert other.name == "temperature 0.9"


@pytest.mark.parametrize("biases", [{7: 3.0}, {7: -100.0}, {7: 1.37, 20: -100.0}, {3: -2.0, 7: 0.5, 11: 4.0}])
def test_biases_are_fitted(logits, biases):
    likely = logits.mean(0).argsort(descending=True)
    biases = {int(likely[at]): bias for at, bias in biases.items()}
    biased = logits.clone()
    for token, bias in biases.items():
        biased[:, token] += bias
    ids, numbers = sampled(biased, PLAIN)
    fit = BiasFit(logits.log_softmax(-1), ids, numbers)
    while fit.step() > LIMIT / 2 and len(fit.biases) < 6:
        pass
    assert set(fit.biases) == set(biases)
    for token, bias in biases.items():
        assert fit.biases[token] == pytest.approx(bias, abs=0.1) or max(fit.biases[token], bias) < -5.0


@pytest.fixture(scope="module")
def trainer(tiny_model_dir):
    return Trainer(load_policy(tiny_model_dir, "float32", "float32"), None)


SHARP = 2.0
"""The tiny model's logits are nearly flat; the asked temperature is its inverse."""


def drawn(trainer, sampling, n=40, seed=0):
    """Groups whose completions are drawn from the policy itself, all of them one token at a time."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 97, 5).astype(np.int32) for _ in range(n)]
    tokens = np.empty((n, 0), np.int32)
    for _ in range(8):
        groups = [
            Group(np.r_[p, t].astype(np.int32), [np.zeros(1, np.int32)])
            for p, t in zip(prompts, tokens, strict=True)
        ]
        with torch.no_grad():
            z = trainer.logits(torch.cat(trainer.hidden(groups))) * SHARP / sampling.temperature
        if sampling.truncates:
            z = z.masked_fill(~kept(z.log_softmax(-1), sampling), float("-inf"))
        cumulative = z.double().softmax(-1).numpy().cumsum(-1)
        new = (cumulative < rng.random((n, 1)) * cumulative[:, -1:]).sum(-1)
        tokens = np.c_[tokens, new].astype(np.int32)
    return [Group(prompt, [ids]) for prompt, ids in zip(prompts, tokens, strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_honest_draws_are_not_odd(trainer, seed):
    groups = drawn(trainer, PLAIN, seed=seed)
    assert examine_draws(trainer, groups, replace(PLAIN, temperature=1 / SHARP)).oddity() == ""


def test_the_model_is_asked_once_what_tokens_were_drawn_from(trainer, monkeypatch):
    groups = drawn(trainer, PLAIN)
    asked = []
    once = trainer.hidden
    monkeypatch.setattr(trainer, "hidden", lambda groups: asked.append(groups) or once(groups))
    examine_draws(trainer, groups, PLAIN)
    assert len(asked) == 1


@pytest.mark.parametrize("hidden", [{"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.4}])
def test_draws_from_another_distribution_are_odd(trainer, hidden):
    groups = drawn(trainer, replace(PLAIN, **hidden))
    assert examine_draws(trainer, groups, replace(PLAIN, temperature=1 / SHARP)).oddity()


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.3}, {"presence_penalty": 0.4}, {"frequency_penalty": 0.3}]
)
def test_a_penalty_over_seen_tokens_alone_is_the_penalty_over_all(trainer, penalty):
    sampling = replace(PLAIN, temperature=0.5)
    rng = np.random.default_rng(3)
    groups = [
        Group(rng.integers(0, 20, n).astype(np.int32), [rng.integers(0, 20, 9).astype(np.int32)])
        for n in (2, 9, 5)
    ]
    asked = replace(sampling, **penalty)
    (penalised,) = [c for c in candidates_of(asked) if c.penalised and c.temperature == 0.5]
    expected = [candidate_logprobs(trainer, group, asked, [penalised])[0] for group in groups]
    completions = [
        Completion(at, 0, pack_ids(g.completions[0]), pack_logprobs(e), "length", ())
        for at, (g, e) in enumerate(zip(groups, expected, strict=True))
    ]
    sample = Samples.of([group.prompt for group in groups], completions, sampling)
    logits, ids, numbers = tokens_of_every_part(trainer, groups, sample.engine_logprobs)
    fit = PenaltyFit(logits, ids, *seen_before(sample), sampling.temperature)
    # float32 numbers near 16 have a spacing of 1e-6, logits at T = 0.5 twice that; two orders of summing
    # differ by a few.
    np.testing.assert_allclose(fit.scores(**penalty).numpy(), numbers.numpy(), rtol=0.0, atol=1e-5)
    assert np.abs(fit.scores().numpy() - numbers.numpy()).max() > 1e-2


def first_that_fits(*asked):
    return next((found for _, look in setting_hypotheses(*asked) if (found := look()) is not None), None)


def test_hidden_settings_of_a_whole_policy(trainer):
    groups = drawn(trainer, PLAIN, n=12)
    engine = np.concatenate(trainer.score(groups, 0.8))
    held = tokens_of_every_part(trainer, groups, engine)
    asked = replace(PLAIN, temperature=0.5)
    found = first_that_fits(trainer, groups, engine, asked, LIMIT, lambda: held)
    assert found is not None
    assert found.cause == "temperature_altered"
    assert "0.8" in found.name
    noise = np.random.default_rng(0).normal(0, 0.1, engine.size).astype(np.float32)
    engine = engine + noise
    held = tokens_of_every_part(trainer, groups, engine)
    assert first_that_fits(trainer, groups, engine, asked, LIMIT, lambda: held) is None
