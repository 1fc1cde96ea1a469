"""What a safetensors file says of its tensors, read without them. No torch.

    8 bytes, length of the header │ header, JSON │ tensors, each from start to end

Engines and the trainer read tensors through the safetensors package; here only the header is wanted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import MsgspecError, Struct

METADATA = "__metadata__"
"""A text or two about the file, among the names of tensors."""


class TensorEntry(Struct, frozen=True):
    """One tensor."""

    shape: tuple[int, ...]
    data_offsets: tuple[int, int]
    """Its first byte, and the one after its last, from the end of the header."""


@dataclass(frozen=True)
class TensorFile:
    """A file's header."""

    tensors: dict[str, TensorEntry]
    nbytes: int
    """The size of the whole file, where every tensor is in it."""


def header_of(path: Path) -> TensorFile:
    """Read a file's header.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is no safetensors file, or its header is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        # Of another file these bytes may be any number: no more is read than is there.
        raw = file.read(head) if head < size else b""
    try:
        found = msgspec.json.decode(raw, type=dict[str, dict[str, Any]])
        found.pop(METADATA, None)
        tensors = msgspec.convert(found, dict[str, TensorEntry])
    except (MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"no header of a safetensors file: {error}") from error
    return TensorFile(tensors, 8 + head + max((t.data_offsets[1] for t in tensors.values()), default=0))
