"""Lockstep: online RL for language models; every rollout log-probability is proven before it is trained on.

    import lockstep
    lockstep.check("recipe.toml").status                 # "PASS", "FAIL" or "NOT_RUN"
    lockstep.train("recipe.toml", out="runs/first").reward_gain

The names below are imported when they are first asked for: ``import lockstep`` alone imports nothing else.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "Engine": "lockstep.engines.base",
    "Sample": "lockstep.records.samples",
    "Trainer": "lockstep.training.trainer",
    "Verdict": "lockstep.records.verdicts",
    "check": "lockstep.api",
    "train": "lockstep.api",
}
"""The public surface: name → module. Types: ``__init__.pyi``. Frozen by ``tests/golden/public_names.txt``."""

__all__ = ["Engine", "Sample", "Trainer", "Verdict", "__version__", "check", "train"]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
