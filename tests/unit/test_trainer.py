"""The owner of the parameters.

What it holds for a hypothesis it puts back exactly, and what it is asked to save it saves.
"""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lockstep.errors import ModelError, UsageError
from lockstep.policy.model import Policy, load_policy, recompute_layers
from lockstep.policy.parameters import Snapshot
from lockstep.policy.variant_settings import (
    AttentionScaled,
    CacheKept,
    DropoutLeftOn,
    Generating,
    LogitsCapped,
    NormEpsilon,
    PositionsDivided,
    RotaryBase,
    SlidingWindow,
)
from lockstep.policy.variants import (
    Configured,
    Earlier,
    EarlierHead,
    InDtype,
    Perturbed,
    Quantised,
    RoundedThrough,
    Scaled,
    Steady,
)
from lockstep.records.samples import Group
from lockstep.training.trainer import Trainer

GROUPS = [
    Group(
        np.arange(3, 20, dtype=np.int32),
        [np.arange(30, 41, dtype=np.int32), np.arange(7, 12, dtype=np.int32)],
    )
]
FIRST = "model.layers.0.mlp.down_proj.weight"
VARIANTS = [
    Scaled((FIRST,), 1.5),
    RoundedThrough("float16"),
    InDtype("bfloat16"),
    InDtype(head="bfloat16"),
    Quantised("int8"),
    Quantised("fp8_e4m3"),
    Configured({("rms_norm_eps",): 0.1}),
    LogitsCapped(0.01),
    RotaryBase(500.0),
    PositionsDivided(4.0),
    NormEpsilon(0.1),
    AttentionScaled(3.0),
    SlidingWindow(4),
    CacheKept("fp8_e5m2"),
    DropoutLeftOn(0.5),
]


@pytest.fixture(scope="module")
def policy(tiny_model_dir) -> Policy:
    return load_policy(tiny_model_dir, "float32", "float32")


@pytest.fixture
def trainer(policy):
    return Trainer(policy, None)


def scores(trainer):
    return np.concatenate(trainer.score(GROUPS, 1.0))


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_a_variant_moves_the_scores_and_is_put_back_exactly(trainer, variant):
    before = scores(trainer)
    weights = trainer.digests()
    with trainer.holding(variant):
        moved = scores(trainer)
    assert np.abs(moved - before).max() > 1e-7
    assert np.array_equal(scores(trainer), before)
    assert trainer.digests() == weights


@pytest.mark.parametrize("variant", VARIANTS[:3], ids=repr)
def test_an_error_under_a_variant_puts_it_back_too(trainer, variant):
    before = scores(trainer)
    with pytest.raises(ZeroDivisionError), trainer.holding(variant):
        raise ZeroDivisionError
    assert np.array_equal(scores(trainer), before)


def test_variants_are_held_inside_one_another(trainer):
    before = scores(trainer)
    with trainer.holding(Scaled((FIRST,), 2.0)):
        scaled = scores(trainer)
        with trainer.holding(InDtype("bfloat16")):
            assert trainer.dtype == "torch.bfloat16"
        assert np.array_equal(scores(trainer), scaled)
        with trainer.holding(Scaled((FIRST,), 0.5)):  # exact: powers of two
            assert np.array_equal(scores(trainer), before)
    assert trainer.dtype == "torch.float32"


def test_earlier_weights_some_of_them_and_the_head_alone(trainer):
    before = scores(trainer)
    noise = Perturbed(trainer.snapshot(), 0.1, seed=3)
    with trainer.holding(noise):
        perturbed = scores(trainer)
        with trainer.holding(Earlier(noise.before)):
            assert np.array_equal(scores(trainer), before)
        with trainer.holding(Earlier(noise.before, (FIRST,))):
            one = scores(trainer)
        with trainer.holding(EarlierHead(noise.before)):
            head = scores(trainer)
        assert np.array_equal(scores(trainer), perturbed)
    assert len({values.tobytes() for values in (before, perturbed, one, head)}) == 4
    assert np.array_equal(scores(trainer), before)


