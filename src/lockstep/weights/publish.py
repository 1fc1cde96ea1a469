"""Publish weights through shared memory, without a copy.

The trainer's parameters *are* the published file: they are moved once into a memory map of a safetensors file
on a tmpfs (on a disk where that has no room, ``weights/directory.py``), and the optimizer updates them in
place. Publishing a version stamps its number into the file's header; an engine on the same host maps the file
and loads from it while no optimizer step runs. Parameters on another device are copied into the map, and so
are those that a checkpoint holds in another form.

The header has a fixed length, so that stamping rewrites a few bytes::

    8 bytes header length │ {"__metadata__": {"lockstep_version": "000000000012"}, "model…": {…}, …} │ tensors
"""

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lockstep.config.recipe import EngineConfig
from lockstep.policy.parameters import checkpoint_weights, named_weights
from lockstep.records.versions import WeightUpdate
from lockstep.weights.directory import FILE_NAME, reserve

_PAGE = 4096
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


class Publisher(Protocol):
    """The trainer's side of a sync, whatever carries the tensors."""

    directory: Path

    def publish(self, version: int) -> WeightUpdate:
        """Make the present weights available as ``version``.

        They must not change until :meth:`settle` has returned.
        """
        ...

    def settle(self) -> None:
        """Called after every engine's load."""
        ...


class _File:
    """One published file, mapped: its tensors by name, and where its header says the version."""

    def __init__(
        self, directory: Path, name: str, tensors: dict[str, Tensor], say: Callable[[str], None]
    ) -> None:
        header, offsets = _header(tensors, 0)
        size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
        with reserve(directory, size, say, name) as file:
            self._map = mmap.mmap(file.fileno(), size)
        self.path = directory / name
        self._map[: len(header)] = header
        # The metadata come first, so no tensor's name can be taken for the version.
        self._stamp_at = header.index(b"000000000000")
        self.tensors = {
            name: torch.frombuffer(
                self._map, dtype=tensor.dtype, count=tensor.numel(), offset=len(header) + offsets[name]
            ).view(tensor.shape)
            for name, tensor in tensors.items()
        }

    def stamp(self, version: int) -> WeightUpdate:
        """Say that the tensors are now those of ``version``."""
        self._map[self._stamp_at : self._stamp_at + 12] = b"%012d" % version
        return WeightUpdate(version=version, path=str(self.path))


class WeightPublisher:
    """The trainer's side of a sync.

    Args:
        model: parameters and persistent buffers are published under their checkpoint names; tied ones once.
        directory: :func:`~lockstep.weights.directory.weights_directory`'s. It may be removed at any time: the
            parameters live as long as the map.
        say: told where the file lies when the directory has no room for it.

    Raises:
        NoRoomError: when there is none anywhere.
    """

    def __init__(self, model: nn.Module, directory: Path, say: Callable[[str], None] = print) -> None:
        self.directory = directory
        self._model = model
        tensors = checkpoint_weights(model)
        own = named_weights(model)
        self._file = _File(directory, FILE_NAME, tensors, say)
        self.path = self._file.path
        self.copied: dict[str, Tensor] = {}
        """What lies in the map beside the trainer's memory, and is copied there by each :meth:`publish`."""
        for name, tensor in tensors.items():
            shared = self._file.tensors[name]
            # A checkpoint may hold a tensor in another form than the model does (experts apart, or joined):
            # that one is made anew at each publish, and copied.
            if tensor is own.get(name) and tensor.device.type == "cpu":
                shared.copy_(tensor)
                # The parameter stays the object that it is: optimizer, head and hooks hold on to it.
                tensor.data = shared
            else:
                self.copied[name] = shared

    def publish(self, version: int) -> WeightUpdate:
        """Make the present weights available as ``version``.

        They must not change until every engine has loaded them.
        """
        present = checkpoint_weights(self._model) if self.copied else {}
        for name, shared in self.copied.items():
            shared.copy_(present[name])
        return self._file.stamp(version)

    def settle(self) -> None:
        """Nothing is under way: an engine has read the file when its load returns."""


class DoublePublisher:
    """Copies into one of two files by turns: the trainer may step while an engine still reads the one before.

    ::

        publish(4) ─► weights-0 ── read by engines ──┐
        step                                         │ settle of version 4 is due before publish(6) writes
        publish(5) ─► weights-1 ── read by engines   │
        publish(6) ─► weights-0 ◄────────────────────┘

    Arguments and errors as :class:`WeightPublisher`.
    """

    def __init__(self, model: nn.Module, directory: Path, say: Callable[[str], None] = print) -> None:
        self.directory = directory
        self._model = model
        tensors = checkpoint_weights(model)
        self._files = [_File(directory, f"{turn}-{FILE_NAME}", tensors, say) for turn in range(2)]
        self._turn = 0

    @torch.no_grad()
    def publish(self, version: int) -> WeightUpdate:
        """Copy the present weights out as ``version``.

        They may change at once; the file is kept until the publish after next.
        """
        file = self._files[self._turn]
        self._turn = 1 - self._turn
        for name, tensor in checkpoint_weights(self._model).items():
            file.tensors[name].copy_(tensor)
        return file.stamp(version)

    def settle(self) -> None:
        """Nothing is under way on the trainer's side."""


def publisher_of(
    engine: EngineConfig, directory: Path, say: Callable[[str], None], model: nn.Module
) -> Publisher:
    """What carries a model's weights to the engine of a recipe.

    Raises:
        NoRoomError: when there is no room for the file.
        UsageError: for NCCL, where the model is not on a GPU.
    """
    if engine.weights == "nccl":
        from lockstep.weights.nccl import NcclPublisher

        return NcclPublisher(model, directory)
    return (DoublePublisher if engine.double_buffer else WeightPublisher)(model, directory, say)


def _header(tensors: dict[str, Tensor], version: int) -> tuple[bytes, dict[str, int]]:
    """The safetensors header, padded to whole pages, and each tensor's offset behind it."""
    entries: dict[str, object] = {"__metadata__": {"lockstep_version": f"{version:012d}", "format": "pt"}}
    offsets = {}
    at = 0
    for name, tensor in tensors.items():
        offsets[name] = at
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    body = json.dumps(entries, separators=(",", ":")).encode()
    # Whole pages: the tensors begin on one, so that elements are aligned whatever the header's length.
    body = body.ljust(-(-(len(body) + 8) // _PAGE) * _PAGE - 8)
    return len(body).to_bytes(8, "little") + body, offsets
