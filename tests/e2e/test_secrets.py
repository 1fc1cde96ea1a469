"""A run on the real vLLM with a secret in every variable that is named like one."""

import contextlib
import subprocess
import sys

import psutil
from transformers import LlamaConfig

from tests.canaries import CANARIES, environment, found_in
from tests.e2e.conftest import QUICKSTART, tiny_checkpoint

FEW = [
    "parity.probe_prompts=4",
    "parity.probe_tokens=8",
    "parity.draw_tokens=128",
    "parity.draws_see=1",
    "training.prompts_per_step=4",
    "training.group_size=4",
    "training.steps=1",
]


def test_a_run_on_vllm_holds_no_secret_and_neither_do_its_processes(installed, tmp_path):
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    model = tiny_checkpoint(config, installed[1], tmp_path / "model")
    sets = [flag for override in (*FEW, f"model.path={model}") for flag in ("--set", override)]
    command = [
        sys.executable,
        "-m",
        "lockstep.cli.main",
        "train",
        QUICKSTART,
        *sets,
        "--out",
        tmp_path / "run",
    ]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    engines: dict[int, dict[str, str]] = {}
    while True:
        try:
            out, err = process.communicate(timeout=2)
            break
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "lockstep.engines.worker.vllm_v1" in child.cmdline():
                        engines[child.pid] = child.environ()
    assert process.returncode == 0, err
    assert engines
    assert not [name for env in engines.values() for name, value in env.items() if value in CANARIES.values()]
    written = {path.name for path in (tmp_path / "run").rglob("*")}
    assert {"manifest.json", "certificate.json", "verdicts.jsonl", "engine.log"} <= written
    assert "env.VLLM_CPU_KVCACHE_SPACE" in (tmp_path / "run" / "manifest.json").read_text()
    assert found_in(tmp_path / "run", out, err) == {}
