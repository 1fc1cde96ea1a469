"""The commands as a user types them, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from transformers import LlamaConfig

from lockstep.records.verdicts import BeforeStep
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import open_run, read_steps
from lockstep.runs.rollouts import read_table
from tests.canaries import CANARIES, environment, found_in
from tests.e2e.conftest import QUICKSTART, tiny_checkpoint

LOCKSTEP = [sys.executable, "-m", "lockstep.cli.main"]
FEW = [
    "parity.probe_prompts=4",
    "parity.probe_tokens=8",
    "parity.draw_tokens=256",
    "parity.draws_see=1",
    "training.prompts_per_step=4",
    "training.group_size=4",
    "engine.max_model_len=256",
]
"""What is shown here is the command; what the ladder finds is shown in test_ladder.py."""
SETS = [flag for override in FEW for flag in ("--set", override)]
STEPS = 6
DEATH_LIMIT_S = 10.0
REWARD = """
def reward(text, item):
    return len(text) % 3 / 2
"""
"""Differs within a group, so that a model with random weights is trained too."""


def lockstep(*args, timeout=420, **kwargs):
    return subprocess.run(
        [*LOCKSTEP, *map(str, args)], capture_output=True, text=True, timeout=timeout, **kwargs
    )


@pytest.fixture(scope="module")
def small_model(installed, tmp_path_factory):
    """Two layers: a command's way is the same, and real weights are judged in test_ladder.py."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    return tiny_checkpoint(config, installed[1], tmp_path_factory.mktemp("small") / "model")


