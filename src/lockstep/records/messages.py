"""The worker protocol: what trainer and engine process say to each other.

Frames are 4 bytes of little-endian length, then one msgpack-encoded message. Requests carry an ``id`` that
the reply repeats. Decoding is strict: a frame that is no request is answered with a :class:`Failure` and
changes nothing; one that is no reply ends the engine and fails everyone who waits for it.
"""

from typing import Any

import msgspec
from msgspec import Struct

from lockstep.errors import ProtocolError
from lockstep.records.capabilities import Capability
from lockstep.records.semantics import Distribution
from lockstep.records.tokens import Completion, SamplingParams, Scores
from lockstep.records.versions import LoadMode, LoadReceipt, WeightUpdate

MAX_FRAME_BYTES = 256 * 1024 * 1024
"""A frame announced larger than this drops the peer: no honest message is that large."""


class Draw(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Draw ``params.n`` completions of every prompt.

    Answered by :class:`Drawn`, all completions in prompt order.
    """

    id: int
    prompts: list[bytes]
    """int32 token ids of each prompt, at least one token."""
    params: list[SamplingParams]
    """One for each prompt."""


class Score(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Score given token ids, each sequence on its own, no cache read. Answered by :class:`Scored`."""

    id: int
    sequences: list[bytes]
    """int32 token ids of each sequence, at least two tokens."""
    temperature: float = 1.0
    """Another than 1 needs the capability ``rescore_at_temperature``."""


class Load(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Pause, load the weights, re-pack, clear the caches (but in mode ``keep``), resume.

    Answered by :class:`Loaded`.
    """

    id: int
    update: WeightUpdate
    mode: LoadMode = "wait"


class Abort(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """End samples in flight; their completions hold what there is. Answered by :class:`Aborted`."""

    id: int
    draws: tuple[int, ...] = ()
    """The :class:`Draw` requests to abort; none named: every one."""


class Count(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Read the engine's own counters. Answered by :class:`Counted`."""

    id: int


Request = Draw | Score | Load | Abort | Count


class Ready(Struct, frozen=True, tag=True):
    """The first message of a worker: the engine runs, and this is what it resolved to."""

    engine: str
    version: str
    generation: str
    distribution: Distribution
    resolved: dict[str, Any]
    """The engine's *resolved* configuration, read back from it, by ``section.key``."""
    capabilities: dict[str, Capability]
    """By the names of :data:`lockstep.records.capabilities.CAPABILITIES`."""
    start_s: float
    pids: tuple[int, ...] = ()


class Drawn(Struct, frozen=True, tag=True):
    """Answer to :class:`Draw`."""

    id: int
    completions: list[Completion]


class Scored(Struct, frozen=True, tag=True):
    """Answer to :class:`Score`."""

    id: int
    scores: list[Scores]


class Loaded(Struct, frozen=True, tag=True):
    """Answer to :class:`Load`."""

    id: int
    receipt: LoadReceipt


class Aborted(Struct, frozen=True, tag=True):
    """Answer to :class:`Abort`."""

    id: int
    n_requests: int


class Counted(Struct, frozen=True, tag=True):
    """Answer to :class:`Count`."""

    id: int
    counters: dict[str, float]
    """Since the engine's start, by the engine's names; empty where its statistics are off."""


class Failure(Struct, frozen=True, tag=True):
    """The request could not be done.

    ``usage`` is true when the request or the configuration is at fault, not the engine.
    """

    id: int
    message: str
    expected: str = "a request that the engine can do"
    hint: str = "see the engine's log"
    usage: bool = False
    fatal: bool = False


Reply = Ready | Drawn | Scored | Loaded | Aborted | Counted | Failure

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
_request_decoder = msgspec.msgpack.Decoder(Request)
_reply_decoder = msgspec.msgpack.Decoder(Reply)


class _Numbered(Struct):
    """What is read of a frame that is no message."""

    id: int


_number_decoder = msgspec.msgpack.Decoder(_Numbered)


def decode_request(frame: bytes) -> Request:
    """The request in a frame.

    Raises:
        ProtocolError: when it is none, whatever else it is.
    """
    return _decoded(_request_decoder, frame, "request")


def decode_reply(frame: bytes) -> Reply:
    """The reply in a frame.

    Raises:
        ProtocolError: when it is none, whatever else it is.
    """
    return _decoded(_reply_decoder, frame, "reply")


def number_of(frame: bytes) -> int:
    """The id of a frame that is no message, so that its sender can be told; 0 where it cannot be read."""
    try:
        return _number_decoder.decode(frame).id
    except _UNDECODABLE:
        return 0


# A frame can also be nested too deep, hold an integer that Python's own cannot be compared with, or announce
# too much.
_UNDECODABLE = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError, MemoryError)


def _decoded(decoder: msgspec.msgpack.Decoder, frame: bytes, what: str) -> Any:
    try:
        return decoder.decode(frame)
    except _UNDECODABLE as error:
        raise ProtocolError(
            f"worker protocol, {what}",
            got=(
                f"a frame of {len(frame)} bytes that begins {bytes(frame[:32])!r} ({type(error).__name__}: "
                f"{str(error)[:200]!r})"
            ),
            expected=f"a {what} of lockstep.records.messages",
            hint="do both sides run the same Lockstep?",
        ) from error
