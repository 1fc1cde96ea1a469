"""AdamW over fp32 masters: what a bf16 model gains, and that none of the state is lost on the way to disk."""

from typing import get_args

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from lockstep.config.recipe import LrSchedule, Optimizer
from lockstep.errors import DivergenceError, RecipeError
from lockstep.training.optimizer import MasterAdamW

CONFIG = msgspec.convert({"lr": 1e-4, "max_grad_norm": 1.0, "weight_decay": 0.01}, Optimizer)


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(8, 8, generator=generator).bfloat16().to(dtype))
        self.b = nn.Parameter(torch.randn(8, generator=generator).bfloat16().to(dtype))
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)


def gradients(step, scale=1e-2):
    """Of a step: the same for every dtype, for bf16 holds them exactly."""
    generator = torch.Generator().manual_seed(100 + step)
    return [(torch.randn(shape, generator=generator) * scale).bfloat16() for shape in ((8, 8), (8,))]


def stepped(model, optimizer, steps):
    norms = []
    for step in steps:
        for parameter, gradient in zip((model.a, model.b), gradients(step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        norms.append(optimizer.step(step))
    return norms


def test_a_bf16_models_masters_go_the_fp32_models_way_bit_for_bit():
    single = Model(torch.float32)
    half = Model(torch.bfloat16)
    of_single, of_half = MasterAdamW(single, CONFIG), MasterAdamW(half, CONFIG)
    assert stepped(single, of_single, range(20)) == stepped(half, of_half, range(20))
    for mine, master, parameter in zip(of_single.masters, of_half.masters, of_half.parameters, strict=True):
        assert torch.equal(mine, master)
        assert torch.equal(parameter, master.bfloat16()), "the model holds its masters, rounded once"


def test_updates_too_small_for_bf16_add_up():
    """One update is below half a unit in the last place of a weight near 1; twenty are above it."""
    config = msgspec.structs.replace(CONFIG, weight_decay=0.0)
    model = Model(torch.bfloat16)
    with torch.no_grad():
        model.b.fill_(1.0)
    optimizer = MasterAdamW(model, config)
    before = model.b.detach().clone()
    for step in range(40):
        model.b.grad = torch.full_like(model.b, 0.1)
        optimizer.step(step)
        if step == 0:
            assert torch.equal(model.b, before)
    assert (model.b < before).all()


def test_parameters_keep_their_place_in_memory_and_a_frozen_one_its_value():
    model = Model(torch.bfloat16)
    places = [p.data_ptr() for p in model.parameters()]
    stepped(model, MasterAdamW(model, CONFIG), range(3))
    assert [p.data_ptr() for p in model.parameters()] == places
    assert torch.equal(model.frozen, torch.ones(3, dtype=torch.bfloat16))


def test_the_norm_is_of_before_clipping_and_the_update_of_after_it():
    model = Model(torch.float32)
    config = msgspec.structs.replace(CONFIG, max_grad_norm=0.5, beta1=0.0, beta2=0.999)
    optimizer = MasterAdamW(model, config)
    given = gradients(0, scale=3.0)
    for parameter, gradient in zip((model.a, model.b), given, strict=True):
        parameter.grad = gradient.float()
    norm = float(torch.cat([g.float().reshape(-1) for g in given]).norm())
    assert optimizer.step(0) == pytest.approx(norm, rel=1e-6)
    clipped = optimizer.state()["exp_avg.a"]
    torch.testing.assert_close(clipped, given[0].float() * 0.5 / norm, rtol=1e-4, atol=0.0)
    assert model.a.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_none_moves_nothing(bad):
    model = Model(torch.bfloat16)
    optimizer = MasterAdamW(model, CONFIG)
    stepped(model, optimizer, range(2))
    before = [p.detach().clone() for p in model.parameters()]
    model.a.grad = torch.full_like(model.a, bad)
    with pytest.raises(DivergenceError, match="gradient norm"):
        optimizer.step(2)
    assert all(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))


def test_warm_up_rises_evenly_to_the_rate_and_stays():
    config = msgspec.structs.replace(CONFIG, lr=1.0, warmup_steps=4)
    optimizer = MasterAdamW(Model(torch.float32), config)
    np.testing.assert_allclose([optimizer.lr_at(n) for n in range(7)], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert MasterAdamW(Model(torch.float32), CONFIG).lr_at(0) == CONFIG.lr


OPTIONS = {
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "inverse_sqrt": {"timescale": 5},
    "cosine_with_min_lr": {"min_lr": 2e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 6, "min_lr_ratio": 0.1, "decay_type": "linear"},
}
NEED_OPTIONS = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"}
SCHEDULES = [(name, {}) for name in get_args(LrSchedule) if name not in NEED_OPTIONS] + list(OPTIONS.items())


@pytest.mark.parametrize(("name", "options"), SCHEDULES)
def test_a_schedules_rates_are_transformers_own_over_a_run(name, options):
    from transformers import get_scheduler

    updates = 24
    warmup = 0 if name == "constant" else 4  # transformers' constant has none
    rate = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=CONFIG.lr)
    theirs = get_scheduler(name, rate, warmup, updates, scheduler_specific_kwargs=options)
    config = msgspec.structs.replace(CONFIG, schedule=name, schedule_options=options, warmup_steps=warmup)
    ours = MasterAdamW(Model(torch.float32), config, updates)
    expected = []
    for _ in range(updates):
        expected += theirs.get_last_lr()
        rate.step()
        theirs.step()
    assert [ours.lr_at(update) for update in range(updates)] == expected
    assert (len(set(expected)) > 1) == (name != "constant")


def test_every_schedule_is_held_to_transformers():
    assert {name for name, _ in SCHEDULES} == set(get_args(LrSchedule))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("cosine", {"cycles": 2}, "unexpected keyword argument 'cycles'"),
        ("cosine_with_min_lr", {}, "min_lr"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "steep"),
        ("polynomial", {"power": "two"}, "for 'polynomial'"),
        ("polynomial", {"lr_end": -1.0}, "negative"),
        ("cosine", {"num_training_steps": 5}, "multiple values"),
        ("constant", {"num_cycles": 2}, "a schedule that has none"),
        ("constant_with_warmup", {"num_cycles": 2}, "a schedule that has none"),
    ],
)
def test_options_that_transformers_refuses_or_would_ignore_are_refused(name, options, told):
    config = msgspec.structs.replace(CONFIG, schedule=name, schedule_options=options)
    with pytest.raises(RecipeError, match=rf"key optimizer\.schedule_options: got .*{told}"):
        MasterAdamW(Model(torch.float32), config, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_went_to_disk_and_back_goes_on_bit_for_bit(dtype, tmp_path):
    from safetensors.torch import load_file, save_file

    model = Model(dtype)
    optimizer = MasterAdamW(model, CONFIG)
    stepped(model, optimizer, range(5))
    state = optimizer.state()
    assert {name.partition(".")[0] for name in state} == {"step", "exp_avg", "exp_avg_sq"} | (
        {"master"} if dtype == torch.bfloat16 else set()
    )
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "state.safetensors")
    other = Model(dtype)
    with torch.no_grad():
        for mine, its in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(its)
    resumed = MasterAdamW(other, CONFIG)
    resumed.restore(load_file(tmp_path / "state.safetensors"))
    assert stepped(model, optimizer, range(5, 12)) == stepped(other, resumed, range(5, 12))
    for mine, its in zip(resumed.state().items(), optimizer.state().items(), strict=True):
        assert mine[0] == its[0]
        assert torch.equal(mine[1], its[1])


def test_a_state_of_before_the_first_step_is_put_back_too():
    model = Model(torch.bfloat16)
    optimizer = MasterAdamW(model, CONFIG)
    fresh = Model(torch.bfloat16)
    resumed = MasterAdamW(fresh, CONFIG)
    resumed.restore(optimizer.state())
    assert stepped(model, optimizer, range(3)) == stepped(fresh, resumed, range(3))
    assert torch.equal(model.a, fresh.a)


def test_a_value_heads_gradient_that_is_no_number_is_refused_and_moves_nothing():
    model = Model(torch.float32)
    head = nn.Linear(8, 1)
    optimizer = MasterAdamW(model, CONFIG, beside=head, beside_lr=1e-3)
    before = [tensor.detach().clone() for tensor in (*model.parameters(), *head.parameters())]
    for parameter in (model.a, model.b, *head.parameters()):
        parameter.grad = torch.ones_like(parameter)
    head.weight.grad[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match="optimizer step, value head: got gradient norm nan"):
        optimizer.step(0)
    after = (*model.parameters(), *head.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
