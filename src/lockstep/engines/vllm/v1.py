"""The adapter of vLLM's V1 engine (0.18 and 0.32)."""

from typing import Any, ClassVar

from lockstep.engines.base import PathFactor
from lockstep.engines.vllm.served import VllmEngine, facts_of
from lockstep.records.messages import Ready

PROCESSED = 'engine.options.logprobs_mode = "processed_logprobs"'
FIXES = {
    "raw_logprobs": PROCESSED,
    "logits_reported": PROCESSED,
    "stale_head": (
        "rebuild the head's packed copy after a load: "
        "lm_head.quant_method.process_weights_after_loading(lm_head)"
    ),
}

# vLLM's own default is raw_logprobs. Its prefix cache stays on: layer 2 proves it, and every load clears it.
# Scheduled ahead, requests may be a step further than a pause sees.
DEFAULTS = {"logprobs_mode": "processed_logprobs", "async_scheduling": False}

BLOCK = 32
"""Tokens of a small cache block, after which a request needs another; CPU attention wants multiples of 32."""
SPARE_BLOCKS = 4
"""Beyond what one request of that length needs: fewer and the engine refuses to start."""


def _starved(ready: Ready, longest: int) -> dict[str, Any]:
    """A cache of small blocks, little larger than the longest prompt: decoding requests run out of it."""
    longest = min(int(ready.resolved["model_config.max_model_len"]), longest + BLOCK)
    blocks = -(-longest // BLOCK) + SPARE_BLOCKS
    return {
        "num_gpu_blocks_override": blocks,
        "block_size": BLOCK,
        "max_model_len": longest,
        "disable_log_stats": False,
    }


FACTORS = (
    # 64 tokens a step: the longer probes are prefilled in two or three portions beside the others' decodes.
    PathFactor(
        "chunked_prefill",
        lambda *_: {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 16},
    ),
    PathFactor("async_scheduling", lambda *_: {"async_scheduling": True}),
    PathFactor("preemption", _starved, tokens=BLOCK, counter="num_preemptions"),
)


class VllmV1(VllmEngine):
    """vLLM V1."""

    worker = "lockstep.engines.worker.vllm_v1"
    facts = facts_of(DEFAULTS, FIXES, FACTORS)

    # Eager: compiling costs minutes on a CPU. Block 32, not 128: a prefix shorter than one block is never
    # cached. No chunked prefill: 0.32.0 rewinds a seeded request's generator after a partial prefill, which a
    # CPU generator refuses, and the engine dies (vllm/v1/worker/gpu_model_runner.py, ``_bookkeeping_sync``).
    # The core runs the model itself, as before 0.32, where the CPU platform turns "uni" into a second process
    # (vllm/platforms/cpu.py): a third of the start, and a hop at every step.
    cpu_defaults: ClassVar[dict[str, Any]] = {
        "enforce_eager": True,
        "block_size": 32,
        "max_num_seqs": 128,
        "enable_chunked_prefill": False,
        "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
    }
