"""The adapter of vLLM's V1 engine (0.32)."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from lockstep.engines.base import Engine, EngineSpec
from lockstep.engines.environments.locate import Environment
from lockstep.engines.process import WorkerProcess
from lockstep.records.messages import Load, Loaded, Sample, Sampled, Score, Scored
from lockstep.records.tokens import FLOAT32, Completion, SamplingParams
from lockstep.records.versions import LoadReceipt, WeightUpdate

WORKER = "lockstep.engines.worker.vllm_v1"
START_TIMEOUT_S = 600.0

RL_DEFAULTS = {
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
    "async_scheduling": False,
    "enable_prefix_caching": True,
    "seed": 0,
    "skip_tokenizer_init": True,
    "trust_remote_code": False,
}
"""vLLM's own defaults are ``raw_logprobs`` and ``auto``, the latter applying a checkpoint's generation_config.json silently.
The prefix cache stays on: layer 2 proves it, and every load clears it."""

CPU_DEFAULTS = {"enforce_eager": True, "block_size": 32, "max_num_seqs": 128, "enable_chunked_prefill": False}
"""Eager: compiling costs minutes on a CPU. Block 32, not 128: a prefix shorter than one block is never cached. No chunked
prefill: 0.32.0 rewinds a seeded request's generator after a partial prefill, which a CPU generator refuses, and the engine dies
(vllm/v1/worker/gpu_model_runner.py, ``_bookkeeping_sync``)."""
CPU_BATCHED_TOKENS = 2048

FIXES = {
    "raw_logprobs": 'engine.options.logprobs_mode = "processed_logprobs"',
    "truncation_unmodelled": "sampling.top_p = 1.0, sampling.top_k = 0, sampling.min_p = 0.0",
    "penalties_unmodelled": "sampling.repetition_penalty = 1.0, presence_penalty = 0.0, frequency_penalty = 0.0",
    "prefix_cache": "engine.options.enable_prefix_caching = false",
    "stale_prefix_cache": "engine.options.enable_prefix_caching = false",
    "stale_head": "rebuild the head's packed copy after every load: lm_head.quant_method.process_weights_after_loading(lm_head)",
    "head_precision": 'model.head_dtype = "float32" with engine.head_dtype = "float32"',
    "body_precision": "engine.dtype = model.dtype",
    "batch_composition": "engine.options.max_num_seqs = 1 isolates it; then look for the kernel",
}


class VllmV1(Engine):
    """vLLM V1 in a process and an environment of its own."""

    def __init__(self, spec: EngineSpec, environment: Environment) -> None:
        args: dict[str, Any] = RL_DEFAULTS | (CPU_DEFAULTS if environment.flavour == "cpu" else {})
        args |= {"model": str(spec.model_path), "dtype": spec.dtype, "max_model_len": spec.max_model_len}
        if environment.flavour == "cpu":
            args["max_num_batched_tokens"] = max(CPU_BATCHED_TOKENS, spec.max_model_len)
        if spec.head_dtype != spec.dtype:
            args["hf_overrides"] = {"head_dtype": spec.head_dtype}
        args |= spec.options
        config = msgspec.json.encode({"args": args, "weights_dir": str(spec.weights_dir)})
        env = environment.launch_env() | {"HF_HUB_OFFLINE": "1"}
        self._process = WorkerProcess(environment.python, WORKER, config, env, spec.log_path)
        self.ready = self._process.wait_ready(START_TIMEOUT_S)

    def sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """See :meth:`Engine.sample`."""
        reply = self._process.request(Sample, [_packed(prompt) for prompt in prompts], list(params))
        assert isinstance(reply, Sampled)
        return reply.completions

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See :meth:`Engine.score`."""
        reply = self._process.request(Score, [_packed(sequence) for sequence in sequences])
        assert isinstance(reply, Scored)
        return [np.frombuffer(scores.logprobs, FLOAT32) for scores in reply.scores]

    def load(self, update: WeightUpdate, faults: tuple[str, ...] = ()) -> LoadReceipt:
        """See :meth:`Engine.load`."""
        reply = self._process.request(Load, update, faults)
        assert isinstance(reply, Loaded)
        return reply.receipt

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self._process.close()

    def fix(self, cause: str) -> str:
        """See :meth:`Engine.fix`."""
        return FIXES.get(cause, "lockstep check RECIPE names the layer; no flag of this engine is known to mend it")


def _packed(ids: np.ndarray) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()
