"""The migration checklist of vLLM: what its versions do by default, and what online RL needs instead.

A knob is here when its default moves numbers or state and differs between versions, or once did (PipelineRL's
way from vLLM 0.8.5 to 0.18.1). ``watch`` is a setting that is right only while something else holds; the
layer of the ladder that proves it is named.
"""

from typing import Any

from lockstep.config.recipe import Recipe
from lockstep.engines.audit import Checklist, Judgement, JudgeOfKnob, Knob


def _is(wanted: Any, why: str) -> JudgeOfKnob:
    return lambda value, recipe: Judgement("ok" if value == wanted else "change", why)


def _watched_when(wanted: Any, why: str) -> JudgeOfKnob:
    return lambda value, recipe: Judgement("watch" if value == wanted else "ok", why)


def _logprobs_mode(value: Any, recipe: Recipe) -> Judgement:
    sampling = recipe.sampling
    if value in ("processed_logprobs", "None"):
        return Judgement("ok", "log-probabilities are of the distribution that tokens are drawn from")
    neutral = sampling.temperature == 1.0 and not sampling.truncates and not sampling.penalises
    why = (
        "raw numbers are of the model at T = 1, whatever the sampler does; "
        "layer semantics measures the difference"
    )
    return Judgement("watch" if neutral and value == "raw_logprobs" else "change", why)


def _dtype(value: Any, recipe: Recipe) -> Judgement:
    wanted = f"torch.{recipe.engine.dtype or recipe.model.dtype}"
    why = "dtype=auto took an fp32 checkpoint for float16 in 0.8.5 and bfloat16 since 0.18"
    return Judgement("ok" if value == wanted else "change", why)


def _head(value: Any, recipe: Recipe) -> Judgement:
    wanted = f"torch.{recipe.engine.head_dtype or recipe.model.head_dtype}"
    why = (
        "the last product rounds the logits; "
        "both sides must agree, and fp32 loses least (measured in the worker, not read off)"
    )
    return Judgement("ok" if value == wanted else "change", why)


def _runner(value: Any, recipe: Recipe) -> Judgement:
    second = ".gpu." in str(value)
    why = "the V2 runner is other code for sampler and log-probabilities; pin it before you compare"
    return Judgement("watch" if second else "ok", why)


def _sampler(value: Any, recipe: Recipe) -> Judgement:
    why = "FlashInfer's sampler hides truncation from V0's log-probabilities, and draws otherwise in V1"
    return Judgement("change" if value else "ok", why)


def _kv_dtype(value: Any, recipe: Recipe) -> Judgement:
    narrow = str(value).startswith(("fp8", "int8"))
    why = "auto is the model's own dtype; a quantised cache is another model"
    return Judgement("change" if narrow else "ok", why)


def _recurrent(value: Any, recipe: Recipe) -> Judgement:
    why = "a hybrid model's state in bf16 drifts with length; others have none"
    return Judgement("ok" if value in ("float32", "auto") else "watch", why)


def _chunked(value: Any, recipe: Recipe) -> Judgement:
    why = (
        "on a CPU 0.32.0 dies of a seeded request whose prefill was chunked; "
        "elsewhere layer path compares decode with prefill"
    )
    return Judgement("watch" if value else "ok", why)


def _batching(value: Any, recipe: Recipe) -> Judgement:
    why = "other requests in a step can round a token otherwise; layer path compares one with many"
    return Judgement("ok", why)


