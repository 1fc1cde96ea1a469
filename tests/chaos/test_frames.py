"""Malformed frames, in both directions.

Each is refused by a named error, at once, in bounded memory; nobody is left waiting.
"""

import asyncio
import contextlib
import resource
import socket
import struct
import threading
import time

import numpy as np
import pytest

from lockstep.engines.channel import Channel
from lockstep.engines.replies import PLAIN_BYTES, check_reply
from lockstep.engines.worker.server import _Server
from lockstep.errors import EngineDied, LockstepError, ProtocolError
from lockstep.records.messages import (
    Draw,
    Drawn,
    Failure,
    Score,
    Scored,
    decode_reply,
    decode_request,
    encode,
    number_of,
)
from lockstep.records.tokens import FLOAT32, INT32, Scores, pack_logprobs
from lockstep.records.versions import LoadReceipt
from tests.chaos.frames import REPLIES, REPLY_FRAMES, REQUEST_FRAMES, REQUESTS, mutant
from tests.worker_that_lies import READY, completion, framed

COUNTS = [10_000, pytest.param(100_000, marks=pytest.mark.chaos)]
FRAME_LIMIT_S = 1.0
HANG_S = 10.0
MEMORY_LIMIT = 100_000_000
SAMPLE, SCORE = REQUESTS[0], REQUESTS[1]


@contextlib.contextmanager
def bounded_memory():
    """The process grows by no more than :data:`MEMORY_LIMIT`."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY_LIMIT


def believed(request, reply):
    """True where the trainer would take the reply for the request's."""
    try:
        check_reply(request, reply)
    except ProtocolError:
        return False
    return True


@pytest.mark.parametrize("n", COUNTS)
def test_every_malformed_reply_is_a_protocol_error_or_means_what_it_must(n):
    rng = np.random.default_rng(1)
    longest = 0.0
    refused = 0
    taken = 0
    raw = 0
    with bounded_memory():
        for _ in range(n):
            frame = mutant(rng, REPLY_FRAMES)
            began = time.perf_counter()
            try:
                reply = decode_reply(frame)
            except ProtocolError as error:
                raw += "\x1b" in str(error)
                refused += 1
            else:
                believing = [request for request in (None, *REQUESTS) if believed(request, reply)]
                taken += bool(believing)
                if isinstance(reply, Drawn) and believing:
                    _assert_whole(reply)
            longest = max(longest, time.perf_counter() - began)
    assert longest < FRAME_LIMIT_S
    assert refused > n / 4
    assert 0 < taken < n / 2
    assert raw == 0, "no control byte of a frame is shown as it came"


def _assert_whole(reply):
    for c in reply.completions:
        ids = np.frombuffer(c.token_ids, INT32)
        logprobs = np.frombuffer(c.logprobs, FLOAT32)
        assert len(ids) == len(logprobs) <= 4
        assert (ids >= 0).all()
        assert np.isnan(logprobs).sum() == c.missing
        assert [t for s in c.version_spans for t in range(s.start, s.stop)] == list(range(len(ids)))


@pytest.mark.parametrize("n", COUNTS)
def test_every_malformed_request_is_a_protocol_error_whose_sender_can_be_told(n):
    rng = np.random.default_rng(2)
    longest = 0.0
    refused = 0
    numbered = 0
    with bounded_memory():
        for _ in range(n):
            frame = mutant(rng, REQUEST_FRAMES)
            began = time.perf_counter()
            try:
                decode_request(frame)
            except ProtocolError:
                refused += 1
                numbered += number_of(frame) == 3
            longest = max(longest, time.perf_counter() - began)
    assert longest < FRAME_LIMIT_S
    assert refused > n / 4
    assert numbered > n / 20


@pytest.mark.parametrize(
    ("request_", "reply", "needle"),
    [
        (SAMPLE, REPLIES[2], "Scored, expected Drawn"),
        (SAMPLE, Drawn(3, []), "0 completions, expected 3"),
        (SCORE, Scored(3, [Scores(pack_logprobs([-1.0] * 2)), Scores(b"123")]), "bytes"),
        (
            SCORE,
            Scored(3, [Scores(pack_logprobs([-1.0, None])), Scores(pack_logprobs([-2.0] * 39))]),
            "row 0: 0 missing",
        ),
        (
            SCORE,
            Scored(3, [Scores(pack_logprobs([-1.0, np.inf])), Scores(pack_logprobs([-2.0] * 39))]),
            "infinite",
        ),
        (
            REQUESTS[2],
            type(REPLIES[3])(3, LoadReceipt(1, 30, 0.5, (), cache_cleared=True)),
            "version 1, expected version 2",
        ),
        (None, type(READY)("e", "0", "V1", "sampler", {}, {}, 0.0), "no word on"),
    ],
)
def test_a_reply_that_is_not_the_requests_is_named(request_, reply, needle):
    with pytest.raises(ProtocolError, match=needle):
        check_reply(request_, decode_reply(encode(reply)))


