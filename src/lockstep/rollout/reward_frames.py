"""What a trainer and a worker that computes rewards say to each other.

msgpack frames behind their length, over a socket pair.
"""

import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from lockstep.config.recipe import TaskConfig

_LENGTH = struct.Struct("<I")
ANSWER_LIMIT = 1 << 20
"""Bytes; a number, or an error that was cut to 2000 characters, has far fewer."""


class Setup(Struct, frozen=True):
    """The first frame: whose rewards are to be computed. Answered once they can be."""

    config: TaskConfig
    seed: int


class Question(Struct, frozen=True):
    """One completion to judge."""

    completion: str
    item: dict[str, Any]


class Answer(Struct, frozen=True):
    """What became of a frame."""

    value: float = 0.0
    error: str = ""
    """What was raised in place of a value; empty where nothing was."""
    recipe_error: tuple[str, str, str, str] | None = None
    """Boundary, got, expected, hint: of a set-up that the recipe is to blame for."""


encode = msgspec.msgpack.Encoder().encode


def send(peer: socket.socket, body: bytes, until: float | None = None) -> None:
    """Raises TimeoutError when the peer does not take it ``until`` then, on the monotonic clock."""
    _set_deadline(peer, until)
    peer.sendall(_LENGTH.pack(len(body)) + body)


def receive(peer: socket.socket, limit: int, until: float | None = None) -> bytes:
    """One frame.

    Raises:
        EOFError: when the peer is gone.
        TimeoutError: when it was not there ``until`` then, on the monotonic clock.
        ValueError: when it is larger than ``limit``.
    """
    (length,) = _LENGTH.unpack(_exactly(peer, _LENGTH.size, until))
    if length > limit:
        raise ValueError(f"a frame of {length} bytes")
    return _exactly(peer, length, until)


def _exactly(peer: socket.socket, n_bytes: int, until: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < n_bytes:
        _set_deadline(peer, until)
        part = peer.recv(n_bytes - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _set_deadline(peer: socket.socket, until: float | None) -> None:
    left = None if until is None else until - time.monotonic()
    if left is not None and left <= 0:
        raise TimeoutError
    peer.settimeout(left)


def unsendable(value: Any, path: str = "item") -> str:
    """Where in a question something would not arrive as sent, and of which type; empty where nothing is."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return ""
    if isinstance(value, Mapping):
        odd = next((key for key in value if not isinstance(key, str | int)), None)
        if odd is not None:
            return f"{path} has the key {odd!r}"
        return next((odd_one for key in value if (odd_one := unsendable(value[key], f"{path}[{key!r}]"))), "")
    if isinstance(value, list | tuple):
        return next(
            (odd_one for i, one in enumerate(value) if (odd_one := unsendable(one, f"{path}[{i}]"))), ""
        )
    return f"{path} is a {type(value).__name__}"