OFF, ON = "off", "on"
KNOBS = (
    Knob(
        "log-probability mode",
        ("worker.logprobs_mode", "measured.logprobs_mode"),
        "logprobs_mode",
        {"0.8.5": "processed (V0 has no other)", "0.18.1": "raw_logprobs", "0.32.0": "raw_logprobs"},
        _logprobs_mode,
        'engine.options.logprobs_mode = "processed_logprobs"',
    ),
    Knob(
        "prefix cache",
        ("cache_config.enable_prefix_caching",),
        "enable_prefix_caching",
        {"0.8.5": OFF, "0.18.1": ON, "0.32.0": "on, hybrid models too"},
        _watched_when(
            True,
            (
                "no weight update clears it by itself; "
                "Lockstep's load does, and layers path and weights prove it"
            ),
        ),
        "engine.options.enable_prefix_caching = false",
    ),
    Knob(
        "async scheduling",
        ("scheduler_config.async_scheduling",),
        "async_scheduling",
        {"0.8.5": "none", "0.18.1": "on (off on a CPU)", "0.32.0": "on (off on a CPU)"},
        _watched_when(True, "requests may be a step ahead of what a pause sees"),
        "engine.options.async_scheduling = false",
    ),
    Knob(
        "chunked prefill",
        ("scheduler_config.enable_chunked_prefill",),
        "enable_chunked_prefill",
        {"0.8.5": "off below 32k tokens", "0.18.1": ON, "0.32.0": ON},
        _chunked,
        "engine.options.enable_chunked_prefill = false",
    ),
    Knob(
        "tokens a step",
        ("scheduler_config.max_num_batched_tokens",),
        "max_num_batched_tokens",
        {
            "0.8.5": "max_model_len, 2048 at least",
            "0.18.1": "4096 on a CPU, 8192 or more on a GPU",
            "0.32.0": "4096 on a CPU, 8192 or more on a GPU",
        },
        _batching,
        "engine.options.max_num_batched_tokens = 2048",
    ),
    Knob(
        "requests a step",
        ("scheduler_config.max_num_seqs",),
        "max_num_seqs",
        {
            "0.8.5": "256",
            "0.18.1": "256 on a CPU, up to 1024 on a GPU",
            "0.32.0": "256 on a CPU, up to 1024 on a GPU",
        },
        _batching,
        "engine.options.max_num_seqs = 128",
    ),
    Knob(
        "cascade attention",
        ("model_config.disable_cascade_attn",),
        "disable_cascade_attn",
        {"0.8.5": "none in V0, on in V1", "0.18.1": OFF, "0.32.0": OFF},
        _is(True, "another kernel for shared prefixes: another rounding for the same tokens"),
        "engine.options.disable_cascade_attn = true",
    ),
    Knob(
        "generation_config",
        ("model_config.generation_config",),
        "generation_config",
        {"0.8.5": "auto", "0.18.1": "auto", "0.32.0": "auto"},
        _is(
            "vllm",
            "auto takes sampling settings from the checkpoint's file wherever a request leaves one out",
        ),
        'engine.options.generation_config = "vllm"',
    ),
    Knob(
        "dtype",
        ("worker.parameter_dtype",),
        "dtype",
        {
            "0.8.5": "auto (fp32 → float16)",
            "0.18.1": "auto (fp32 → bfloat16)",
            "0.32.0": "auto (fp32 → bfloat16)",
        },
        _dtype,
        "engine.dtype = model.dtype",
    ),
    Knob(
        "seed",
        ("model_config.seed",),
        "seed",
        {"0.8.5": "None", "0.18.1": "0", "0.32.0": "0"},
        lambda value, recipe: Judgement(
            "ok" if value is not None else "watch",
            "Lockstep seeds each request; this one is for the rest",
        ),
        "engine.options.seed = 0",
    ),
    Knob(
        "sampler kernel",
        ("worker.flashinfer_sampler",),
        "",
        {
            "0.8.5": "FlashInfer where installed",
            "0.18.1": "PyTorch",
            "0.32.0": "FlashInfer, but not in processed modes",
        },
        _sampler,
        "VLLM_USE_FLASHINFER_SAMPLER=0",
    ),
    Knob(
        "model runner",
        ("worker.model_runner",),
        "",
        {"0.8.5": "V0", "0.18.1": "V1", "0.32.0": "V2 wherever Triton is"},
        _runner,
        "VLLM_USE_V2_MODEL_RUNNER=0",
    ),
    Knob(
        "head precision",
        ("worker.head_dtype",),
        "head_dtype",
        {"0.8.5": "the model's", "0.18.1": "the model's", "0.32.0": "the model's"},
        _head,
        'engine.head_dtype = "float32" with model.head_dtype = "float32"',
    ),
    Knob(
        "KV cache dtype",
        ("cache_config.cache_dtype",),
        "kv_cache_dtype",
        {
            "0.8.5": "auto",
            "0.18.1": "auto (a checkpoint may ask for fp8)",
            "0.32.0": "auto (a checkpoint may ask for fp8)",
        },
        _kv_dtype,
        'engine.options.kv_cache_dtype = "auto"',
    ),
    Knob(
        "recurrent-state dtype",
        ("cache_config.mamba_ssm_cache_dtype",),
        "mamba_ssm_cache_dtype",
        {"0.8.5": "none", "0.18.1": "auto: the model's", "0.32.0": "auto: the model's"},
        _recurrent,
        'engine.options.mamba_ssm_cache_dtype = "float32"',
    ),
)

CHECKLIST = Checklist(versions=("0.8.5", "0.18.1", "0.32.0"), knobs=KNOBS)

SINCE = {"async scheduling": "0.18.1", "recurrent-state dtype": "0.18.1"}
"""Knob → the first version that was seen to have it: 0.8.5 tells its whole configuration, and has neither."""