@pytest.mark.parametrize(
    ("ids", "change", "needle"),
    [
        ([5, 6], {"token_ids": b"1234567"}, "7 bytes of ids"),
        ([5, 6], {"logprobs": b"1234"}, "4 of log-probabilities"),
        ([5, -6], {}, "token id -6"),
        ([5] * 5, {}, "5 tokens, expected at most 4"),
        ([5, 6], {"version_spans": ()}, "versions of 0 tokens"),
        ([5, 6], {"version_spans": REPLIES[1].completions[0].version_spans}, "versions that tile its 2"),
        ([5, 6], {"missing": 1}, "row 0: 1 missing"),
        ([5, 6], {"sample_index": 1}, "completion 0 of prompt 0 in its place"),
    ],
)
def test_a_completion_that_cannot_be_is_named(ids, change, needle):
    others = REPLIES[1].completions[1:]
    with pytest.raises(ProtocolError, match=needle):
        check_reply(SAMPLE, Drawn(3, [completion(0, 0, ids, **change), *others]))
    check_reply(SAMPLE, Drawn(3, [completion(0, 0, [5, 6]), *others]))


def asked_of(answer: bytes):
    """What the trainer gets that asks a worker which answers with these bytes and goes.

    Nothing may be left waiting.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    death = EngineDied("engine", got="its end", expected="a running engine", hint="none")
    ended = []

    def work():
        with contextlib.suppress(OSError), theirs:
            theirs.sendall(framed(READY))
            theirs.recv(4096)
            theirs.sendall(answer)

    worker = threading.Thread(target=work)
    worker.start()
    channel = Channel(ours, lambda: ended.append(1), lambda: death)
    began = time.monotonic()
    channel._next_id = SCORE.id
    try:
        assert channel.ready(HANG_S).engine == "fake"
        return channel.ask(lambda number: Score(number, SCORE.sequences), HANG_S)
    except LockstepError as error:
        assert ended
        return error
    finally:
        channel.close()
        worker.join()
        assert time.monotonic() - began < HANG_S / 2
        assert not channel._reader.is_alive()


def test_a_live_trainer_is_told_whatever_its_worker_says():
    rng = np.random.default_rng(3)
    before = threading.active_count()
    with bounded_memory():
        answers = [framed(mutant(rng, REPLY_FRAMES)) for _ in range(250)]
        answers += [rng.bytes(int(rng.integers(0, 60))) for _ in range(50)]
        found = [asked_of(answer) for answer in answers]
    assert all(isinstance(one, ProtocolError | EngineDied | Failure | Scored) for one in found)
    assert sum(isinstance(one, ProtocolError) for one in found) > 200
    assert all(believed(SCORE, one) for one in found if isinstance(one, Scored))
    assert threading.active_count() == before


def test_what_reaches_nobody_reaches_everybody():
    """A failure of no request, an answer to one never made, a second start, a frame beyond what is honest."""
    for answer, needle in (
        (
            framed(Failure(0, "malformed frame")),
            "Failure to request 0, which nobody waits for: malformed frame",
        ),
        (framed(Scored(99, [])), "Scored to request 99, which nobody waits for"),
        (framed(READY), "Ready to request 0, which nobody waits for"),
        (struct.pack("<I", 2 * PLAIN_BYTES), f"a frame of {2 * PLAIN_BYTES} bytes"),
        (framed(Drawn(SCORE.id, [])), "got Drawn, expected Scored"),
    ):
        error = asked_of(answer)
        assert isinstance(error, ProtocolError)
        assert needle in str(error)


class Engine:
    """What a worker serves here: it scores, and fails at anything else."""

    async def score(self, request):
        return [Scores(pack_logprobs([-1.0] * 2)) for _ in request.sequences]

    async def sample(self, request):
        raise RecursionError("deeper than the engine goes")

    def counters(self):
        return {}

    async def abort(self, draws):
        return 0

    def ended_by(self, error):
        return False

    load = sample


def test_a_live_worker_answers_every_malformed_frame_and_goes_on(capsys):
    rng = np.random.default_rng(4)
    problems = []
    frames = [mutant(rng, REQUEST_FRAMES) for _ in range(400)]
    frames.append(encode(Draw(77, [], [])).replace(b"prompts", b"prompt5"))

    async def talk():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        served = asyncio.create_task(
            _Server(Engine(), encode(READY)).serve_peer(*await asyncio.open_unix_connection(sock=theirs))
        )
        reader, writer = await asyncio.open_unix_connection(sock=ours)

        async def reply():
            (length,) = struct.unpack("<I", await reader.readexactly(4))
            return decode_reply(await reader.readexactly(length))

        replies = [await reply()]
        for frame in frames:
            writer.write(framed(frame))
            replies.append(await reply())
        writer.write(framed(Score(9, SCORE.sequences)))
        replies.append(await reply())
        writer.write(struct.pack("<I", 2**32 - 1))
        assert await reader.read(1) == b"", "a frame that no memory holds ends the connection"
        await served
        return replies

    with bounded_memory():
        replies = asyncio.run(asyncio.wait_for(talk(), 60))
    assert problems == []
    assert isinstance(replies[-1], Scored)
    assert (type(replies[-2]), replies[-2].id) == (Failure, 77), (
        "its sender is told, by the id that could be read"
    )
    refused = [reply for reply in replies if isinstance(reply, Failure)]
    assert len(refused) > 200
    assert sum(reply.id == 3 for reply in refused) > 40
