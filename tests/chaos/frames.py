"""Frames that are nearly messages: honest ones with bytes, values, lengths or whole parts exchanged."""

import msgspec
import numpy as np

from lockstep.records.messages import (
    Abort,
    Aborted,
    Count,
    Counted,
    Draw,
    Drawn,
    Failure,
    Load,
    Loaded,
    Score,
    Scored,
    encode,
)
from lockstep.records.tokens import SamplingParams, Scores, pack_ids, pack_logprobs
from lockstep.records.versions import LoadReceipt, NcclBroadcast, VersionSpan, WeightUpdate
from tests.worker_that_lies import READY, completion

PROMPT = pack_ids([1, 2, 3])
REQUESTS = [
    Draw(
        3,
        [PROMPT, PROMPT],
        [SamplingParams(max_tokens=4, n=2, stop_token_ids=(2,)), SamplingParams(max_tokens=4, seed=5)],
    ),
    Score(3, [PROMPT, pack_ids(range(40))], 0.7),
    Load(3, WeightUpdate(2, "/dev/shm/lockstep-x/weights.safetensors"), "keep"),
    Load(3, WeightUpdate(2, nccl=NcclBroadcast(b"x" * 128, 2, ("a.b",), ("float32",), ((3, 4),)))),
    Abort(3),
    Count(3),
]
SPANS = (VersionSpan(0, 2, 1), VersionSpan(2, 3, 2))
REPLIES = [
    READY,
    Drawn(
        3,
        [
            completion(0, 0, [5, 6, 7], version_spans=SPANS),
            completion(0, 1, [5]),
            completion(1, 0, [9, 9, 9, 9]),
        ],
    ),
    Scored(3, [Scores(pack_logprobs([-1.0, None]), 1), Scores(pack_logprobs([-2.0] * 39))]),
    Loaded(3, LoadReceipt(2, 30, 0.5, ("lm_head",), cache_cleared=True)),
    Aborted(3, 4),
    Counted(3, {"num_preemptions": 2.0}),
    Failure(3, "ValueError: no"),
]
HUGE = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
]
"""Headers of an array, a map, bytes, a text and an extension of 4 G entries each."""
NASTY = [
    None, True, -1, 0, 2**31, -(2**63), 2**64 - 1, float("nan"), float("inf"), -1e308,
    "", "\x1b[2J", "x" * 5000, b"", b"\xff" * 7,
    pack_ids([-1]), pack_logprobs([float("inf")]), [], [[]] * 50, {}, {"id": 3}, {1: 2}, {"type": "Drawn"},
]  # fmt: skip


def mutant(rng: np.random.Generator, corpus: list[bytes]) -> bytes:
    """One of eight ways to go wrong, once or a few times over."""
    frame = corpus[rng.integers(len(corpus))]
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(frame) + 1))
        match rng.integers(8):
            case 0:
                frame = frame[:at]
            case 1:
                frame = frame[:at] + rng.bytes(int(rng.integers(1, 9))) + frame[at:]
            case 2:
                frame = frame[:at] + rng.bytes(1) + frame[at + 1 :]
            case 3:
                frame = frame[:at] + HUGE[rng.integers(len(HUGE))] + frame[at:]
            case 4:
                other = corpus[rng.integers(len(corpus))]
                frame = frame[:at] + other[int(rng.integers(len(other))) :]
            case 5:
                frame = frame[:at] + b"\x91" * int(rng.integers(1, 3000)) + frame[at:]
            case _:
                frame = _revalued(rng, frame)
    return frame


def _revalued(rng: np.random.Generator, frame: bytes) -> bytes:
    """A well-formed frame with one of its values, at any depth, put in place of another."""
    try:
        message = msgspec.msgpack.decode(frame)
    except (ValueError, RecursionError, TypeError):
        return frame
    places = []
    left = [message]
    while left:
        part = left.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else []
        places += [(part, key) for key in keys]
        left += [part[key] for key in keys]
    if places:
        part, key = places[rng.integers(len(places))]
        part[key] = NASTY[rng.integers(len(NASTY))]
    try:
        return msgspec.msgpack.encode(message)
    except (RecursionError, OverflowError):
        return frame


REQUEST_FRAMES = [encode(request) for request in REQUESTS]
REPLY_FRAMES = [encode(reply) for reply in REPLIES]
