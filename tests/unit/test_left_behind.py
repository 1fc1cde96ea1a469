"""A tensor that stays behind is suspected by tokens and named by an experiment; none is where none did."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lockstep.config.recipe import load_recipe
from lockstep.parity.canary import Canary
from lockstep.parity.delivered import Moves
from lockstep.parity.left_behind import AskedTokens, Look, look, tried
from lockstep.parity.tolerances import noise_of
from lockstep.policy.model import load_policy
from lockstep.policy.parameters import assign, parameters_of
from lockstep.policy.pulls import HEAD
from lockstep.policy.variants import Earlier, EarlierHead
from lockstep.records.samples import Group, Samples
from lockstep.records.tokens import FLOAT32, INT32, Completion, SamplingParams
from lockstep.records.versions import VersionSpan
from lockstep.training.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
DOWN = "model.layers.1.mlp.down_proj.weight"
PROMPTS, LENGTH = 192, 8
NOISE_NATS = 0.02
"""As wide as half of what a tensor's change does to a token."""


class Engine:
    """Serves what it was sent, but for tensors that it loses; its numbers are as rounded as an engine's."""

    def __init__(self, policy):
        self.policy = policy
        self.lost = ()
        self.rng = np.random.default_rng(7)

    def score(self, sequences):
        groups = [Group(ids[:1], [ids[1:]]) for ids in sequences]
        return [rounded(scores, self.rng) for scores in self.policy.score(groups, 1.0)]


@pytest.fixture(scope="module")
def pair(tiny_model_dir):
    policy, served = (load_policy(tiny_model_dir, "float32", "float32") for _ in range(2))
    places = parameters_of(served.model)

    def sync(version):
        sent = parameters_of(policy.model)
        assign(places, {name: value for name, value in sent.items() if name not in engine.lost})

    engine = Engine(served)
    return SimpleNamespace(
        trainer=Trainer(policy, load_recipe(RECIPE)),
        engine=engine,
        sync=sync,
        version=1,
        seed=0,
        noise=noise_of("torch.float32"),
        exactly=nullcontext,
        drawn={},
    )


def rounded(logprobs, rng):
    width = NOISE_NATS * np.minimum(1.0, 0.05 - logprobs)
    return (logprobs + width * rng.standard_t(5, logprobs.size)).astype(np.float32)


@pytest.fixture(scope="module")
def since(pair):
    """The weights before an update of every tensor, which the trainer has made since."""
    before = pair.trainer.snapshot()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters_of(pair.trainer._policy.model).values():
            size = 0.02 * parameter.square().mean().sqrt()
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    pair.drawn.clear()
    return before


def samples(seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 97, rng.integers(3, 9)).astype(np.int32) for _ in range(PROMPTS)]
    made = [
        Completion(
            prompt_index=row,
            sample_index=0,
            token_ids=rng.integers(3, 97, LENGTH).astype(INT32).tobytes(),
            logprobs=np.zeros(LENGTH, FLOAT32).tobytes(),
            finish_reason="length",
            version_spans=(VersionSpan(0, LENGTH, 1),),
        )
        for row in range(PROMPTS)
    ]
    return Samples.of(prompts, made, SamplingParams(max_tokens=LENGTH))


def drawn(pair, seed, variant=None):
    """Samples whose engine's numbers are those of the trainer, as a variant, and noise. With their moves.

    Each is drawn once.
    """
    which = seed, type(variant), getattr(variant, "names", None)
    if which not in pair.drawn:
        rng = np.random.default_rng(seed)
        sample = samples(seed)
        served = here = sample.scored(pair.trainer)
        if variant is not None:
            with pair.trainer.holding(variant):
                served = sample.scored(pair.trainer)
        new = here.astype(np.float64)
        sample.fill(engine_logprobs=rounded(served, rng))
        moves = Moves(sample.engine_logprobs - new, np.ones(new.size), new, sample.owners)
        pair.drawn[which] = sample, moves
    return pair.drawn[which]


def asked(*drawn_as):
    sample, moves = drawn(*drawn_as)
    return AskedTokens(sample.groups, moves.gap, moves.logprobs)


def suspected(pair, since, variant):
    return look(pair, since, asked(pair, 0, variant)).suspect


@pytest.mark.parametrize("name", [DOWN, "model.layers.0.self_attn.v_proj.weight", "model.norm.weight"])
def test_a_tensor_that_stays_behind_is_suspected_and_an_experiment_names_it(pair, since, name):
    pair.sync(1)
    assign(parameters_of(pair.engine.policy.model), {name: since.values[name]})
    pair.engine.lost = (name,)
    suspect = suspected(pair, since, Earlier(since, (name,)))
    assert suspect is not None
    left = tried(pair, suspect, Canary.of(drawn(pair, 300)[0], 512))
    pair.engine.lost = ()
    assert [found.place.tensors for found in left] == [(name,)]
    assert left[0].missing.share == pytest.approx(1.0, abs=0.25)
    assert left[0].place.place in left[0].told()
    assert np.abs(left[0].effect).mean() > 1e-3


def test_a_tied_table_is_one_tensor_and_the_heads_own_copy_another(pair, since):
    table = "model.embed_tokens.weight"
    for variant, tensors in ((Earlier(since, (table,)), (table,)), (EarlierHead(since), (HEAD,))):
        suspect = suspected(pair, since, variant)
        assert suspect is not None
        assert suspect.places[0].tensors == tensors


def test_where_every_tensor_arrived_none_is_suspected_and_what_would_have_shown_is_counted(pair, since):
    found = [look(pair, since, asked(pair, 1000 + seed)) for seed in range(6)]
    assert sum(one.suspect is not None for one in found) <= 1  # of 6 at 1 %: more, once in 700 times
    n = len(parameters_of(pair.trainer._policy.model))
    assert {one.n_tensors for one in found} == {n + 1}, "the head beside the table that it is tied to"
    assert 0 < np.mean([one.n_seen for one in found]) <= n + 1


def test_an_experiment_clears_a_tensor_that_arrives_and_the_weights_are_what_they_were(pair, since):
    pair.sync(1)
    suspect = suspected(pair, since, Earlier(since, (DOWN,)))
    assert suspect is not None
    before = pair.trainer.snapshot().values
    assert tried(pair, suspect, Canary.of(drawn(pair, 300)[0], 512)) == []
    for side in (pair.trainer.snapshot().values, parameters_of(pair.engine.policy.model)):
        assert all(torch.equal(side[name], value) for name, value in before.items())


def test_an_engine_that_moves_but_not_as_the_trainer_does_lacks_no_tensor(pair, since, monkeypatch):
    """Here the trainer reads each probe after another's prompt, as attention that leaks would have it."""
    pair.sync(1)
    suspect = suspected(pair, since, Earlier(since, (DOWN,)))
    assert suspect is not None
    canary = Canary.of(drawn(pair, 300)[0], 512)
    leaking = [
        Group(other.prompt, own.completions)
        for own, other in zip(canary.groups, canary.groups[1:] + canary.groups[:1], strict=True)
    ]
    monkeypatch.setattr(
        canary, "trainer_scores", lambda pair: np.concatenate(pair.trainer.score(leaking, 1.0))
    )
    assert tried(pair, suspect, canary) == []


def test_weights_that_are_what_they_were_are_not_asked(pair):
    assert look(pair, pair.trainer.snapshot(), asked(pair, 0)) == Look()
