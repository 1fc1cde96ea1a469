"""On a real GPU: the step, and the weights an engine would load, against the same on the CPU.

NOT_RUN where there is none.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lockstep.policy.model import load_policy
from lockstep.policy.packing import Group
from lockstep.training.trainer import Trainer
from lockstep.weights.publish import DoublePublisher, WeightPublisher

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT_RUN: torch finds no CUDA device here"
)

spec = importlib.util.spec_from_file_location(
    "steps", Path(__file__).parents[1] / "unit" / "test_training_step.py"
)
steps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(steps)

GROUPS = [
    Group(
        np.arange(3, 9, dtype=np.int32),
        [np.arange(20, 27, dtype=np.int32), np.arange(40, 45, dtype=np.int32)],
    )
]
ACROSS_NATS = 1e-4
"""fp32 on another device: the noise that tolerances.py allows between two sides."""


@pytest.mark.parametrize("publisher", [WeightPublisher, DoublePublisher])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu_and_its_weights_are_published(
    tiny_model_dir, tmp_path, publisher
):
    recipe = steps.recipe(minibatches=2)
    there = Trainer(
        load_policy(tiny_model_dir, "float32", "float32", "auto"),
        recipe,
        lambda model: publisher(model, tmp_path),
    )
    here = Trainer(load_policy(tiny_model_dir, "float32", "float32", "cpu"), recipe)
    assert (there.device.type, here.device.type) == ("cuda", "cpu")
    rollouts = steps.drawn(here)
    figures, expected = (trainer.step(rollouts, 0, steps.gate_of([])) for trainer in (there, here))
    for name in ("loss", "grad_norm", "entropy_mean_nats"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)
    for ours, theirs in zip(there.score(GROUPS, 1.0), here.score(GROUPS, 1.0), strict=True):
        assert np.abs(ours - theirs).max() <= ACROSS_NATS
    published = load_file(there.publish(1).path)
    there.settle()
    weights = there.weights()
    assert published.keys() == weights.keys()
    assert all(torch.equal(published[name], weights[name].cpu()) for name in weights)
