"""Which tensors explain a gap: named by gradients, proven by a re-score.

And which settings the two sides have otherwise.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.parity.canary import Canary
from lockstep.parity.evidence import gather
from lockstep.parity.explain.weights import attribution
from lockstep.parity.explain.weights.attribution import SlopesAndGap, label, rounded, scaled, stale
from lockstep.parity.explain.weights.model_settings import Departure, departures
from lockstep.parity.perturbation import perturbed
from lockstep.policy.variants import Earlier, Scaled
from tests.unit.bag_pair import bag_pair

LIMIT = 1e-5
NAMES = ["embed", "head", "layers.0.mix.weight", "layers.1.mix.weight"]


@pytest.fixture(scope="module")
def pair():
    return bag_pair()


@pytest.fixture(scope="module")
def canary(pair):
    return Canary.of(gather(pair).neutral, 64)


def stale_of(pair, canary, *old):
    """What is said of an engine whose tensors ``old`` are those of before a perturbation."""
    noise = perturbed(pair)
    with pair.trainer.holding(noise):
        with pair.trainer.holding(Earlier(noise.before, old)):
            engine = canary.trainer_scores(pair)
        return stale(pair, canary, noise.before, engine, LIMIT)


@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_is_found_among_all(pair, canary, name):
    named = stale_of(pair, canary, name)
    assert (named.label, named.factor, named.change) == (name, 1.0, "")
    assert named.miss <= LIMIT


@pytest.mark.parametrize("old", [("embed", "head"), ("head", "layers.0.mix.weight", "layers.1.mix.weight")])
def test_a_set_that_is_no_natural_one_is_put_together(pair, canary, old):
    named = stale_of(pair, canary, *old)
    assert set(named.label.split(", ")) == set(old)


def test_nothing_is_named_that_a_re_score_does_not_prove(pair, canary):
    """Scores that no mixture of old and new gives."""
    noise = perturbed(pair)
    with pair.trainer.holding(noise):
        random = canary.trainer_scores(pair) + np.random.default_rng(0).normal(
            0, 0.1, canary.owners.size
        ).astype(np.float32)
        assert stale(pair, canary, noise.before, random, LIMIT) is None
        assert scaled(pair, canary, random, LIMIT) is None
        assert rounded(pair, canary, random, LIMIT) is None


@settings(max_examples=3)
@given(factor=st.floats(0.75, 1.5).filter(lambda f: abs(f - 1) > 0.05), name=st.sampled_from(NAMES))
def test_a_factor_is_fitted_and_the_trainer_left_as_it_was(factor, name):
    pair = bag_pair()
    canary = Canary.of(gather(pair).neutral, 64)
    before = pair.trainer.weights()
    with pair.trainer.holding(Scaled((name,), factor)):
        engine = canary.trainer_scores(pair)
    named = scaled(pair, canary, engine, 1e-4)
    assert named.label == name
    assert named.factor == pytest.approx(factor, rel=1e-3)
    assert all(torch.equal(before[at], now) for at, now in pair.trainer.weights().items())


def test_of_sets_that_explain_alike_the_smallest_is_named_and_its_equals_beside_it(pair, canary):
    """A tensor that did not change is old and new at once: with it or without it, the scores are the same."""
    noise = perturbed(pair)
    with pair.trainer.holding(noise):
        same = pair.trainer.snapshot().values["layers.0.mix.weight"]
        towards = type(noise.before)(noise.before.values | {"layers.0.mix.weight": same})
        with pair.trainer.holding(Earlier(towards, ("layers.1.mix.weight",))):
            engine = canary.trainer_scores(pair)
        assert stale(pair, canary, towards, engine, LIMIT).label == "layers.1.mix.weight"
        nothing = stale(pair, canary, towards, canary.trainer_scores(pair), LIMIT)
    assert nothing.label == "layers.0.mix.weight", "all is new, and this one may be called old"


@settings(max_examples=15)
@given(st.data())
def test_to_first_order_the_set_that_made_the_gap_is_ranked_first(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    names = [
        f"model.layers.{n}.{kind}.weight"
        for n in range(3)
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    ]
    moves = rng.normal(size=(24, len(names)))
    chosen = data.draw(st.sampled_from([(4,), (0, 1), (2, 5, 8), (6, 7, 8)]))
    gap = moves[:, list(chosen)].sum(1)
    ranked = attribution._ranked(SlopesAndGap(moves, gap), names, free=False)
    assert set(ranked[0].names) == {names[at] for at in chosen}
    assert ranked[0].miss == pytest.approx(0.0, abs=1e-9)
    assert [hypothesis.miss for hypothesis in ranked] == sorted(hypothesis.miss for hypothesis in ranked)
    one = attribution._ranked(SlopesAndGap(moves, -0.3 * moves[:, 4]), names, free=True)
    assert one[0].names == (names[4],)
    assert one[0].factor == pytest.approx(0.7)


def test_labels_read_as_what_they_are():
    q, up = (f"model.layers.{{}}.{kind}.weight" for kind in ("self_attn.q_proj", "mlp.up_proj"))
    assert label(("lm_head.weight",)) == "lm_head.weight"
    assert label((q.format(1), up.format(1))) == "layer 1: mlp.up_proj.weight, self_attn.q_proj.weight"
    both = tuple(name.format(layer) for layer in (1, 2) for name in (q, up))
    assert label(both) == "mlp.up_proj.weight and self_attn.q_proj.weight of layers 1 to 2"
    assert label((q.format(1), up.format(2))) == f"{q.format(1)}, {up.format(2)}", "no kind is in both layers"
    assert label((q.format(1), "lm_head.weight")) == f"{q.format(1)}, lm_head.weight"
    many = tuple(f"model.layers.{n}.part{kind}.weight" for n in (0, 1) for kind in range(5))
    assert label(many) == "layers 0 to 1"


def sides(ours, theirs, **options):
    resolved = {f"hf_config.{key}": value for key, value in theirs.items()} | {"dtype": "elsewhere"}
    engine = SimpleNamespace(ready=SimpleNamespace(resolved=resolved))
    recipe = SimpleNamespace(engine=SimpleNamespace(options=options))
    return SimpleNamespace(trainer=SimpleNamespace(config=ours), engine=engine, recipe=recipe)


OURS = {
    "rms_norm_eps": 1e-5,
    "vocab_size": 97,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}


def test_settings_that_are_alike_are_no_departure_wherever_they_stand():
    alike = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_parameters.rope_type": "default"}
    assert departures(sides(OURS, alike)) == []


def test_a_setting_is_matched_by_its_last_name_and_told_in_the_trainers_place():
    found = departures(sides(OURS, {"rope_theta": 500.0, "rms_norm_eps": 0.1}))
    assert found == [
        Departure(("rope_parameters", "rope_theta"), 10000.0, 500.0),
        Departure(("rms_norm_eps",), 1e-5, 0.1),
    ]


@pytest.mark.parametrize(
    "name", ["vocab_size", "torch_dtype", "head_dtype", "architectures", "eos_token_id", "use_cache"]
)
def test_what_changes_no_log_probability_is_no_departure(name):
    assert departures(sides(OURS | {name: 1}, {name: 2})) == []


def test_one_that_the_trainer_lacks_counts_in_a_section_that_it_has_or_where_the_recipe_asks_for_it():
    theirs = {"rope_parameters.factor": 4.0, "attention_bias": True}
    assert departures(sides(OURS, theirs)) == [Departure(("rope_parameters", "factor"), None, 4.0)]
    asked = departures(sides(OURS, theirs, hf_overrides={"attention_bias": True}))
    assert Departure(("attention_bias",), None, True) in asked


def test_a_setting_that_the_engine_resolved_twice_is_told_once():
    found = departures(sides(OURS, {"rope_theta": 500.0, "rope_parameters.rope_theta": 500.0}))
    assert found == [Departure(("rope_parameters", "rope_theta"), 10000.0, 500.0)]
