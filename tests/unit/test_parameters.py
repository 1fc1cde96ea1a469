"""A model spread over processes (FSDP2) is read and written as the whole one is.

Digests, snapshots, variants, the optimizer's state. One process here: what is told is that every way in and
out goes through ``parameters.py``.
"""

import copy

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from lockstep.config.recipe import Optimizer
from lockstep.policy.fingerprint import weights_digest
from lockstep.policy.model import load_policy
from lockstep.policy.parameters import (
    InLayer,
    Snapshot,
    assign,
    checkpoint_weights,
    in_layer,
    named_weights,
    parameters_of,
    whole,
)
from lockstep.policy.variants import Earlier, Perturbed, Scaled
from lockstep.records.samples import Group
from lockstep.training.optimizer import MasterAdamW

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def spread():
    """A mesh of one process, over which FSDP2 lays what it shards."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture
def both(tiny_model_dir, spread):
    """The same weights twice: whole, and as DTensors."""
    plain = load_policy(tiny_model_dir, "float32", "float32")
    sharded = copy.copy(plain)
    sharded.model = copy.deepcopy(plain.model)
    fully_shard(sharded.model, mesh=spread)
    assert all(hasattr(p, "full_tensor") for p in sharded.model.parameters())
    return plain, sharded


def test_digest_and_checkpoint_are_those_of_the_whole_model(both):
    plain, sharded = both
    assert weights_digest(sharded.model) == weights_digest(plain.model)
    stored = checkpoint_weights(sharded.model)
    assert {name: t.shape for name, t in stored.items()} == {
        n: t.shape for n, t in checkpoint_weights(plain.model).items()
    }
    assert all(not hasattr(tensor, "full_tensor") for tensor in stored.values())
    assign(named_weights(sharded.model), {NORM: torch.full_like(stored[NORM], 2.0)})
    assert weights_digest(sharded.model) != weights_digest(plain.model)
    assign(named_weights(sharded.model), {NORM: checkpoint_weights(plain.model)[NORM]})
    assert weights_digest(sharded.model) == weights_digest(plain.model)


def test_a_variant_changes_it_and_puts_it_back(both):
    plain, sharded = both
    before = Snapshot.of(sharded.model)
    digest = weights_digest(sharded.model)
    earlier = Snapshot({name: value + 1 for name, value in before.values.items()})
    for variant in (Scaled((NORM,), 1.5), Perturbed(before, 0.1, 7), Earlier(earlier)):
        with variant.held(plain), variant.held(sharded):
            held = weights_digest(sharded.model)
            assert held == weights_digest(plain.model) != digest
        assert weights_digest(sharded.model) == digest


def test_values_that_stand_in_leave_no_trace_and_the_memory_that_is_published_as_it_was(both):
    plain, sharded = both
    digest = weights_digest(sharded.model)
    earlier = Snapshot({name: value + 1 for name, value in Snapshot.of(sharded.model).values.items()})
    memory = plain.model.get_parameter(NORM).data
    with earlier.standing_in(plain.model), earlier.standing_in(sharded.model):
        held = weights_digest(sharded.model)
        assert held == weights_digest(plain.model) != digest
        assert not torch.equal(plain.model.get_parameter(NORM), memory)
    assert weights_digest(sharded.model) == digest
    assert weights_digest(plain.model) == digest
    assert plain.model.get_parameter(NORM).data_ptr() == memory.data_ptr()


def test_an_update_and_its_state_are_those_of_the_whole_model(both):
    states = []
    for policy in both:
        optimizer = MasterAdamW(policy.model, Optimizer(lr=1e-2))
        for parameter in policy.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        norm = optimizer.step(0)
        states.append((norm, optimizer.state(), weights_digest(policy.model)))
    (norm, state, digest), (norm_2, state_2, digest_2) = states
    assert norm_2 == pytest.approx(norm, rel=1e-6)
    assert state.keys() == state_2.keys()
    assert all(torch.equal(state[name], state_2[name]) for name in state)
    assert digest == digest_2


def test_the_state_goes_back_in(both):
    plain, sharded = both
    first = MasterAdamW(plain.model, Optimizer(lr=1e-2))
    for parameter in plain.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step(0)
    second = MasterAdamW(sharded.model, Optimizer(lr=1e-2))
    assign(parameters_of(sharded.model), Snapshot.of(plain.model).values)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    for policy, optimizer in ((plain, first), (sharded, second)):
        for parameter in policy.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1)
    for name, parameter in parameters_of(sharded.model).items():
        assert torch.equal(whole(parameter.detach()), parameters_of(plain.model)[name].detach()), name


def test_scores_and_gradients_are_those_of_the_whole_model(tiny_model_dir, spread):
    plain = load_policy(tiny_model_dir, "float32", "float32")
    sharded = copy.copy(plain)
    sharded.model = copy.deepcopy(plain.model)
    for module in (*sharded.model.base_model.layers, sharded.model.base_model, sharded.model):
        fully_shard(module, mesh=spread)
    sharded.head = sharded.model.get_input_embeddings().weight  # tied
    ids = np.arange(3, 20, dtype=np.int32)
    groups = [Group(ids[:5], [ids[5:12], ids[7:16]])]
    scores = zip(plain.score(groups, 1.0), sharded.score(groups, 1.0), strict=True)
    assert all(np.array_equal(a, b) for a, b in scores)
    for policy in (plain, sharded):
        (row,) = policy.rows(groups, 4096)
        policy.scores(row, 1.0).logprobs.sum().backward()
    for name, parameter in parameters_of(plain.model).items():
        gradient = parameters_of(sharded.model)[name].grad
        assert hasattr(gradient, "full_tensor"), "each process holds its part"
        assert torch.equal(whole(gradient), parameter.grad), name


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", InLayer("model.layers.", 3, "mlp.up_proj.weight")),
        ("transformer.h.11.ln_1.bias", InLayer("transformer.h.", 11, "ln_1.bias")),  # GPT-2
        ("model.layers.0.mlp.experts.7.w1", InLayer("model.layers.", 0, "mlp.experts.7.w1")),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_a_tensors_layer_is_read_off_its_name_whatever_its_family_calls_the_stack(name, place):
    assert in_layer(name) == place
