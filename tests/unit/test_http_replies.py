"""What a server may answer.

Every field within its bounds, every wait and every body with an end, a refusal with its field.
"""

import json
import resource
import threading
import time

import numpy as np
import pytest

from lockstep.cli.console import OBEYED, printable
from lockstep.engines.openai_http.replies import CompletionsReply, completion_bytes, decode
from lockstep.errors import EngineDied, EngineError, LockstepError, UsageError
from lockstep.records.tokens import FLOAT32
from tests.hostile_http import VOCABULARY, ask, completions, engine_on, held, hostile_bodies, raw_server

PARAMETERS = "worker.parameter_dtype"


@pytest.fixture
def server():
    with raw_server() as server:
        yield server


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    return path


@pytest.fixture
def engine(server, model_path):
    engine = engine_on(server.url, model_path)
    yield engine
    engine.close()


def body_of(reply) -> bytes:
    return reply if isinstance(reply, bytes) else json.dumps(reply).encode()


LOGPROBS = {"tokens": ["token_id:7"] * 3, "token_logprobs": [-0.5, -1.5, -2.5]}
REFUSED = [
    (b"<html>\x1b[2Jnot found</html>", "'<html>", "JSON"),
    (b"", "got ''", "JSON"),
    (b"[]", r"got '\[\]'", "`object`"),
    ({}, "got '{}'", "the field `choices`"),
    ({"choices": [{}, {"index": 1}]}, r"field choices\[0\]: got '{}'", "the field `index`"),
    (completions(index="0"), r"field choices\[0\].index: got '\"0\"'", "`int`"),
    (completions(index=99), r"indices '\[1, 99\]'", "each of 0 to 1 once"),
    (completions(index=1), r"indices '\[1, 1\]'", "each of 0 to 1 once"),
    (completions(token_ids=["7", 8, 9]), r"field choices\[0\].token_ids\[0\]: got '\"7\"'", "`int`"),
    (completions(token_ids=[7, -5, 9]), r"field choices\[0\].token_ids\[1\]: got '-5'", "`int` >= 0"),
    (completions(token_ids=[7, 2**40, 9]), r"token_ids\[1\]: got '1099511627776'", "<= 2147483647"),
    (completions(token_ids=[7, 8, 97]), "got token id 97", "below 97"),
    (completions(token_ids=[7] * 1000), "1000 tokens in choice 0", "at most 3"),
    (
        completions(token_ids=None, logprobs=LOGPROBS | {"tokens": ["token_id:²"] * 3}),
        "without token ids",
        "return_token_ids",
    ),
    (
        completions(token_ids=None, logprobs=LOGPROBS | {"tokens": [f"token_id:{2**31}"] * 3}),
        "without token ids",
        "return",
    ),
    (
        completions(logprobs=LOGPROBS | {"token_logprobs": [-1, "-1", -1]}),
        r"token_logprobs\[1\]: got '\"-1\"'",
        "`float",
    ),
    (
        completions(logprobs=LOGPROBS | {"token_logprobs": [-1, -1]}),
        "2 log-probabilities",
        "one for each of 3",
    ),
    (
        completions() | {"usage": {"prompt_tokens": "many"}},
        r"field usage.prompt_tokens: got '\"many\"'",
        "`int",
    ),
    (b"[" * 10**6, r"got '\[\[\[", "`object`"),
    (b'{"x":' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested without end", "not nested so deeply"),
]


@pytest.mark.parametrize(("reply", "got", "expected"), REFUSED)
def test_a_reply_out_of_bounds_is_refused_with_its_field(engine, server, reply, got, expected):
    server.bodies["/v1/completions"] = body_of(reply)
    with pytest.raises(EngineError, match=got) as caught:
        ask(engine)
    assert expected in caught.value.expected
    assert type(caught.value) is EngineError
    assert len(caught.value.got) < 300
    # Asked again, it would answer the same.
    assert sum(path == "/v1/completions" for path, _, _ in server.seen) == 1


@pytest.mark.parametrize(
    ("path", "reply", "got"),
    [
        ("/v1/models", b"<html>", "<html>"),
        ("/v1/models", b'{"data": []}', r"field data: got '\[\]'"),
        ("/v1/models", b'{"data": [{"id": 5}]}', r"data\[0\].id: got '5'"),
        ("/v1/models", b'{"data": [{"id": "m", "max_model_len": "long"}]}', "max_model_len: got '\"long\"'"),
        ("/version", b"[]", r"got '\[\]'"),
    ],
)
def test_what_it_says_of_itself_is_checked_too(server, path, reply, got):
    server.bodies[path] = reply
    with pytest.raises(EngineError, match=got):
        engine_on(server.url)


def test_literals_that_are_no_json_are_missing_numbers(engine, server):
    text = json.dumps(
        completions(text='NaN and \\" Infinity', logprobs=LOGPROBS | {"token_logprobs": [1, 2, 3]})
    )
    server.bodies["/v1/completions"] = text.replace("[1, 2, 3]", "[NaN, -Infinity, -0.25]").encode()
    first, second = ask(engine)
    assert (first.missing, second.missing) == (2, 0)
    assert np.frombuffer(first.logprobs, FLOAT32)[2] == -0.25


def test_an_endless_body_is_read_no_further_than_what_was_asked_for(engine, server):
    sent = [0]
    ended = threading.Event()
    limit = completion_bytes(2, 3, 2)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while sent[0] < 2**28:
                handler.wfile.write(b" " * 65536)
                sent[0] += 65536
        finally:
            ended.set()

    server.handlers["/v1/completions"] = endless
    with pytest.raises(EngineError, match=f"more than {limit} bytes"):
        ask(engine)
    assert ended.wait(5)
    assert limit <= sent[0] + 65536
    assert sent[0] < limit + 2**26  # what the sockets hold


def test_a_dripping_reply_does_not_outlive_its_time(server):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    server.handlers["/v1/completions"] = drip
    engine = engine_on(server.url, timeout_s=0.4, retries=4)
    began = time.perf_counter()
    with pytest.raises(EngineDied, match=r"no whole answer in 0\.4 s"):
        ask(engine)
    assert time.perf_counter() - began < 2.0
    engine.close()


def test_a_compressed_body_is_refused_before_it_is_large(engine, server):
    server.handlers["/v1/completions"] = lambda handler: handler.answer(b"\x1f\x8b", Content_Encoding="gzip")
    with pytest.raises(EngineError, match="compressed with 'gzip'"):
        ask(engine)


def test_a_redirect_is_not_followed_with_the_key(engine, server):
    server.handlers["/v1/completions"] = lambda handler: handler.answer(
        b"", 307, Location="http://127.0.0.1:9/"
    )
    with pytest.raises(EngineError, match="status 307"):
        ask(engine)


def test_a_wait_that_is_no_number_is_none(server):
    server.handlers["/v1/completions"] = lambda handler: handler.answer(b"", 503, Retry_After="\u00b2")
    engine = engine_on(server.url, retries=1)
    with pytest.raises(EngineError, match="status 503"):
        ask(engine)
    engine.close()


def test_what_server_info_does_not_say_is_unknown_and_never_the_recipes(server):
    for body, dtype in [
        (None, None),
        (b"<html>", None),
        (b'{"vllm_config": {"model_config": {"dtype": "torch.bfloat16"}}}', "torch.bfloat16"),
        (b'{"vllm_config": {"model_config": {"dtype": "torch.owned"}}}', None),
        (b'{"vllm_config": "text"}', None),
        (
            (
                b'{"vllm_config": {"model_config": {}, '
                b'"worker": {"parameter_dtype": "torch.owned"}, "hf_config": {"x": 1}}}'
            ),
            None,
        ),
    ]:
        if body is not None:
            server.bodies["/server_info"] = body
        engine = engine_on(server.url)
        assert engine.ready.resolved.get(PARAMETERS) == dtype
        assert engine.ready.capabilities["resolved_config"].supported == (
            body is not None and b'"dtype"' in body
        )
        assert not [
            name
            for name in engine.ready.resolved
            if name.startswith(("worker.", "hf_")) and name != PARAMETERS
        ]
        engine.close()


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:99999", "http://127.0.0.1:x", "ftp://127.0.0.1", "127.0.0.1:8000", "http://",
     "http://a b", "http://[::1", "http://x..y", "http://\u0430.example", "", "http://127.0.0.1/?k=v",
     "http:///v1", "http://u:p@127.0.0.1:1", "http://h\n"],
)  # fmt: skip
def test_a_malformed_url_is_usage_at_once(url):
    began = time.perf_counter()
    with pytest.raises(UsageError, match=r"engine\.options\.base_url"):
        engine_on(url, retries=4)
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    "option", [{"timeout_s": -1.0}, {"retries": -1}, {"max_connections": 0}, {"connect_timeout_s": 0.0}]
)
def test_options_have_bounds(option):
    with pytest.raises(UsageError, match=next(iter(option))):
        engine_on("http://127.0.0.1:9", **option)


