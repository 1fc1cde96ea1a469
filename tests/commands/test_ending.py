"""Ctrl-C, SIGTERM and mistakes end a command within seconds, whatever it does, and leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest

from lockstep.cli import main
from lockstep.config.recipe import load_recipe
from lockstep.engines.environments.locate import MARKER, Environment
from lockstep.engines.environments.recipes import recipe_for
from lockstep.errors import EngineDied, EngineError, Stopped
from lockstep.loop import open as opening
from lockstep.loop.in_flight import DRAIN_S
from tests import worker_that_lies
from tests.commands.tiny_run import write_recipe

LOCKSTEP = [sys.executable, "-m", "lockstep.cli.main"]
AT_ONCE_S = 5.0
SHARED = "/dev/shm/lockstep-weights-"


@pytest.fixture
def slow_engine(tmp_path, monkeypatch):
    """An installed vLLM whose start takes ten minutes, as far as anyone can tell."""
    recipe = recipe_for("vllm==0.32.0")
    path = tmp_path / "cache" / "engines" / f"{recipe.name}-{recipe.version}-{recipe.flavour}"
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "python").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "{worker_that_lies.__file__}" "$@"\n'
    )
    (path / "bin" / "python").chmod(0o700)
    environment = Environment(
        name="vllm",
        version=recipe.version,
        generation=recipe.generation,
        flavour=recipe.flavour,
        digest=recipe.digest,
        smoke="",
        size_bytes=0,
        built="",
        path=str(path.resolve()),
    )
    (path / MARKER).write_bytes(msgspec.json.encode(environment))
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LIAR_START_S", "600")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return write_recipe(tmp_path, 100)


@pytest.fixture
def begun():
    """Begin a command; it ends with the test."""
    processes = []

    def begin(*args):
        # Where the tests run in the background of a shell, the interrupt is ignored from the start.
        ready = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        processes.append(subprocess.Popen([*LOCKSTEP, *args], stderr=subprocess.PIPE, text=True, **ready))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def shared_of(pid):
    """The directories of published weights that a process holds open."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            links.append(os.readlink(entry))
    return [Path(link) for link in links if link.startswith(SHARED) and Path(link).is_dir()]


def engines_of(process):
    return [
        child
        for child in psutil.Process(process.pid).children()
        if worker_that_lies.__file__ in child.cmdline()
    ]


def awaited(found, process):
    deadline = time.monotonic() + 120
    while not (value := found()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_ctrl_c_while_the_engine_starts_ends_at_once(slow_engine, begun):
    process = begun("check", slow_engine, "--engine", "vllm")
    (engine,) = awaited(lambda: engines_of(process), process)
    (directory,) = shared_of(process.pid)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=AT_ONCE_S)
    assert time.monotonic() - began < AT_ONCE_S
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not engine.is_running()
    assert not directory.exists()


LONG = [
    "loop.kind=in_flight",
    "training.steps=200",
    "engine.max_model_len=512",
    "sampling.max_tokens=400",
]


def test_ctrl_c_in_flight_saves_and_goes_on_and_a_second_one_ends_at_once(tmp_path, begun):
    run = tmp_path / "run"
    sets = [word for text in LONG for word in ("--set", text)]
    process = begun("train", write_recipe(tmp_path, 100), "--out", run, *sets)

    def steps():
        return (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0

    awaited(lambda: steps() >= 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DRAIN_S + 60)  # what was drawn is scored, and weights are saved
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert steps() >= 2
    before = steps()
    process = begun("train", "--resume", run)
    awaited(lambda: steps() > before, process)
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "ending: what is being drawn" in line:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(AT_ONCE_S) == -signal.SIGINT


def test_a_stop_in_the_midst_of_a_launch_leaves_no_engine_behind(slow_engine, monkeypatch, tmp_path):
    def interrupt(number, frame):
        raise Stopped(128 + number)

    def begun_then_stopped(choice, spec):
        signal.raise_signal(signal.SIGINT)  # its process is there, and only this line knows of it
        return SimpleNamespace(close=lambda: closed.append(choice.name))

    closed = []
    monkeypatch.setattr(opening, "launch", begun_then_stopped)
    handler = signal.signal(signal.SIGINT, interrupt)
    recipe = load_recipe(slow_engine, ["engine.name=vllm", "engine.version=0.32.0"])
    try:
        for opened in (opening.open_session, opening.open_engine):
            with pytest.raises(Stopped), opened(recipe, tmp_path / "engine.log", print):
                raise AssertionError("it went on")
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGINT, handler)
    assert closed == ["vllm", "vllm"]


def test_a_mistake_found_while_the_engine_starts_ends_at_once(slow_engine, begun):
    began = time.monotonic()
    process = begun("check", slow_engine, "--engine", "vllm", "--set", "engine.max_model_len=9")
    (engine,) = awaited(lambda: engines_of(process), process)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 60, "ten minutes are what the engine would take"
    assert process.returncode == 2
    assert "engine.max_model_len" in errors
    assert not engine.is_running()


def test_sigterm_with_an_engine_in_the_process_leaves_no_shared_memory(slow_engine, begun, tmp_path):
    process = begun("train", slow_engine, "--out", tmp_path / "run", "--set", "training.steps=1000")
    directory = awaited(lambda: [d for d in shared_of(process.pid) if any(d.iterdir())], process)[0]
    awaited(lambda: (tmp_path / "run" / "verdicts.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=AT_ONCE_S)
    assert process.returncode == 143
    assert "ended by a signal" in errors
    assert "Traceback" not in errors
    assert not directory.exists()


def test_what_calls_sys_exit_under_a_verb_ends_it_with_no_success(monkeypatch, capsys):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(main, "app", lambda **_: sys.exit(0))
    try:
        with pytest.raises(SystemExit) as ended:
            main.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == 3
    assert "something called sys.exit(0)" in capsys.readouterr().err


def test_a_stop_during_a_load_does_not_wait_for_the_load():
    from lockstep.weights.sync import push

    class Stuck:
        def __init__(self):
            self.closed = threading.Event()
            self.close = self.closed.set

        def load(self, *_):
            assert self.closed.wait(60)
            raise EngineDied("engine", got="its end", expected="a running engine", hint="none")

    trainer = SimpleNamespace(publish=lambda version: version, settle=lambda: None)
    began = time.monotonic()
    with pytest.raises(Stopped), push(trainer, Stuck(), 1):
        raise Stopped(130)
    assert time.monotonic() - began < AT_ONCE_S


def test_a_broadcast_that_no_receiver_takes_is_named(monkeypatch):
    from lockstep.weights import nccl

    publisher = nccl.NcclPublisher.__new__(nccl.NcclPublisher)
    stuck = threading.Event()
    publisher._sending, publisher._offer = None, None
    monkeypatch.setattr(publisher, "_send", stuck.wait, raising=False)
    monkeypatch.setattr(nccl, "SETTLE_S", 0.1)
    assert publisher.publish(4).version == 4
    with pytest.raises(EngineError, match=r"no end in 0\.1 s, expected every receiver to take the weights"):
        publisher.settle()
    stuck.set()
    publisher.publish(5)
    publisher.settle()
