"""Checkpoints: whole or absent. Each is also a Hugging Face directory that any tool can load."""

import os
import shutil
from pathlib import Path

import torch
from msgspec import Struct, json
from safetensors.torch import load_file, save_file

from lockstep.errors import RunError
from lockstep.policy.model import Policy
from lockstep.training.optimizer import MasterAdamW
from lockstep.weights.publish import named_weights

COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class CheckpointState(Struct, frozen=True):
    """What is no tensor. ``step`` training steps are inside the weights."""

    step: int


def save_checkpoint(directory: Path, step: int, policy: Policy, optimizer: MasterAdamW, model_path: Path) -> Path:
    """Write ``directory/step-000012`` and then remove older ones. Returns its path."""
    target = directory / f"step-{step:06d}"
    partial = directory / f".partial-{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: v.detach() for k, v in named_weights(policy.model).items()}, partial / "model.safetensors", {"format": "pt"})
    save_file(optimizer.state(), partial / "optimizer.safetensors")
    for name in COMPANIONS:
        if (model_path / name).is_file():
            shutil.copyfile(model_path / name, partial / name)
    (partial / "state.json").write_bytes(json.encode(CheckpointState(step)))
    for path in partial.iterdir():
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for older in directory.glob("step-*"):
        if older != target:
            shutil.rmtree(older)
    return target


def newest_checkpoint(directory: Path) -> Path | None:
    """The last complete checkpoint, or None."""
    return max(directory.glob("step-*"), default=None, key=lambda path: path.name)


def load_checkpoint(path: Path, policy: Policy, optimizer: MasterAdamW) -> int:
    """Put a checkpoint's weights and optimizer state in place. Returns how many steps are in it.

    Raises:
        RunError: when its tensors are not this model's.
    """
    stored = load_file(path / "model.safetensors")
    weights = named_weights(policy.model)
    if stored.keys() != weights.keys():
        odd = sorted(stored.keys() ^ weights.keys())[:3]
        raise RunError(
            f"checkpoint {path}",
            got=f"other tensors ({', '.join(odd)} …)",
            expected="this model's",
            hint="same model.path?",
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(stored[name])
    optimizer.restore(load_file(path / "optimizer.safetensors"))
    return json.decode((path / "state.json").read_bytes(), type=CheckpointState).step


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
