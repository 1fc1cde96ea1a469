"""The adapter of vLLM's V0 engine (0.8.5): what the sampler drew from is what it reports, prompts too."""

from typing import Any, ClassVar

from lockstep.engines.vllm.served import VllmEngine, facts_of


class VllmV0(VllmEngine):
    """vLLM V0."""

    worker = "lockstep.engines.worker.vllm_v0"
    facts = facts_of({"enable_prefix_caching": False}, {"raw_logprobs": "none: this engine has no raw mode"})
    # This version's attention on a CPU has blocks of 16 tokens and is eager whatever is asked.
    cpu_defaults: ClassVar[dict[str, Any]] = {
        "enforce_eager": True,
        "block_size": 16,
        "max_num_seqs": 128,
        "enable_chunked_prefill": False,
    }