def test_raw_logprobs_at_another_temperature_fail_semantics(small_model):
    done = lockstep(
        "check",
        QUICKSTART,
        *SETS,
        "--set",
        f"model.path={small_model}",
        "--set",
        "engine.options.logprobs_mode=raw_logprobs",
        "--set",
        "sampling.temperature=0.7",
        "--json",
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "lockstep.check/1"
    first = report["layers"][0]
    assert (first["layer"], first["verdict"]) == ("semantics", "FAIL")
    found = first["findings"][0]
    assert found["cause"] == "raw_logprobs"
    assert 0.05 < found["effect_nats"] < 2.0
    assert "processed_logprobs" in found["fix"]
    assert [layer["verdict"] for layer in report["layers"][1:]] == ["NOT_RUN"] * 4


@pytest.fixture(scope="module")
def small_run(small_model, tmp_path_factory):
    """Flags of a training run whose every step moves the weights, and the environment with its reward.

    A secret is in each variable that is named like one.
    """
    root = tmp_path_factory.mktemp("reward")
    (root / "varied.py").write_text(REWARD)
    overrides = [
        f"model.path={small_model}",
        "task.reward=varied:reward",
        "optimizer.lr=1e-3",
        f"training.steps={STEPS}",
        "training.checkpoint_every=2",
    ]
    return [flag for override in overrides for flag in ("--set", override)], environment(PYTHONPATH=str(root))


def start_training(run, small_run):
    flags, env = small_run
    command = [str(part) for part in (*LOCKSTEP, "train", QUICKSTART, *SETS, *flags, "--out", run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_step(process, layout, step):
    deadline = time.monotonic() + 400
    while len(read_steps(layout.metrics)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def engine_processes(pid):
    return [p for p in psutil.Process(pid).children(recursive=True) if p.is_running()]


@dataclass
class Interrupted:
    """What is left of a run whose engine was killed, and of its resumption."""

    layout: RunLayout
    code: int
    out: str
    errors: str
    spent_s: float
    alive: list[psutil.Process]
    environments: list[dict[str, str]]
    resumed: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def interrupted(small_run, tmp_path_factory):
    """A run whose engine was killed after its third step, and then resumed to its end."""
    layout = RunLayout(tmp_path_factory.mktemp("runs") / "run")
    process = start_training(layout.root, small_run)
    wait_for_step(process, layout, 3)
    family = engine_processes(process.pid)
    environments = [child.environ() for child in family]
    worker = next(p for p in family if "VLLM::EngineCore" in " ".join(p.cmdline()) + p.name())
    os.kill(worker.pid, signal.SIGKILL)
    killed = time.monotonic()
    out, errors = process.communicate(timeout=60)
    spent = time.monotonic() - killed
    _, alive = psutil.wait_procs(family, timeout=5)
    resumed = lockstep("train", "--resume", layout.root, "--json", env=small_run[1])
    return Interrupted(layout, process.returncode, out, errors, spent, alive, environments, resumed)


def test_a_killed_engine_ends_the_run_at_once_with_its_log_and_no_orphan(interrupted):
    assert interrupted.code == 3
    assert interrupted.spent_s < DEATH_LIMIT_S
    assert "engine" in interrupted.errors
    assert "--resume" in interrupted.errors or "log" in interrupted.errors
    assert interrupted.alive == []
    assert interrupted.layout.engine_log.stat().st_size > 0


def test_the_run_holds_no_secret_and_neither_do_its_engines(interrupted):
    root = interrupted.layout.root
    resumed = interrupted.resumed
    engines = [env for env in interrupted.environments if "VLLM_CPU_KVCACHE_SPACE" in env]
    assert engines
    held = [name for env in engines for name, value in env.items() if value in CANARIES.values()]
    assert held == []
    written = {path.name for path in root.rglob("*")}
    assert {"manifest.json", "certificate.json", "verdicts.jsonl", "engine.log"} <= written
    assert "env.VLLM_CPU_KVCACHE_SPACE" in (root / "manifest.json").read_text()
    assert found_in(root, interrupted.out, interrupted.errors, resumed.stdout, resumed.stderr) == {}


def test_the_resumed_run_loses_nothing_and_trains_nothing_twice(interrupted):
    layout = interrupted.layout
    resumed = interrupted.resumed
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert summary["steps"] == STEPS
    run = open_run(layout.root)
    assert [record.step for record in run.steps] == list(range(STEPS))
    assert all(record.weight_version == record.step + 1 for record in run.steps)
    for step in range(STEPS):
        rollouts = read_table(layout.rollouts(step))[0].to_pylist()
        assert len(rollouts) == 16
        assert {row["weight_version"] for row in rollouts} == {step}
    state = json.loads((layout.checkpoints / f"step-{STEPS:06}" / "trainer" / "state.json").read_text())
    assert state["step"] == STEPS
    when = [record.when for record in run.verdicts]
    assert when.count(BeforeStep(0)) == 5
    assert any(isinstance(w, BeforeStep) and w.step > 0 for w in when), "parity is proven again on resume"
    assert "replayed" in resumed.stderr
    assert (run.steps.column("grad_norm") > 0.0).all(), (
        "each step moved the weights: a replayed loss can differ"
    )


def shared_memory_of(processes) -> set[Path]:
    """What these processes hold open in shared memory: directories, files and segments, by their paths."""
    open_now = set()
    for process in processes:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    open_now.add(descriptor.readlink())
    return {path for path in open_now if path.is_relative_to("/dev/shm") and path.exists()}


def test_a_killed_trainer_leaves_no_engine_behind(small_run, tmp_path):
    layout = RunLayout(tmp_path / "run")
    process = start_training(layout.root, small_run)
    deadline = time.monotonic() + 120
    family = []
    while not any("VLLM::EngineCore" in " ".join(p.cmdline()) + p.name() for p in family):
        assert time.monotonic() < deadline
        time.sleep(0.5)
        family = engine_processes(process.pid)
    shared = shared_memory_of([process, *family])
    assert any(path.name.startswith("lockstep-weights-") for path in shared)
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=DEATH_LIMIT_S)
    assert alive == []
    process.communicate()
    assert {path for path in shared if path.exists()} == set(), "shared memory is given back"


@pytest.mark.parametrize(
    ("args", "needles"),
    [
        (["--set", "training.stepz=3"], ["training.steps", "stepz"]),
        (["--set", "model.path=smollm2-135m-instrukt"], ["smollm2-135m-instruct"]),
        (["--set", "model.path=./nowhere"], ["nowhere"]),
        (["--set", "sampling.temperature=0"], ["positive temperature"]),
        (["--set", "engine.version=0.1.0"], ["lockstep engines install vllm==0.32.0"]),
        (["--set", "task.name=reasoning_gym:no_such_set"], ["no_such_set"]),
        (["--set", "task.reward=no_module:f"], ["no_module"]),
        (["--engine", "vlm"], ["vllm"]),
        (["--plant", "stale_heat"], ["stale_head"]),
    ],
)
def test_bad_input_exits_2_with_one_helpful_sentence(installed, tmp_path, args, needles):
    done = lockstep("train", QUICKSTART, *args, "--out", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for needle in needles:
        assert needle in done.stderr
    assert "hint: " in done.stderr


def test_an_engine_that_is_not_installed_exits_2_with_the_install_line(tmp_path):
    done = lockstep("check", QUICKSTART, env=os.environ | {"LOCKSTEP_CACHE": str(tmp_path)})
    assert done.returncode == 2
    assert "lockstep engines install vllm==0.32.0" in done.stderr


def test_an_unknown_engine_option_is_refused_with_the_nearest(installed):
    done = lockstep("check", QUICKSTART, *SETS, "--set", "engine.options.logprob_mode=raw_logprobs")
    assert done.returncode == 2, done.stderr
    assert "logprobs_mode" in done.stderr


def test_the_transformers_engine_passes_the_same_ladder(small_model):
    flags = [
        "--engine",
        "transformers",
        "--set",
        "sampling.temperature=0.7",
        "--set",
        f"model.path={small_model}",
    ]
    done = lockstep("check", QUICKSTART, *SETS, *flags, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [layer["verdict"] for layer in json.loads(done.stdout)["layers"]] == ["PASS"] * 5
