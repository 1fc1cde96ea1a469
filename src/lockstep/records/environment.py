"""Environment variables: which are written down with a run, and which an engine's process is not given."""

import re
from collections.abc import Collection, Mapping

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
        "TORCHDYNAMO_DISABLE",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    )
)
"""Environment variables that can move a log-probability in any engine. Names, never a pattern: a pattern
finds keys too. Beside an engine's own, which its adapter names, no other variable is written down."""

SECRET = re.compile(r"SECRET|PASSWORD|PASSWD|ACCESS_KEY|(?:KEY|KEYS|TOKEN|CREDENTIALS)$")
"""What an engine's process does without. A pattern here can only keep too much back, there tell too much."""


def resolved_env(environ: Mapping[str, str], own: Collection[str] = ()) -> dict[str, str]:
    """Those of the environment that are written down, as an engine reports them.

    Args:
        own: names of the engine's own variables that are written down too.
    """
    written = WRITTEN.union(own)
    return {f"env.{name}": value[:1000] for name, value in sorted(environ.items()) if name in written}


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that asks no hub and no cloud for anything."""
    return {name: value for name, value in environ.items() if not SECRET.search(name.upper())}