def judge(engine, body: bytes) -> str:
    """How one hostile body ended: accepted, or refused; anything else raises."""
    began = time.perf_counter()
    refusal = None
    try:
        held(ask(engine))
    except LockstepError as error:
        refusal = str(error)
    assert time.perf_counter() - began < 10.0, body[:200]
    if refusal is None:
        return "accepted"
    assert not OBEYED.search(printable(refusal))
    assert len(refusal) < 2000
    return "refused"


def fuzz_decode(engine, n: int, seed: int) -> dict[str, int]:
    """Through the decoder and every check behind it, without a socket."""
    current = [b""]

    async def answered(path, kind, limit, body=None):
        assert len(current[0]) <= limit  # else the exchange would not have read it
        return decode(current[0], kind, path)

    engine._exchange.ask = answered
    found = {"accepted": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for current[0] in hostile_bodies(n, seed):
        found[judge(engine, current[0])] += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    return found


def fuzz_loopback(engine, server, n: int, seed: int) -> dict[str, int]:
    """The same through a socket."""
    found = {"accepted": 0, "refused": 0}
    for body in hostile_bodies(n, seed):
        server.bodies["/v1/completions"] = body
        found[judge(engine, body)] += 1
    return found


def test_hostile_bodies_are_refused_or_are_what_was_asked_for(engine):
    found = fuzz_decode(engine, 1500, 1)
    assert found["refused"] > 700
    assert found["accepted"] > 100  # what was mutated may be what nobody reads


def test_hostile_bodies_over_a_socket(engine, server):
    found = fuzz_loopback(engine, server, 300, 2)
    assert found["refused"] > 150


def test_the_honest_reply_is_accepted(engine, server):
    server.bodies["/v1/completions"] = body_of(completions())
    held(ask(engine))
    assert decode(body_of(completions()), CompletionsReply, "x").choices[0].token_ids == [7, 8, 9]
