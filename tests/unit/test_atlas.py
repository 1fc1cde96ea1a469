"""``lockstep atlas`` without engines: a file a version, resumed, and what stopped told in every cell."""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep.config.recipe import parse_recipe
from lockstep.diagnose import atlas as module
from lockstep.diagnose.atlas import atlas, read_column
from lockstep.diagnose.battery import QUESTIONS, Cell, _fits
from lockstep.errors import EngineError

RECIPE = parse_recipe(
    {
        "model": {"path": "m"},
        "task": {"name": "t"},
        "sampling": {"max_tokens": 4},
        "training": {"steps": 1},
    },
    "test",
)


class Machine:
    """Environments and engines that have the answers; notes what was done."""

    def __init__(self, monkeypatch, there=(), broken=()):
        self.done = []
        self.there = set(there)
        self.broken = set(broken)
        names = ("install", "remove", "open_session", "as_it_comes", "as_it_is", "as_it_is_set")
        for name in names:
            monkeypatch.setattr(module, name, getattr(self, name))
        monkeypatch.setattr(module, "_is_installed", lambda spec: spec in self.there)

    def install(self, spec, say):
        self.done.append(f"install {spec}")
        return SimpleNamespace(smoke="packages")

    def remove(self, spec, say):
        self.done.append(f"remove {spec}")

    def as_it_comes(self, recipe, version):
        return SimpleNamespace(version=version)

    @contextlib.contextmanager
    def open_session(self, recipe, log, say, plants=None):
        version = recipe.version if plants else recipe.engine.version
        if version in self.broken:
            raise EngineError("engine", got="it died", expected="a sample", hint="look")
        yield SimpleNamespace(pair=version)

    def as_it_is(self, pair):
        cells = [Cell(question=name, status="PASS", says="so") for name in QUESTIONS if name != "ladder"]
        side = SimpleNamespace(engine=f"vllm {pair} (V1)", tokens_per_s=9.0, load_s=math.nan)
        return cells[::-1], side

    def as_it_is_set(self, pair):
        return Cell(question="ladder", status="FAIL", says="raw", effect_nats=0.3, unit="mean |gap|")


def columns(tmp_path, versions, *, keep=False):
    return list(atlas(RECIPE, versions, tmp_path, lambda text: None, keep=keep))


def test_every_version_has_every_answer_and_what_was_not_there_is_removed(tmp_path, monkeypatch):
    machine = Machine(monkeypatch, there=["vllm==0.18.1"])
    found = columns(tmp_path, ["0.18.1", "0.9.2"])
    assert [column.version for column in found] == ["vllm==0.9.2", "vllm==0.18.1"]
    assert [cell.question for cell in found[0].cells] == list(QUESTIONS)
    assert machine.done == ["install vllm==0.9.2", "remove vllm==0.9.2", "install vllm==0.18.1"]
    assert read_column(tmp_path / "vllm-0.9.2.json").cells[-1] == found[0].cells[-1]


def test_a_version_whose_file_is_there_is_not_run_again(tmp_path, monkeypatch):
    machine = Machine(monkeypatch)
    first = columns(tmp_path, ["0.9.2"], keep=True)
    again = columns(tmp_path, ["0.9.2", "0.10.2"], keep=True)
    assert machine.done == ["install vllm==0.9.2", "install vllm==0.10.2"]
    assert again[0].measured == first[0].measured
    assert math.isnan(again[0].load_s), "a figure that is none is read back as none"


def test_one_that_cannot_run_says_why_in_every_cell_and_the_next_is_run(tmp_path, monkeypatch):
    Machine(monkeypatch, broken=["0.9.2"])
    broken, whole = columns(tmp_path, ["0.9.2", "0.10.2"])
    assert broken.stopped == "engine: it died"
    assert {cell.status for cell in broken.cells} == {"NOT_RUN"}
    assert len(broken.cells) == len(QUESTIONS)
    assert whole.stopped == ""


@pytest.mark.parametrize(
    ("engine", "fits"), [([-0.7, -1.4], "tempered"), ([-1.0, -2.0], "raw"), ([-0.1, -9.0], "neither")]
)
def test_numbers_are_named_by_what_they_fit(engine, fits):
    tempered = np.array([-0.7, -1.4])
    raw = np.array([-1.0, -2.0])
    assert _fits(np.array(engine), tempered, raw).partition(" ")[0] == fits
