"""A server whose replies are whatever a test wants, and a supply of replies that no honest server writes."""

import contextlib
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from lockstep.engines.base import EngineSpec
from lockstep.engines.openai_http import OpenAIHttpEngine, connect
from lockstep.records.tokens import INT32, SamplingParams

ABOUT = {
    "/v1/models": b'{"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 64}]}',
    "/version": b'{"version": "9.9"}',
}
N, TOKENS, VOCABULARY = 2, 3, 97
PROMPT = np.array([5, 6], np.int32)


class RawServer(ThreadingHTTPServer):
    """Answers a path with the bytes in ``bodies``, or as ``handlers`` says; what came in is in ``seen``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies = dict(ABOUT)
        self.handlers = {}
        self.seen = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A peer that hangs up is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.seen.append((path, dict(self.headers), sent))
        if path in self.server.handlers:
            self.server.handlers[path](self)
            return
        body = self.server.bodies.get(path)
        self.answer(body if body is not None else b"{}", 200 if body is not None else 404)

    do_POST = do_GET  # noqa: N815

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def raw_server() -> Iterator[RawServer]:
    server = RawServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def engine_on(url: str, model_path: Path = Path(), **options) -> OpenAIHttpEngine:
    spec = EngineSpec(
        model_path=model_path,
        dtype="float32",
        head_dtype="float32",
        max_model_len=64,
        options={"base_url": url, "distribution": "sampler", "retries": 0} | options,
        weights_dir=Path(),
        log_path=Path(),
    )
    return connect(spec)


def completions(**changes) -> dict:
    """An honest reply to N samples of TOKENS tokens; the first choice has ``changes``."""
    honest = {
        "index": 0,
        "text": "a b c",
        "finish_reason": "length",
        "token_ids": [7, 8, 9],
        "logprobs": {
            "tokens": ["token_id:7", "token_id:8", "token_id:9"],
            "token_logprobs": [-0.5, -1.5, -2.5],
        },
    }
    return {"id": "x", "choices": [honest | changes, honest | {"index": 1}], "usage": {"prompt_tokens": 2}}


def ask(engine: OpenAIHttpEngine):
    return engine.sample([PROMPT], [SamplingParams(max_tokens=TOKENS, n=N)])


def held(found) -> None:
    """What was accepted is what was asked for."""
    assert [(c.prompt_index, c.sample_index) for c in found] == [(0, 0), (0, 1)]
    for completion in found:
        ids = np.frombuffer(completion.token_ids, INT32)
        values = np.frombuffer(completion.logprobs, "<f4")
        assert ids.size == values.size <= TOKENS
        assert ((ids >= 0) & (ids < VOCABULARY)).all()
        assert completion.missing == int(np.isnan(values).sum())
        assert not np.isinf(values).any()


SCALARS = [
    None, True, False, 0, -1, 1, 2, 3, 96, 97, 99, 2**31 - 1, 2**31, 2**40, 2**64, -(2**63), 10**30,
    0.5, -1e300, 1e300, 1e-320, -9999.0,
    "", "5", "token_id:5", "token_id:²", "token_id:" + "9" * 500, "\x1b]0;x\x07", "\x9b2J\u202e", "x" * 600,
    float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
WHOLE = [
    b"", b"null", b"[]", b"{}", b"0", b'""',
    b"<!DOCTYPE html><html><body>\x1b[2J502 Bad Gateway</body></html>",
    b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b'{"choices": []}', b'{"choices": null}', b'{"choices": {}}',
    b'{"choices": [null, null]}',
    b"[" * 200_000, b'{"choices":' * 50_000, b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b', "choices": []}',
    b'{"choices": [' + b'{"index": 0},' * 20_000 + b"{}]}", b'{"choices": "' + b"\\" * 99_999,
    b'"' + b'\\"' * 100_000, b'{"choices": [{"index": 1e0}, {"index": 1}]}', b'{"choices": [{"index": 00}]}',
    b"data: {}\n\ndata: [DONE]\n\n",
]  # fmt: skip


def hostile_bodies(n: int, seed: int) -> Iterator[bytes]:
    """The whole replies above, then honest ones with something replaced, taken out, repeated or damaged."""
    rng = random.Random(seed)
    yield from WHOLE[:n]
    for _ in range(n - len(WHOLE)):
        document = completions()
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            _mutate(document, rng)
        body = json.dumps(document, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
        yield _damage(body, rng) if rng.random() < 0.4 else body


def _mutate(document: dict, rng: random.Random) -> None:
    places = list(_places(document))
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.5:
        holder[key] = rng.choice(SCALARS)
    elif kind < 0.65:
        del holder[key]
    elif kind < 0.75:
        holder[key] = [holder[key]] * rng.choice((0, 1, 2, 40))
    elif kind < 0.85:
        holder[key] = (
            {"a": holder[key]}
            if rng.random() < 0.5
            else [rng.choice(SCALARS) for _ in range(rng.randrange(6))]
        )
    elif isinstance(holder, list):
        holder.extend([rng.choice(SCALARS)] * rng.choice((1, 3, 100)))
    else:
        holder[rng.choice(("token_ids", "index", "choices", "logprobs", "prompt_logprobs", "usage"))] = (
            rng.choice(SCALARS)
        )


def _places(node) -> Iterator[tuple]:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def _damage(body: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(body))
    return rng.choice(
        (
            body[:at],
            body[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + body[at + 1 :],
            body[:at]
            + rng.choice((b"NaN", b"-Infinity", b"\x00", b"\x1b[2J", b"}" * 9, b"," * 9))
            + body[at:],
            body[:at] + b"[" * rng.choice((10, 5000)) + body[at:],
            body + body,
        )
    )
