"""The last checkpoint of a run, served by the real vLLM as any model is.

Its own loader, no adapter of ours between.
"""

import json
import subprocess

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from lockstep.config.recipe import Optimizer
from lockstep.policy.model import load_policy
from lockstep.records.samples import Group
from lockstep.runs.checkpoints import newest_checkpoint
from lockstep.training.checkpoint import save_checkpoint
from lockstep.training.optimizer import MasterAdamW
from tests.e2e.conftest import tiny_checkpoint

ATOL_NATS = 1e-3
"""fp32 on both sides; what the ladder promises."""
IN_ONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
"""No core of its own, nothing compiled: what is loaded and computed is the same, 40 s sooner on one core."""
SERVE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, ids = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(
        model=model, dtype="float32", enforce_eager=True,
        max_model_len=128, max_num_seqs=2, max_num_batched_tokens=256,
    )
    (found,) = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0))
    scored = [entry[token].logprob for token, entry in zip(ids[1:], found.prompt_logprobs[1:])]
    said = llm.get_tokenizer().decode(ids)
    print("SCORED " + json.dumps({"logprobs": scored, "text": said}))
"""


@pytest.mark.engine
def test_vllm_serves_the_last_checkpoint(installed, tmp_path):
    environment, smollm = installed
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    source = tiny_checkpoint(config, smollm, tmp_path / "source")
    policy = load_policy(source, "float32", "float32")
    optimizer = MasterAdamW(policy.model, Optimizer(lr=1e-2))
    ids = np.arange(400, 424, dtype=np.int32)
    untrained = policy.score([Group(ids[:1], [ids[1:]])], 1.0)[0]
    for step in range(2):
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step(step)
        save_checkpoint(tmp_path / "checkpoints", step + 1, policy, optimizer, source)
    expected = policy.score([Group(ids[:1], [ids[1:]])], 1.0)[0]
    assert np.abs(expected - untrained).max() > 100 * ATOL_NATS, "another checkpoint would show"

    (tmp_path / "serve.py").write_text(SERVE)
    command = [
        environment.python,
        tmp_path / "serve.py",
        newest_checkpoint(tmp_path / "checkpoints"),
        json.dumps(ids.tolist()),
    ]
    done = subprocess.run(
        command,
        env=environment.launch_env() | IN_ONE,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("SCORED "))[len("SCORED ") :]
    )
    np.testing.assert_allclose(found["logprobs"], expected, rtol=0, atol=ATOL_NATS)
    assert found["text"].strip(), "its tokenizer came along"
