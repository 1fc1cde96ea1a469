"""A checkpoint of transformers 5 in the form that transformers 4 reads.

The tensors are linked; config.json has the keys of both.

Without ``rope_theta`` at the top level the older reader takes 10000 and says nothing; SmolLM2's is 100000.
"""

import json
from pathlib import Path
from typing import Any


def older_form(model_path: Path, out: Path) -> Path:
    """Fill ``out`` with links to ``model_path``'s files, and with configurations with the older keys too."""
    for file in model_path.iterdir():
        if file.name == "config.json":
            (out / file.name).write_text(json.dumps(older_config(json.loads(file.read_text())), indent=1))
        elif file.name == "tokenizer_config.json":
            (out / file.name).write_text(json.dumps(_older_tokenizer(json.loads(file.read_text())), indent=1))
        else:
            (out / file.name).symlink_to(file.resolve())
    return out


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with ``rope_theta``, ``rope_scaling``, ``torch_dtype`` where transformers 4 looks."""
    rope = config.get("rope_parameters") or {}
    older = dict(config)
    if "rope_theta" in rope:
        older.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        older.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    if "dtype" in config:
        older.setdefault("torch_dtype", config["dtype"])
    return older


def _older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 writes the name of a class that 4 does not have."""
    return config | (
        {"tokenizer_class": "PreTrainedTokenizerFast"}
        if config.get("tokenizer_class") == "TokenizersBackend"
        else {}
    )
