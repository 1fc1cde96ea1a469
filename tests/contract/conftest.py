"""One suite, every engine. Each is started once, and the trainer that they are compared with loaded once."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.conftest import need

from lockstep.engines.base import Engine, EngineSpec
from lockstep.engines.process import private_directory
from lockstep.engines.registry import Choice, start
from lockstep.engines.worker.group import end_group
from lockstep.faults.at_load import LAUNCHER
from lockstep.records.samples import Group
from lockstep.records.tokens import FLOAT32, INT32, Completion
from lockstep.training.trainer import Trainer
from lockstep.weights.directory import weights_directory
from lockstep.weights.publish import WeightPublisher

ENGINES = [
    "vllm==0.8.5",
    "vllm==0.18.1",
    "vllm==0.32.0",
    "transformers",
    "http:vllm==0.18.1",
    "http:vllm==0.32.0",
]
MODEL = "smollm2-135m-instruct"
MAX_MODEL_LEN = 512
API_KEY = "a-key-of-the-contract-suite"


@dataclass(eq=False)
class Side:
    """An engine under test and what it is compared with."""

    name: str
    engine: Engine
    trainer: Trainer
    weights_dir: Path
    pids: list[int]
    """The engine's first process; none where it is this one."""

    def family(self) -> list[psutil.Process]:
        """Every process of the engine, or NOT_RUN where it has none of its own."""
        if not self.pids:
            pytest.skip("NOT_RUN: the engine is no process of its own")
        first = psutil.Process(self.pids[0])
        return [first, *first.children(recursive=True)]

    def scored(self, groups: list[Group], temperature: float = 1.0) -> list[np.ndarray]:
        """Score C of each completion."""
        return self.trainer.score(groups, temperature)


def groups_of(prompts: list[np.ndarray], completions: list[Completion]) -> list[Group]:
    """Each completion behind the prompt that it says it is of."""
    return [Group(prompts[c.prompt_index], [ids_of(c)]) for c in completions]


def ids_of(completion: Completion) -> np.ndarray:
    return np.frombuffer(completion.token_ids, INT32)


def logprobs_of(completions: list[Completion]) -> np.ndarray:
    return np.frombuffer(b"".join(c.logprobs for c in completions), FLOAT32)


def spec_of(weights_dir, log, **changes) -> EngineSpec:
    from lockstep.policy.pretrained import resolve_model

    settings = {
        "model_path": resolve_model(MODEL),
        "dtype": "float32",
        "head_dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "options": {},
        "weights_dir": weights_dir,
        "log_path": log,
        # For the one load that is to leave the head stale; every other is the worker's own.
        "launcher": LAUNCHER,
    }
    return EngineSpec(**(settings | changes))


def choice_of(name: str) -> Choice:
    """The engine of that name. What is installed must run."""
    from lockstep.engines.environments.locate import find

    if name == "transformers":
        return Choice("transformers", None, "contract suite")
    return Choice("vllm", need(find, "vllm", name.partition("==")[2]), "contract suite")


@dataclass(eq=False)
class Server:
    """``vllm serve``, as a user starts it."""

    process: subprocess.Popen
    url: str


SERVER_FLAGS = {
    "0.18.1": [],  # raw log-probabilities, as this version serves them by default
    "0.32.0": ["--logprobs-mode", "processed_logprobs"],
}
EAGER = {"TORCHDYNAMO_DISABLE": "1"}  # as ours: --enforce-eager leaves the sampler's own compiling on
SERVER_ENV = {"0.18.1": EAGER, "0.32.0": EAGER | {"VLLM_SERVER_DEV_MODE": "1"}}


@contextlib.contextmanager
def served(environment, log) -> Iterator[Server]:
    """A vLLM server of that environment on the loopback, with an API key; ended on the way out."""
    from lockstep.engines.vllm.older_form import older_form
    from lockstep.policy.pretrained import resolve_model

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = older_form(resolve_model(MODEL), log.parent)
    flags = "--host 127.0.0.1 --dtype float32 --generation-config vllm --enforce-eager --block-size 32"
    flags += (
        " --no-enable-chunked-prefill --max-num-batched-tokens 2048"
        f" --max-model-len {MAX_MODEL_LEN} --port {port}"
        # As ours: a worker in a process of its own would import vLLM a third time.
        " --distributed-executor-backend vllm.v1.executor.uniproc_executor.UniProcExecutor"
    )
    command = [
        environment.python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        *flags.split(),
    ]
    scratch = private_directory()  # what it writes as temporary files goes with it
    variables = dict.fromkeys(("TMPDIR", "VLLM_RPC_BASE_PATH"), str(scratch)) | {"VLLM_API_KEY": API_KEY}
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*command, *SERVER_FLAGS[environment.version]],
            env=environment.launch_env() | variables | SERVER_ENV[environment.version],
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        _wait_for(process, port, log)
        yield Server(process, f"http://127.0.0.1:{port}")
    finally:
        end_group(process.pid)
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _wait_for(process, port, log):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.3)
    raise AssertionError(f"no server in 180 s: {log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def trainer():
    """The trainer's model in fp32, in published memory."""
    from lockstep.policy.model import load_policy
    from lockstep.policy.pretrained import resolve_model

    path = need(resolve_model, MODEL)
    policy = load_policy(path, "float32", "float32")
    directory = weights_directory()
    yield Trainer(policy, None, lambda model: WeightPublisher(model, directory)), directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session", params=ENGINES)
def side(request, trainer, tmp_path_factory) -> Iterator[Side]:
    """One engine, running, with the trainer's weights."""
    os.environ["LOCKSTEP_API_KEY"] = API_KEY
    name = request.param
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    choice = choice_of(name.removeprefix("http:"))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(choice.environment, log)) if name.startswith("http:") else None
        asked = {"options": {"base_url": server.url}} if server else {}
        engine = start(
            Choice("openai", None, "over HTTP") if server else choice, spec_of(trainer[1], log, **asked)
        )
        stack.callback(engine.close)
        pids = [server.process.pid] if server else list(engine.ready.pids[:1])
        yield Side(name, engine, *trainer, pids)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Says beside the outcome which check of which engine it is of.

    A report crosses from pytest-xdist's workers.
    """
    report = (yield).get_result()
    callspec = getattr(item, "callspec", None)
    if callspec is None or "side" not in callspec.params:
        return
    rest = item.name.split("[")[1].rstrip("]").replace(callspec.params["side"], "").strip("-")
    check = item.originalname.removeprefix("test_").replace("_", " ") + (f", {rest}" if rest else "")
    report.user_properties = [*item.user_properties, ("contract", (check, callspec.params["side"]))]


def pytest_terminal_summary(terminalreporter):
    """The contract as a table: a row for each check, a column for each engine."""
    results = {}
    for outcome, shown in (("passed", "PASS"), ("skipped", "NOT_RUN"), ("failed", "FAIL"), ("error", "FAIL")):
        for report in terminalreporter.stats.get(outcome, ()):
            said = dict(getattr(report, "user_properties", ()))
            if "contract" in said:
                results[tuple(said["contract"])] = f"{shown} {said.get('note', '')}".strip()
    if results:
        terminalreporter.section("engine contract")
        order = list(dict.fromkeys(check for check, _ in results))
        width = max(map(len, order)) + 2
        terminalreporter.write_line(" " * width + "  ".join(f"{name:<17}" for name in ENGINES))
        for check in order:
            row = "  ".join(f"{results.get((check, name), '-'):<17}" for name in ENGINES)
            terminalreporter.write_line(f"{check:<{width}}{row}")
