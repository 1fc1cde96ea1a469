"""The last step of an installation: an engine whose sampling and scoring agree, or an error with its log."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep.engines import registry
from lockstep.engines.environments import smoke
from lockstep.errors import EngineError, InstallError
from tests.unit.bag_pair import Bag, BagEngine

ENVIRONMENT = SimpleNamespace(name="vllm", version="0.32.0", generation="V1", python=Path("/opt/python"))


@pytest.fixture
def engine(monkeypatch):
    """Started in the place of the environment's own.

    What it was started with, and whether it was ended, is kept.
    """
    bag = BagEngine(Bag(), {})
    bag.ended = 0

    def close():
        bag.ended += 1

    bag.close = close
    monkeypatch.setattr(smoke.subprocess, "run", lambda command, **_: bag.__dict__.update(made=command))
    monkeypatch.setattr(
        registry, "start", lambda choice, spec: bag.__dict__.update(choice=choice, spec=spec) or bag
    )
    return bag


def test_an_engine_that_scores_what_it_samples_is_good(engine):
    told, capabilities = smoke.smoke_test(ENVIRONMENT, Path("log"))
    assert told.startswith("8 tokens sampled and scored alike to ")
    assert capabilities is engine.ready.capabilities
    assert engine.ended == 1
    assert engine.made[0] == ENVIRONMENT.python, "the model is made by the environment's own interpreter"
    assert engine.made[2] == engine.spec.model_path
    assert not engine.spec.model_path.exists(), "and goes again"
    assert (engine.spec.dtype, engine.spec.head_dtype, engine.spec.log_path) == (
        "float32",
        "float32",
        Path("log"),
    )


@pytest.mark.parametrize("by", [0.01, -0.01, np.nan])
def test_numbers_that_differ_or_are_missing_are_an_error_that_names_the_log(engine, by):
    engine.scores = lambda scores, n: scores + np.float32(by)
    with pytest.raises(
        InstallError, match=r"smoke test of vllm 0\.32\.0: got sampling and scoring differ"
    ) as error:
        smoke.smoke_test(ENVIRONMENT, Path("its.log"))
    assert error.value.hint == "the log is its.log"
    assert engine.ended == 1


def test_rows_that_are_mixed_up_are_found(engine):
    score = engine._score
    engine._score = lambda sequences, t: [row[-20:] for row in reversed(score(sequences, t))]
    with pytest.raises(InstallError):
        smoke.smoke_test(ENVIRONMENT, Path("log"))


def test_an_engine_that_fails_is_ended_and_says_why_itself(engine):
    def fails(prompts, params):
        raise EngineError("engine", got="no kernel", expected="", hint="")

    engine._sample = fails
    with pytest.raises(EngineError, match="no kernel"):
        smoke.smoke_test(ENVIRONMENT, Path("log"))
    assert engine.ended == 1


def test_what_has_an_adapter_can_be_driven():
    assert all(smoke.drives(SimpleNamespace(name=name, generation=g)) for name, g in registry.ADAPTERS)
    assert not smoke.drives(SimpleNamespace(name="vllm", generation="V9"))
