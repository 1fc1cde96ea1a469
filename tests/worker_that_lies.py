"""A worker of the protocol that does as its configuration says: late, silent, dying, or lying outright."""

import os
import signal
import socket
import struct
import sys
import tempfile
import time
import uuid
from pathlib import Path

import msgspec

from lockstep.engines.replies import REPLY_TO
from lockstep.records.capabilities import CAPABILITIES, Capability
from lockstep.records.messages import Drawn, Failure, Ready, Request, Scored, decode_request, encode
from lockstep.records.tokens import Completion, Scores, pack_ids, pack_logprobs
from lockstep.records.versions import VersionSpan

READY = Ready(
    engine="fake",
    version="0",
    generation="V1",
    distribution="sampler",
    resolved={},
    capabilities=dict.fromkeys(CAPABILITIES, Capability(True, "fake")),
    start_s=0.0,
)


def framed(message) -> bytes:
    """A message, or bytes that are none, behind their length."""
    body = message if isinstance(message, bytes) else encode(message)
    return struct.pack("<I", len(body)) + body


def completion(prompt, sample, ids, **changes):
    """An honest completion, but for what is changed."""
    settings = {
        "prompt_index": prompt,
        "sample_index": sample,
        "token_ids": pack_ids(ids),
        "logprobs": pack_logprobs([-1.0] * len(ids)),
        "finish_reason": "stop",
        "version_spans": (VersionSpan(0, len(ids), 0),),
    }
    return Completion(**settings | changes)


def honest(request: Request):
    """The reply that the request is owed; only samples and scores are asked for."""
    if REPLY_TO[type(request)] is Drawn:
        places = [(p, s) for p, params in enumerate(request.params) for s in range(params.n)]
        return Drawn(request.id, [completion(p, s, [5, 6, 7]) for p, s in places])
    sizes = [len(sequence) // 4 - 1 for sequence in request.sequences]
    return Scored(request.id, [Scores(pack_logprobs([-1.0] * size)) for size in sizes])


def litter() -> dict:
    """A file and a socket, where an engine's libraries put theirs; where that is."""
    base = os.environ["ITS_OWN_BASE"]
    os.close(tempfile.mkstemp(prefix="vllm_dist_")[0])
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(f"{base}/{uuid.UUID(int=0)}")
    return {"tmp": tempfile.gettempdir(), "base": base, "mode": os.stat(base).st_mode & 0o777}


def main() -> None:
    """``… LISTENER_FD LIFELINE_FD CONFIG.json``, as every worker is started."""
    listener = socket.socket(fileno=int(sys.argv[-3]))
    config = msgspec.json.decode(Path(sys.argv[-1]).read_bytes())
    time.sleep(float(os.environ.get("LIAR_START_S") or config.get("start_s", 0.0)))
    peer, _ = listener.accept()
    if refusal := config.get("refuse"):
        peer.sendall(framed(Failure(0, refusal, fatal=True)))
        return
    peer.sendall(framed(msgspec.structs.replace(READY, resolved=litter()) if config.get("litter") else READY))
    stream = peer.makefile("rb")
    while not config.get("deaf") and (head := stream.read(4)):
        request = decode_request(stream.read(*struct.unpack("<I", head)))
        match config.get("answer", "honest"):
            case "honest":
                peer.sendall(framed(honest(request)))
            case "garbage":
                peer.sendall(framed(b"\xc1 no msgpack"))
            case "silence":
                pass
            case "death":
                os.kill(os.getpid(), signal.SIGBUS)
    time.sleep(3600)


if __name__ == "__main__":
    main()
