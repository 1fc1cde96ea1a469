"""TensorBoard's event files: TFRecord frames, an ``Event`` in each.

Frame: length (u64), its masked CRC-32C, data, its masked CRC-32C, little-endian (tensorflow/core/lib/io,
record_writer.h). Of ``Event``: 2 step, 5 summary; of ``Summary``: 1 value; of ``Value``: 1 tag, 2
simple_value, 8 tensor; of ``TensorProto``: 1 dtype (1 float, 2 double), 4 tensor_content, 5 float_val, 6
double_val.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from lockstep.errors import RunError
from lockstep.report.sources.protobuf import fields, first, number, signed


def rows(path: Path) -> list[tuple[float, dict[str, float]]]:
    """Step and scalars of each event; a last frame that a kill cut short is left out.

    Raises:
        RunError: for a frame whose checksum is wrong, or that holds no event.
    """
    found = []
    try:
        for frame in _frames(path.read_bytes()):
            step = 0
            scalars = {}
            for name, value in fields(frame):
                if name == 2 and isinstance(value, int):
                    step = signed(value)
                elif name == 5 and isinstance(value, bytes):
                    scalars |= dict(_scalars(value))
            if scalars:
                found.append((float(step), scalars))
    except (ValueError, OSError, struct.error) as error:
        hint = "copy the file again from where it was written"
        raise RunError(f"file {path}", got=str(error), expected="an event file", hint=hint) from error
    return found


def _frames(content: bytes) -> Iterator[bytes]:
    at = 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        end = at + 12 + length + 4
        # Before anything is made of it: a wrong length would pass for a last frame that a kill cut short.
        _hold(content[at : at + 8], content, at + 8, "length")
        if end > len(content):
            return
        _hold(content[at + 12 : end - 4], content, end - 4, "frame")
        yield content[at + 12 : end - 4]
        at = end


def _hold(data: bytes, content: bytes, at: int, what: str) -> None:
    (told,) = struct.unpack_from("<I", content, at)
    if told != masked_crc32c(data):
        raise ValueError(f"a {what} with a wrong checksum at byte {at}")


def _scalars(summary: bytes) -> Iterator[tuple[str, float]]:
    for name, value in fields(summary):
        if name != 1 or not isinstance(value, bytes):
            continue
        tag, simple, tensor = (first(value, field) for field in (1, 2, 8))
        if not isinstance(tag, bytes):
            continue
        if isinstance(simple, bytes):
            yield tag.decode(), number(simple)
        elif isinstance(tensor, bytes) and (scalar := _of_tensor(tensor)) is not None:
            yield tag.decode(), scalar


def _of_tensor(tensor: bytes) -> float | None:
    """The one float or double of a tensor; None of any other: text, images, histograms."""
    width = {1: 4, 2: 8}.get(first(tensor, 1))  # type: ignore[arg-type]
    content = first(tensor, 4) or first(tensor, 5) or first(tensor, 6)
    return number(content) if width and isinstance(content, bytes) and len(content) == width else None


def _table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        return value

    return tuple(map(entry, range(256)))


TABLE = _table()
"""CRC-32C (Castagnoli), reflected."""


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
