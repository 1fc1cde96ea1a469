"""The wire format of protocol buffers, as far as two file formats need it: fields of a message, strictly.

Source: protobuf.dev/programming-guides/encoding. Field numbers are given where they are read.
"""

import struct
from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an int of a varint, bytes of every other type.

    Raises:
        ValueError: for bytes that are no message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number = key >> 3
        kind = key & 7
        if number == 0:
            raise ValueError("a field that is cut or has no number")
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == BYTES:
            length, at = _varint(message, at)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > len(message):
            raise ValueError("a field that is cut")
        yield number, message[at : at + length]
        at += length


def first(message: bytes, number: int) -> int | bytes | None:
    """The last value of a field that does not repeat, as readers of the format take it; None without one."""
    return dict(fields(message)).get(number)


def signed(value: int) -> int:
    """An int64 from its varint."""
    return value - (1 << 64) if value >> 63 else value


def number(value: bytes) -> float:
    """A float or a double, by its length."""
    return float(struct.unpack("<f" if len(value) == 4 else "<d", value)[0])


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("a number that is cut")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if not byte & 0x80:
            return value & ((1 << 64) - 1), at  # ten bytes hold 70 bits; those past 64 are dropped
