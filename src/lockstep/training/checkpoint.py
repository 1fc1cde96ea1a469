"""Checkpoints: whole or absent. Each is also a Hugging Face directory that any tool can load.

    .partial-step-000012/ ─ write, digest, fsync ─► step-000012.older ◄─ a step-000012 that is there
                                                    ─► rename ─► fsync ─► older ones go

At each moment one whole checkpoint lies under a name that ``runs/checkpoints.py`` finds, on the disk; what
lies in it is told there.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lockstep.errors import RunError
from lockstep.policy.model import Policy
from lockstep.policy.parameters import assign, checkpoint_weights, named_weights
from lockstep.records.alarms import Override
from lockstep.runs.checkpoints import (
    MODEL,
    OLDER,
    OPTIMIZER,
    STATE,
    Checkpoint,
    is_whole,
    keep_newest,
    not_whole,
    remove,
    seal,
)
from lockstep.runs.durable import (
    PARTIAL,
    PRIVATE_FILE,
    flush_directory,
    flush_file,
    make_directory,
    rename,
    writing,
)
from lockstep.training.optimizer import MasterAdamW

WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".npz",
    ".pkl",
    ".pickle",
}
"""Files of a source checkpoint that hold its weights, or another program's state. All others belong to the
model as much as to its next version: tokenizer, templates, code, licence."""


def save_checkpoint(
    directory: Path,
    step: int,
    policy: Policy,
    optimizer: MasterAdamW,
    model_path: Path,
    also: Callable[[Path], None] = lambda partial: None,
    override: Override | None = None,
) -> Path:
    """Write ``directory/step-000012`` and then remove older ones. Returns its path.

    Args:
        also: writes what else belongs to it, before it has its name.
        override: of a run that trained although the ladder did not pass.

    Raises:
        RunError: when it cannot be written; those that were there before are still there.
    """
    target = directory / f"step-{step:06d}"
    partial = directory / f"{PARTIAL}{target.name}"
    with writing(target):
        try:
            remove(partial)
            make_directory(partial / "trainer")
            _copy_companions(model_path, partial, policy.model.dtype)
            with writing(target / MODEL):
                _save_tensors(_own(checkpoint_weights(policy.model)), partial / MODEL)
            with writing(target / OPTIMIZER):
                _save_tensors(optimizer.state(), partial / OPTIMIZER)
            with writing(target / STATE):
                also(partial)
                seal(partial, step, override)
            _flush_tree(partial)
            _put_in_place(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        keep_newest(directory)
    return target


def load_checkpoint(checkpoint: Checkpoint, policy: Policy, optimizer: MasterAdamW) -> int:
    """Put a checkpoint's weights and optimizer state in place. Returns how many steps are in it.

    Raises:
        RunError: when its tensors are not this model's; model and optimizer are then as they were.
    """
    path = checkpoint.path
    stored, state = _load_tensors(path, MODEL), _load_tensors(path, OPTIMIZER)
    weights, as_stored = named_weights(policy.model), checkpoint_weights(policy.model)
    _refuse_other(path, MODEL, stored, as_stored)
    _refuse_other(path, OPTIMIZER, state, _expected_state(optimizer, state))
    # transformers keeps some in another form.
    if any(as_stored.get(name) is not tensor for name, tensor in weights.items()):
        stored = named_weights(type(policy.model).from_pretrained(path, dtype=policy.model.dtype))
    assign(weights, {name: stored[name] for name in weights})
    optimizer.restore(state)
    return checkpoint.step


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without gradients, and each in memory of its own, as the format demands."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        found[name] = (
            tensor.detach().clone() if storage in seen or not tensor.is_contiguous() else tensor.detach()
        )
        seen.add(storage)
    return found


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError, which safetensors tells as its own error."""
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # as Rust ends the text of a system's error
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error


def _copy_companions(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Every file of the source checkpoint that holds no weights; ``config.json`` says the stored dtype."""
    for path in (*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")):
        # An index names shards, and here all weights are one file.
        weights = path.suffix.lower() in WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and not path.name.startswith(".") and path.name != "config.json":
            copy = target / path.relative_to(source)
            make_directory(copy.parent)
            shutil.copyfile(path, copy)
    config: dict[str, Any] = json.decode((source / "config.json").read_bytes())
    # As older versions of transformers call it, and most checkpoints of the hub.
    for key in {"dtype", *({"torch_dtype"} & config.keys())}:
        config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_bytes(json.format(json.encode(config), indent=2))


def _flush_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(PRIVATE_FILE)
            flush_file(path)
        else:
            flush_directory(path)
    flush_directory(directory)


def _put_in_place(partial: Path, target: Path) -> None:
    """The target, if it is there, keeps a name under which it is found until the new one is on the disk."""
    older = target.with_name(target.name + OLDER)
    if is_whole(target):
        remove(older)
        rename(target, older)
    else:
        remove(target)
    rename(partial, target)


def _load_tensors(path: Path, part: str) -> dict[str, Tensor]:
    try:
        # Copied: what is loaded maps the file, and the optimizer would go on in it after the checkpoint is
        # gone.
        return {name: tensor.clone() for name, tensor in load_file(path / part).items()}
    except (OSError, SafetensorError) as error:
        raise not_whole(path, part, str(error) or type(error).__name__) from error


def _expected_state(optimizer: MasterAdamW, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer would store, had it made the steps that ``state`` is of."""
    expected = {}
    for name, master, parameter in zip(optimizer.names, optimizer.masters, optimizer.parameters, strict=True):
        if optimizer.keeps(name, master, parameter):
            expected[f"master.{name}"] = master
        if f"exp_avg.{name}" in state:  # a parameter that no step has touched has no moments
            expected |= {
                f"exp_avg.{name}": master,
                f"exp_avg_sq.{name}": master,
                f"step.{name}": torch.tensor(0.0),
            }
    return expected


def _refuse_other(
    path: Path, part: str, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    form = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()}
    odd = sorted(name for name in form.keys() | wanted.keys() if form.get(name) != wanted.get(name))
    if odd:
        name = odd[0]
        raise RunError(
            f"checkpoint {path}, {part}",
            got=(
                f"{name} {form.get(name, 'missing')}"
                f"{f', and {len(odd) - 1} more that differ' if len(odd) > 1 else ''}"
            ),
            expected=f"{wanted.get(name, 'no such tensor')}, as this model has it",
            hint="same model.path and model.dtype?",
        )
