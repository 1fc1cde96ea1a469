"""Who computes on which cores, where the engine draws beside the trainer."""

from types import SimpleNamespace

import pytest

from lockstep.config.recipe import parse_recipe
from lockstep.engines.vllm.served import CORES, _cores

TABLE = {
    "model": {"path": "m"},
    "task": {"name": "t"},
    "sampling": {"max_tokens": 1},
    "training": {"steps": 1},
}


@pytest.mark.parametrize(
    ("kind", "max_lag", "asked", "engines"),
    [("in_flight", 1, 1, 1), ("in_flight", 1, 0, 0), ("in_flight", 0, 1, 0), ("sync", 1, 1, 0)],
)
def test_the_engine_has_its_own_cores_only_while_it_draws_beside_the_trainer(kind, max_lag, asked, engines):
    settings = {"loop": {"kind": kind}, "rollout": {"max_lag": max_lag, "cores": asked}}
    assert parse_recipe(TABLE | settings, "test").engine_cores == engines


@pytest.mark.parametrize(
    ("flavour", "cores", "variables"),
    [("cpu", 0, {}), ("cpu", 1, {CORES: "4"}), ("cpu", 2, {CORES: "4,6"}), ("cuda", 1, {})],
)
def test_a_cpu_engine_is_bound_to_the_first_of_those_it_would_have_had(flavour, cores, variables):
    environment = SimpleNamespace(flavour=flavour, launch_env=lambda: {CORES: "4,6,7"})
    assert _cores(environment, cores) == variables
