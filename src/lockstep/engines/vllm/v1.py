"""The adapter of vLLM's V1 engine (0.18 and 0.32)."""

from typing import Any, ClassVar

from lockstep.engines.vllm.served import RL_DEFAULTS, VllmEngine

PROCESSED = 'engine.options.logprobs_mode = "processed_logprobs"'


class VllmV1(VllmEngine):
    """vLLM V1."""

    worker = "lockstep.engines.worker.vllm_v1"

    # vLLM's own default is raw_logprobs. Its prefix cache stays on: layer 2 proves it, and every load clears it.
    defaults: ClassVar[dict[str, Any]] = RL_DEFAULTS | {"logprobs_mode": "processed_logprobs", "async_scheduling": False}

    # Eager: compiling costs minutes on a CPU. Block 32, not 128: a prefix shorter than one block is never cached. No chunked
    # prefill: 0.32.0 rewinds a seeded request's generator after a partial prefill, which a CPU generator refuses, and the engine
    # dies (vllm/v1/worker/gpu_model_runner.py, ``_bookkeeping_sync``). The core runs the model itself, as before 0.32, where the
    # CPU platform turns "uni" into a second process (vllm/platforms/cpu.py): a third of the start, and a hop at every step.
    cpu_defaults: ClassVar[dict[str, Any]] = {
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": 128,
        "enable_chunked_prefill": False,
        "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
    }

    fixes: ClassVar[dict[str, str]] = {
        "raw_logprobs": PROCESSED,
        "logits_reported": PROCESSED,
        "stale_head": "rebuild the head's packed copy after a load: lm_head.quant_method.process_weights_after_loading(lm_head)",
    }
