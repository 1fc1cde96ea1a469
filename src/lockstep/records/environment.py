"""Environment variables: which are written down with a run, and which an engine's process is not given."""

import re
from collections.abc import Mapping

WRITTEN = frozenset(
    (
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_VISIBLE_DEVICES",
        "DNNL_DEFAULT_FPMATH_MODE",
        "DNNL_MAX_CPU_ISA",
        "HF_HUB_OFFLINE",
        "KMP_AFFINITY",
        "LOCKSTEP_HEAD_DTYPE",
        "MKL_CBWR",
        "MKL_NUM_THREADS",
        "NCCL_ALGO",
        "NCCL_PROTO",
        "NVIDIA_TF32_OVERRIDE",
        "OMP_NUM_THREADS",
        "OMP_PLACES",
        "OMP_PROC_BIND",
        "OMP_SCHEDULE",
        "ONEDNN_DEFAULT_FPMATH_MODE",
        "ONEDNN_MAX_CPU_ISA",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
        "VLLM_ALLREDUCE_USE_FLASHINFER",
        "VLLM_ALLREDUCE_USE_SYMM_MEM",
        "VLLM_ATTENTION_BACKEND",
        "VLLM_BATCH_INVARIANT",
        "VLLM_COMPUTE_NANS_IN_LOGITS",
        "VLLM_CPU_ATTN_SPLIT_KV",
        "VLLM_CPU_INT4_W4A8",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_MOE_PREPACK",
        "VLLM_CPU_NUM_OF_RESERVED_CPU",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_CPU_SGL_KERNEL",
        "VLLM_DISABLED_KERNELS",
        "VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING",
        "VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_FLASHINFER_ALLREDUCE_BACKEND",
        "VLLM_FLASHINFER_MOE_BACKEND",
        "VLLM_FLASH_ATTN_VERSION",
        "VLLM_FLOAT32_MATMUL_PRECISION",
        "VLLM_KV_CACHE_LAYOUT",
        "VLLM_LOGGING_LEVEL",
        "VLLM_MARLIN_INPUT_DTYPE",
        "VLLM_MARLIN_USE_ATOMIC_ADD",
        "VLLM_MLA_DISABLE",
        "VLLM_MXFP4_USE_MARLIN",
        "VLLM_NO_USAGE_STATS",
        "VLLM_NVFP4_GEMM_BACKEND",
        "VLLM_PLUGINS",
        "VLLM_SSM_CONV_STATE_LAYOUT",
        "VLLM_TARGET_DEVICE",
        "VLLM_TEST_FORCE_FP8_MARLIN",
        "VLLM_USE_AOT_COMPILE",
        "VLLM_USE_DEEP_GEMM",
        "VLLM_USE_DEEP_GEMM_E8M0",
        "VLLM_USE_FLASHINFER_MOE_FP16",
        "VLLM_USE_FLASHINFER_MOE_FP4",
        "VLLM_USE_FLASHINFER_MOE_FP8",
        "VLLM_USE_FLASHINFER_SAMPLER",
        "VLLM_USE_FUSED_MOE_GROUPED_TOPK",
        "VLLM_USE_STANDALONE_COMPILE",
        "VLLM_USE_TRITON_AWQ",
        "VLLM_USE_TRITON_FLASH_ATTN",
        "VLLM_USE_V1",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_WORKER_MULTIPROC_METHOD",
    )
)
"""Environment variables that can move a log-probability or say how an engine was set up. Names, never a pattern: a pattern finds
keys too. No other variable is written down anywhere."""

SECRET = re.compile(r"SECRET|PASSWORD|PASSWD|ACCESS_KEY|(?:KEY|KEYS|TOKEN|CREDENTIALS)$")
"""Names of what an engine's process does without. Here a pattern can only keep too much back, there it would tell too much."""


def resolved_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of the environment that are written down, as an engine reports them."""
    return {f"env.{name}": value[:1000] for name, value in sorted(environ.items()) if name in WRITTEN}


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that asks no hub and no cloud for anything."""
    return {name: value for name, value in environ.items() if name in WRITTEN or not SECRET.search(name.upper())}
