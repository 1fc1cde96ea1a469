"""The ``run-ID.wandb`` file that W&B writes offline: LevelDB's log format, a ``Record`` in each record.

File: ``:W&B``, u16 magic 0xBEE1, u8 version; then blocks of 32 KiB of records: u32 CRC-32 of type and data,
u16 length, u8 type (1 whole, 2 first, 3 middle, 4 last) (wandb/sdk/internal/datastore.py). Of ``Record``: 2
history; of ``HistoryRecord``: 1 item, 2 step; of ``HistoryItem``: 1 key, 2 nested_key, 16 value_json; of
``HistoryStep``: 1 num.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lockstep.errors import RunError
from lockstep.report.sources.protobuf import fields, first

BLOCK = 32768
HEADER = 7
HEAD = b":W&B\xe1\xbe\x00"
WHOLE, FIRST, LAST = 1, 2, 4


def rows(path: Path) -> list[tuple[float, dict[str, float]]]:
    """Step and numbers of each history row; a last record that a kill cut short is left out.

    Raises:
        RunError: for a record whose checksum is wrong, or a file of another format.
    """
    found = []
    try:
        for record in _records(path.read_bytes()):
            history = first(record, 2)
            if isinstance(history, bytes):
                found.append(_row(history))
    except (ValueError, OSError, struct.error, msgspec.MsgspecError) as error:
        hint = "copy the file again from where it was written"
        raise RunError(f"file {path}", got=str(error), expected="a .wandb file", hint=hint) from error
    return [row for row in found if row[1]]


def _records(content: bytes) -> Iterator[bytes]:
    if content[: len(HEAD)] != HEAD:
        raise ValueError(f"a file that begins {content[: len(HEAD)]!r}")
    at = HEADER
    parts = []
    while True:
        if (room := BLOCK - at % BLOCK) < HEADER:  # no header fits: a block's last bytes are padding
            at += room
        # Here and below: what a kill cut short ends the file.
        if at + HEADER > len(content):
            return
        told, length, kind = struct.unpack_from("<IHB", content, at)
        if at + HEADER + length > len(content):
            return
        data = content[at + HEADER : at + HEADER + length]
        if told != zlib.crc32(data, zlib.crc32(bytes([kind]))):
            raise ValueError(f"a record with a wrong checksum at byte {at}")
        at += HEADER + length
        parts = [data] if kind in (WHOLE, FIRST) else [*parts, data]
        if kind in (WHOLE, LAST):
            yield b"".join(parts)


def _row(history: bytes) -> tuple[float, dict[str, float]]:
    step = 0.0
    figures = {}
    for name, value in fields(history):
        if name == 2 and isinstance(value, bytes):
            step = float(first(value, 1) or 0)
        if name != 1 or not isinstance(value, bytes):
            continue
        key = [
            part.decode() for number, part in fields(value) if number in (1, 2) and isinstance(part, bytes)
        ]
        told = first(value, 16)
        if not isinstance(told, bytes):
            continue
        number = _number(told)
        if number is not None:
            figures["/".join(filter(None, key))] = number
    return float(figures.pop("_step", step)), figures


def _number(text: bytes) -> float | None:
    spelled = {b'"NaN"': "nan", b"NaN": "nan", b'"Infinity"': "inf", b'"-Infinity"': "-inf"}
    if text in spelled:
        return float(spelled[text])
    value = msgspec.json.decode(text)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
