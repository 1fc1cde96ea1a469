"""The trainer on another device than its inputs.

The whole step, and what parity asks, without an operator that mixes the two.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.policy.model import load_policy
from lockstep.policy.packing import Group
from lockstep.policy.variants import Earlier, EarlierHead, InDtype, Perturbed, Quantised, Scaled
from lockstep.records.samples import Sample
from lockstep.records.versions import VersionSpan
from lockstep.training.trainer import Trainer

HERE = Path(__file__).parent


def sibling(name):
    """A module of this folder: pytest imports tests by their paths, not as a package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


steps, pretend = sibling("test_training_step"), sibling("pretend_device")


@pytest.fixture
def plain(tiny_model_dir):
    """The same trainer on the CPU."""
    return Trainer(load_policy(tiny_model_dir, "float32", "float32"), steps.recipe(minibatches=2))


@pytest.fixture
def rollouts(plain):
    """They come from the CPU, as they do from an engine."""
    return steps.drawn(plain)


@pytest.fixture
def trainer(tiny_model_dir, plain, rollouts):
    """On the device."""
    policy = load_policy(tiny_model_dir, "float32", "float32")
    with pretend.PretendCuda() as device:
        for tensor in (*policy.model.parameters(), *policy.model.buffers()):
            device.send(tensor)
        yield Trainer(policy, steps.recipe(minibatches=2))


def test_operators_that_mix_devices_are_seen(trainer):
    there = torch.ones(3, device="cuda")
    assert (there.device.type, trainer.device.type) == ("cuda", "cuda")
    assert (there + torch.tensor(1.0)).device.type == "cuda", "a scalar is welcome"
    with pytest.raises(RuntimeError, match="cuda"):
        there + torch.ones(3)
    with pytest.raises(TypeError, match="cuda"):
        there.numpy()
    assert there.to("cpu").device.type == "cpu"


def test_a_step_and_a_rehearsal_mix_no_devices_and_give_the_same_numbers(trainer, plain, rollouts):
    rehearsed = trainer.rehearse(rollouts, steps.recipe())
    assert rehearsed.loss == plain.rehearse(rollouts, steps.recipe()).loss
    figures = trainer.step(rollouts, 0, steps.gate_of([]))
    expected = plain.step(rollouts, 0, steps.gate_of([]))
    assert all(figures[name] == value for name, value in expected.items() if not name.endswith("_s"))
    assert trainer.digests() == plain.digests()


def test_what_parity_asks_mixes_no_devices(trainer):
    groups = [Group(np.arange(3, 9, dtype=np.int32), [np.arange(20, 27, dtype=np.int32)])]
    assert trainer.logits(trainer.hidden(groups)[0]).device.type == "cuda"
    names = trainer.parameter_names()[:2]
    assert len(trainer.slopes(groups, np.array([1, 4]), 1.0, names)) == 2
    noise = Perturbed(trainer.snapshot(), 0.1, seed=0)
    before = trainer.score(groups, 1.0)
    with trainer.holding(noise):
        for variant in (Earlier(noise.before), EarlierHead(noise.before), Scaled((names[1],), 2.0)):
            with trainer.holding(variant):
                assert np.isfinite(trainer.score(groups, 1.0)[0]).all()
        spans = (VersionSpan(0, 3, 0), VersionSpan(3, 7, 1))
        spanning = Sample(
            group=0, sample=0, item=0, prompt_ids=groups[0].prompt, token_ids=groups[0].completions[0],
            loss_mask=np.ones(7, bool), engine_logprobs=np.zeros(7, np.float32), version_spans=spans,
            finish_reason="length",
        )  # fmt: skip
        for kept in (True, False):
            trainer.versions_of({0: noise.before}).piecewise([spanning], 1, 1.0, kept=kept)
    for variant in (InDtype("bfloat16"), Quantised("int8")):
        with trainer.holding(variant):
            trainer.score(groups, 1.0)
    assert np.array_equal(trainer.score(groups, 1.0)[0], before[0])
