"""Secrets that must be found nowhere."""

import os
from pathlib import Path

NAMES = (
    "VLLM_API_KEY",
    "VLLM_USAGE_STATS_TOKEN",
    "VLLM_DB_PASSWORD",
    "LOCKSTEP_API_KEY",
    "LOCKSTEP_SIGNING_KEY",
    "LOCKSTEP_TOKEN",
    "OMP_TOOL_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "WANDB_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "GITHUB_TOKEN",
)
CANARIES = {name: f"canary-of-{name.lower()}-7f3a9c" for name in NAMES}


def environment(**more: str) -> dict[str, str]:
    """This process's environment with a secret in every one of them."""
    return os.environ | CANARIES | more


def found_in(*places: Path | str) -> dict[str, list[str]]:
    """Where a secret was found: in a text, or in the name or the bytes of a file below a directory."""
    found: dict[str, list[str]] = {}
    for place in places:
        files = [path for path in place.rglob("*") if path.is_file()] if isinstance(place, Path) else []
        texts = [(str(path), str(path).encode() + path.read_bytes()) for path in files]
        texts += [(place[:40], place.encode())] if isinstance(place, str) else []
        for where, text in texts:
            for name, secret in CANARIES.items():
                if secret.encode() in text:
                    found.setdefault(name, []).append(where)
    return found