def test_steady_switches_dropout_off_and_puts_each_sequence_in_a_row_of_its_own(trainer):
    before = scores(trainer)
    with trainer.holding(DropoutLeftOn(0.5)):
        assert not np.array_equal(scores(trainer), scores(trainer))
        with trainer.holding(Steady()):
            assert np.abs(scores(trainer) - before).max() < 1e-5
        assert not np.array_equal(scores(trainer), scores(trainer)), "and on again"


def test_settings_with_which_the_weights_make_no_model_are_refused(trainer):
    with pytest.raises(ModelError, match=r"hidden_size"), trainer.holding(Configured({("hidden_size",): 7})):
        pass
    assert trainer.generation_config.temperature != 0.25
    with trainer.holding(Generating({"temperature": 0.25, "do_sample": True})):
        assert trainer.generation_config.temperature == 0.25


def test_slopes_are_the_derivative_along_the_direction(trainer):
    """Against central differences of the scores, for a scale and for a way back to earlier weights."""
    tokens = np.array([12, 2, 15])
    names = [FIRST, "model.norm.weight"]
    step = 1e-3
    group = [Group(g.prompt, [c]) for g in GROUPS for c in g.completions]
    base = trainer.snapshot().values
    waves = {
        name: 0.01 * torch.sin(torch.arange(base[name].numel())).view(base[name].shape) for name in names
    }
    earlier = Snapshot({name: base[name] + waves[name] for name in names})

    def along(direction, size):
        moved = Snapshot({name: base[name] + size * direction[name] for name in direction})
        with trainer.holding(Earlier(moved)):
            return np.concatenate(trainer.score(group, 0.7))

    for towards, directions in (
        (None, base),
        (earlier, {name: earlier.values[name] - base[name] for name in names}),
    ):
        slopes = trainer.slopes(group, tokens, 0.7, names, towards)
        assert sorted(slope.token for slope in slopes) == sorted(tokens.tolist())
        for at, name in enumerate(names):
            size = step if towards is None else 1.0
            one = {name: directions[name]}
            numeric = (along(one, size) - along(one, -size)) / (2 * size)
            for slope in slopes:
                assert slope.moves[at] == pytest.approx(numeric[slope.token], rel=0.05, abs=2e-4)


def test_slopes_of_frozen_parameters_are_those_of_trained_ones_and_they_stay_frozen(trainer, policy):
    """As the base of a low-rank adapter is: an engine may hold it wrong all the same."""
    tokens = np.array([12, 2, 15])
    names = [FIRST, "model.norm.weight"]
    group = [Group(g.prompt, [c]) for g in GROUPS for c in g.completions]
    trained = trainer.slopes(group, tokens, 0.7, names)
    parameters = dict(policy.model.named_parameters())
    for frozen in ([FIRST], list(parameters)):
        for name in frozen:
            parameters[name].requires_grad_(False)
        try:
            slopes = trainer.slopes(group, tokens, 0.7, names)
            assert [name for name, p in parameters.items() if not p.requires_grad] == frozen
        finally:
            for name in frozen:
                parameters[name].requires_grad_(True)
        for slope, expected in zip(slopes, trained, strict=True):
            assert slope.token == expected.token
            np.testing.assert_array_equal(slope.moves, expected.moves)


def test_recomputed_layers_give_the_same_gradients_and_keep_less(tiny_model_dir):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tiny_model_dir.parent / "four_layers")
    policy = load_policy(tiny_model_dir.parent / "four_layers", "float32", "float32")
    (row,) = policy.rows(GROUPS, 4096)

    def gradients():
        kept = []

        def keep(tensor):
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = policy.scores(row, 1.0).logprobs.sum()
        loss.backward()
        found = [p.grad.clone() for p in policy.model.parameters()]
        policy.model.zero_grad()
        return found, sum(kept)

    plain, all_of_it = gradients()
    recompute_layers(policy.model)
    again, less = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert less < all_of_it / 3


def test_a_device_that_is_not_there_is_told(tiny_model_dir):
    if torch.cuda.is_available():
        pytest.skip("NOT_RUN: this machine has CUDA")
    with pytest.raises(UsageError, match=r"model\.device"):
        load_policy(tiny_model_dir, "float32", "float32", "cuda")
    assert load_policy(tiny_model_dir, "float32", "float32", "auto").placed == "auto: no CUDA here"
