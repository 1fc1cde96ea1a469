"""Faults of a worker's loads: committed when planted, and by that load alone.

Never by a worker that was started without them.
"""

import os
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from lockstep.engines.base import Engine
from lockstep.engines.logged import LoggedEngine
from lockstep.engines.process import WorkerProcess, WorkerProgram
from lockstep.engines.worker.vllm_terms import Config
from lockstep.errors import EngineError
from lockstep.faults.at_load import LAUNCHER, AtLoad, plants
from lockstep.records.messages import Count, Counted, Load, Loaded
from lockstep.records.versions import WeightUpdate
from tests.worker_that_lies import READY

HERE = Path(__file__).parent
OLD, NEW = 1.0, 2.0


class Served(Engine):
    """The trainer's end of ``worker_with_weights.py``."""

    def __init__(self, directory, launcher):
        python = directory / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{HERE}" exec "{sys.executable}" "$@"\n')
        python.chmod(0o700)
        self.weights = directory / "weights"
        self.weights.mkdir()
        config = msgspec.json.encode(Config({}, str(self.weights), "float32"))
        log = directory / "engine.log"
        self.process = WorkerProcess(
            python, WorkerProgram("worker_with_weights", launcher), config, dict(os.environ), log
        )
        self.ready = msgspec.structs.replace(READY, pids=(1,))
        self.asked = {}
        self.said = self.process.wait_ready(60)

    def load(self, update, mode="wait"):
        return self.process.request(Loaded, Load, update, mode, timeout_s=30).receipt

    def _sample(self, prompts, params):
        raise NotImplementedError

    def _score(self, sequences, temperature):
        raise NotImplementedError

    def abort(self):
        raise NotImplementedError

    def close(self):
        self.process.close()

    def counters(self):
        return self.process.request(Counted, Count, timeout_s=30).counters

    def publish(self, version, value):
        path = self.weights / "weights.safetensors"
        tensors = {"body": torch.tensor(value), "weight": torch.tensor(value)}
        save_file(tensors, path, {"lockstep_version": str(version)})
        return WeightUpdate(version, str(path))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Start the worker, with or without what plants: each once."""
    started = {}

    def start(launcher):
        if launcher not in started:
            started[launcher] = Served(tmp_path_factory.mktemp("served"), launcher)
        return started[launcher]

    yield start
    for engine in started.values():
        engine.close()


@pytest.mark.parametrize(
    ("fault", "found", "repacked", "cleared"),
    [
        ("not_delivered", {"body": OLD, "weight": OLD, "packed": OLD}, (), 2),
        ("stale_head", {"body": NEW, "weight": NEW, "packed": OLD}, (), 2),
        ("keep_cache", {"body": NEW, "weight": NEW, "packed": NEW}, ("lm_head",), 0),
    ],
)
def test_a_fault_is_committed_by_the_load_it_is_planted_in_and_by_no_other(
    served, fault, found, repacked, cleared
):
    engine = served(LAUNCHER)
    assert engine.said.resolved["mixed_in"] == "lockstep.faults.in_worker.PlantedWeights"
    before = engine.counters()["cleared"]
    assert engine.load(engine.publish(1, OLD)).repacked == ("lm_head",)
    assert engine.counters() == {"body": OLD, "weight": OLD, "packed": OLD, "cleared": before + 2}
    broken = AtLoad(engine, (fault,))
    receipt = broken.load(engine.publish(2, NEW))
    assert (receipt.version, receipt.n_tensors, receipt.repacked) == (2, 2, repacked)
    assert receipt.cache_cleared is (fault != "keep_cache")
    assert engine.counters() == found | {"cleared": before + 2 + cleared}
    assert engine.load(engine.publish(3, 3.0)).cache_cleared
    assert engine.counters() == {"body": 3.0, "weight": 3.0, "packed": 3.0, "cleared": before + cleared + 4}


def test_a_worker_that_was_started_without_them_commits_none_and_the_load_says_so(served):
    engine = served("")
    assert engine.said.resolved["mixed_in"] == "lockstep.engines.worker.vllm_extension.WeightsExtension"
    with pytest.raises(EngineError, match="a worker that does not commit stale_head"):
        AtLoad(engine, ("stale_head",)).load(engine.publish(1, OLD))
    assert engine.counters()["packed"] == OLD
    assert [path.name for path in engine.weights.iterdir()] == ["weights.safetensors"]


def test_what_is_planted_is_said_by_the_engine_and_nothing_planted_leaves_it_alone():
    engine = LoggedEngine()
    assert plants(()).around(engine) is engine
    assert plants(("stale_head",)).around(engine).altered_by == ("stale_head",)
