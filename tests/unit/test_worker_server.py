"""What a worker does with requests that meet: a load and samples under way, an abort, a peer that goes."""

import asyncio
import contextlib
import gc
import socket
import struct
import warnings

import pytest

from lockstep.engines.worker.server import BadRequestError, _Server
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
    decode_reply,
    encode,
)
from lockstep.records.tokens import SamplingParams, Scores, pack_ids, pack_logprobs
from lockstep.records.versions import LoadReceipt, WeightUpdate
from tests.worker_that_lies import READY, completion

PARAMS = (SamplingParams(max_tokens=2),)


class Engine:
    """Samples end when the test says so; everything that begins and ends is noted in order."""

    def __init__(self):
        self.log = []
        self.may_end = {}

    async def _until_told(self, kind, request):
        self.log.append(f"{kind} {request.id} begins")
        event = self.may_end.setdefault(request.id, asyncio.Event())
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.log.append(f"{kind} {request.id} is cancelled")
            raise
        self.log.append(f"{kind} {request.id} ends")

    async def sample(self, request):
        await self._until_told("sample", request)
        return [completion(0, 0, [5, 6])]

    async def score(self, request):
        await self._until_told("score", request)
        return [Scores(pack_logprobs([-1.0]))]

    async def load(self, request):
        self.log.append(f"load {request.id}")
        if request.update.version == 13:
            raise RuntimeError("no such version")
        return LoadReceipt(request.update.version, 1, 0.0, (), True)

    async def abort(self, draws):
        self.log.append("abort")
        for event in self.may_end.values():
            event.set()
        return len(self.may_end)

    def counters(self):
        return {"seen": float(len(self.log))}

    def ended_by(self, error):
        return False


class Peer:
    """The trainer's end of the socket."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer

    def ask(self, *requests):
        for request in requests:
            body = encode(request)
            self.writer.write(struct.pack("<I", len(body)) + body)

    async def reply(self):
        (length,) = struct.unpack("<I", await asyncio.wait_for(self.reader.readexactly(4), 5))
        return decode_reply(await self.reader.readexactly(length))


@contextlib.asynccontextmanager
async def serving(engine):
    ours, theirs = socket.socketpair()
    served = asyncio.create_task(
        _Server(engine, encode(READY)).serve_peer(*await asyncio.open_unix_connection(sock=theirs))
    )
    peer = Peer(*await asyncio.open_unix_connection(sock=ours))
    assert await peer.reply() == READY
    try:
        yield peer
    finally:
        peer.writer.close()
        await asyncio.wait_for(served, 5)


def draw(number):
    return Draw(number, (pack_ids([1, 2]),), PARAMS)


def score(number):
    return Score(number, (pack_ids([1, 2]),))


def load(number, mode="wait", version=1):
    return Load(number, WeightUpdate(version=version), mode)


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.sleep(0.02)


def run(scene):
    engine = Engine()

    async def played():
        async with serving(engine) as peer:
            await scene(engine, peer)

    asyncio.run(played())
    return engine


def test_a_load_waits_for_what_is_under_way_and_holds_up_what_comes_after_it():
    async def scene(engine, peer):
        peer.ask(draw(1), score(2))
        await settled()
        peer.ask(load(3), draw(4))
        await settled()
        assert engine.log == ["sample 1 begins", "score 2 begins"], (
            "neither the load nor the later sample has begun"
        )
        engine.may_end[1].set()
        await settled()
        assert isinstance(await peer.reply(), Drawn)
        assert "load 3" not in engine.log, "the score is under way still"
        engine.may_end[2].set()
        replies = [await peer.reply(), await peer.reply()]
        assert [type(reply) for reply in replies] == [Scored, Loaded]
        await settled()
        assert engine.log[-2:] == ["load 3", "sample 4 begins"]
        engine.may_end[4].set()
        assert (await peer.reply()).id == 4

    run(scene)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_in_its_other_modes_a_load_comes_in_between(mode):
    async def scene(engine, peer):
        peer.ask(draw(1))
        await settled()
        peer.ask(load(2, mode, version=7))
        assert await peer.reply() == Loaded(2, LoadReceipt(7, 1, 0.0, (), True))
        assert engine.log == ["sample 1 begins", "load 2"]
        engine.may_end[1].set()
        assert isinstance(await peer.reply(), Drawn)

    run(scene)


def test_loads_come_one_after_the_other_in_the_order_they_were_asked_for():
    async def scene(engine, peer):
        peer.ask(draw(1))
        await settled()
        peer.ask(load(2, version=2), load(3, version=3))
        await settled()
        engine.may_end[1].set()
        replies = [await peer.reply() for _ in range(3)]
        assert [reply.id for reply in replies] == [1, 2, 3]
        assert replies[2].receipt.version == 3

    run(scene)


def test_an_abort_and_a_count_are_answered_while_a_load_waits():
    async def scene(engine, peer):
        peer.ask(draw(1), draw(2))
        await settled()
        peer.ask(load(3))
        await settled()
        peer.ask(Count(4))
        assert isinstance(await peer.reply(), Counted)
        peer.ask(Abort(5))
        replies = {reply.id: reply for reply in [await peer.reply() for _ in range(4)]}
        assert replies[5] == Aborted(5, 2)
        assert isinstance(replies[3], Loaded)
        assert isinstance(replies[1], Drawn)

    run(scene)


def test_a_load_that_fails_fails_alone_and_what_waited_for_it_goes_on():
    async def scene(engine, peer):
        peer.ask(load(1, version=13), draw(2))
        failure = await peer.reply()
        assert (failure.id, failure.message, failure.fatal) == (1, "RuntimeError: no such version", False)
        await settled()
        engine.may_end[2].set()
        assert isinstance(await peer.reply(), Drawn)
        peer.ask(load(3))
        assert isinstance(await peer.reply(), Loaded)

    run(scene)


def test_a_sample_that_fails_does_not_keep_a_load_waiting():
    async def scene(engine, peer):
        async def refused(request):
            await engine._until_told("sample", request)
            raise BadRequestError("a prompt of 9 tokens", "at most 8", "shorten it")

        engine.sample = refused
        peer.ask(draw(1))
        await settled()
        peer.ask(load(2))
        await settled()
        engine.may_end[1].set()
        replies = {reply.id: reply for reply in [await peer.reply(), await peer.reply()]}
        assert isinstance(replies[2], Loaded)
        told = replies[1]
        assert isinstance(told, Failure)
        assert (told.message, told.expected, told.hint) == ("a prompt of 9 tokens", "at most 8", "shorten it")
        assert told.usage

    run(scene)


@pytest.mark.filterwarnings("error")
def test_what_a_peer_asked_for_ends_with_it():
    with warnings.catch_warnings():  # what other tests left behind is not this one's
        warnings.simplefilter("ignore")
        gc.collect()

    async def scene(engine, peer):
        peer.ask(draw(1))
        await settled()
        peer.ask(load(2), draw(3))
        await settled()
        peer.writer.close()
        await settled()
        assert engine.log == ["sample 1 begins", "sample 1 is cancelled"], "nothing that waited has begun"

    run(scene)
