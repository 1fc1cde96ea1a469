"""What is known of the two sides."""

from types import SimpleNamespace

import pytest
import torch

from lockstep.engines.base import EngineFacts
from lockstep.parity.layers.numerics import _note
from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import NOISE


def pair_of(trainer, **resolved):
    told = {name.replace("__", "."): value for name, value in resolved.items()}
    facts = EngineFacts(cache_dtype="its.cache", device="its.device")
    engine = SimpleNamespace(ready=SimpleNamespace(resolved=told), facts=facts)
    ours = SimpleNamespace(dtype=str(trainer), head_dtype="torch.float32", device=torch.device("cpu"))
    return Pair(engine, ours, *[SimpleNamespace()] * 3)


@pytest.mark.parametrize("trainer", [torch.float32, torch.bfloat16])
def test_a_dtype_that_the_engine_does_not_tell_is_unknown_and_the_trainers_bounds_hold(trainer):
    pair = pair_of(trainer)
    assert (pair.engine_dtype, pair.engine_head_dtype) == ("", "")
    assert pair.noise == pair.engine_noise == NOISE[str(trainer)]
    assert _note(pair) == " (the engine does not tell its dtype)"


def test_a_cache_that_it_tells_widens_what_it_may_differ_from_itself_by():
    assert pair_of(torch.float32, its__cache="auto").engine_noise == NOISE["torch.float32"]
    kept = pair_of(torch.float32, its__cache="fp8_e5m2")
    assert (kept.engine_noise, kept.noise) == (NOISE["fp8"], NOISE["torch.float32"])


@pytest.mark.parametrize(
    ("told", "shared"), [({}, True), ({"its__device": "cpu"}, True), ({"its__device": "cuda"}, False)]
)
def test_cores_are_shared_unless_it_says_otherwise(told, shared):
    assert pair_of(torch.float32, **told).shares_cores is shared


def test_a_dtype_that_it_tells_widens_them():
    pair = pair_of(torch.float32, worker__parameter_dtype="torch.bfloat16")
    assert pair.noise == pair.engine_noise == NOISE["torch.bfloat16"]
    assert "engine body torch.bfloat16" in _note(pair)
