"""The HTTP engine against a server here that misbehaves on purpose; the contract suite has the real ones."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from lockstep.cli.console import OBEYED, printable
from lockstep.engines.base import EngineSpec
from lockstep.engines.openai_http import connect
from lockstep.errors import CapabilityError, EngineDied, EngineError, UsageError
from lockstep.parity.explain.semantics.prompt_edits import miscounted_prompts
from lockstep.records.samples import Samples
from lockstep.records.tokens import FLOAT32, INT32, SamplingParams
from lockstep.records.versions import WeightUpdate

KEY = "secret-of-the-test"


class Server(ThreadingHTTPServer):
    """Answers every completion with its prompt's first token + 1, + 2, …; ``trouble`` may act before."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble = lambda number, body: None
        self.edit = lambda choice: choice
        self.inserted = self.paused = 0
        self.owner = "vllm"
        self.bodies = []
        self.keys_seen = []
        self.busy = 0
        self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, body, status=200, headers=None):
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        known = {
            "/v1/models": {"data": [{"id": "m", "owned_by": self.server.owner, "max_model_len": 64}]},
            "/version": {"version": "9.9"},
        }
        body = known.get(self.path.partition("?")[0])
        self.reply(body or {}, 200 if body else 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.keys_seen.append(self.headers.get("Authorization"))
            number = len(server.bodies)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            trouble = server.trouble(number, body)
            if server.paused:
                server.paused -= 1
                self.reply({"error": {"message": "Engine is paused", "code": "engine_paused"}}, 503)
            elif trouble == "drop":
                self.connection.close()
            elif trouble is not None:
                self.reply({"error": f"trouble {trouble}"}, trouble)
            else:
                first = body["prompt"][0]
                length = body["max_tokens"]
                choice = {
                    "finish_reason": "length",
                    "token_ids": [first + 1 + at for at in range(length)],
                    "logprobs": {
                        "tokens": [f"token_id:{first + 1 + at}" for at in range(length)],
                        "token_logprobs": [-1.5] * length,
                    },
                }
                choices = [
                    server.edit(choice | {"index": index}) for index in reversed(range(body.get("n", 1)))
                ]
                self.reply(
                    {"choices": choices, "usage": {"prompt_tokens": len(body["prompt"]) + server.inserted}}
                )
        finally:
            with server.lock:
                server.busy -= 1


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def spec_of(options):
    return EngineSpec(
        model_path=Path(),
        dtype="float32",
        head_dtype="float32",
        max_model_len=64,
        options=options,
        weights_dir=Path(),
        log_path=Path(),
    )


def engine_of(server, **options):
    return connect(spec_of({"base_url": server.url, "distribution": "sampler"} | options))


@pytest.fixture
def engine(server, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_API_KEY", KEY)
    engine = engine_of(server)
    yield engine
    engine.close()


def rows(n):
    return [np.array([1000 * (row + 1), 5], np.int32) for row in range(n)]


def sample(engine, rows_n, **sampling):
    return engine.sample(rows(rows_n), [SamplingParams(**({"max_tokens": 3} | sampling))] * rows_n)


def firsts(found):
    return [int(np.frombuffer(c.token_ids, INT32)[0]) for c in found]


def test_each_answer_goes_to_its_prompt_and_sample(engine):
    found = sample(engine, 20, n=2)
    assert [(c.prompt_index, c.sample_index) for c in found] == [(p, s) for p in range(20) for s in range(2)]
    assert firsts(found) == [1000 * (p + 1) + 1 for p in range(20) for _ in range(2)]


def test_a_paused_server_is_asked_until_it_goes_on_however_many_tries_that_takes(engine, server, monkeypatch):
    monkeypatch.setattr("lockstep.engines.openai_http.exchange.FIRST_DELAY_S", 0.001)
    server.paused = 12
    assert engine.options.retries < server.paused
    (handle,) = engine.submit(rows(1), [SamplingParams(max_tokens=3, n=2)])
    assert firsts(handle.result(30)) == [1001, 1001]
    assert server.paused == 0


def test_a_server_that_stays_paused_is_waited_for_until_the_deadline(server, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_API_KEY", KEY)
    monkeypatch.setattr("lockstep.engines.openai_http.exchange.FIRST_DELAY_S", 0.001)
    with contextlib.closing(engine_of(server, timeout_s=1.0)) as engine:
        server.paused = 10**6
        (handle,) = engine.submit(rows(1), [SamplingParams(max_tokens=3)])
        with pytest.raises(EngineError, match="engine_paused"):
            handle.result(30)


@pytest.mark.parametrize("trouble", [503, 429, "drop"])
def test_a_retry_repeats_work_and_counts_nothing_twice(engine, server, trouble):
    seen = set()

    def once(number, body):
        prompt = body["prompt"][0]
        if prompt in seen:
            return None
        seen.add(prompt)
        return trouble

    server.trouble = once
    found = sample(engine, 6)
    assert firsts(found) == [1000 * (p + 1) + 1 for p in range(6)]
    assert len(server.bodies) == 12


def test_every_sampling_field_is_sent_so_that_no_generation_config_fills_it(engine, server):
    sample(engine, 1)
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    neutral |= {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    assert neutral.items() <= server.bodies[0].items()


def test_clamped_null_and_non_finite_values_are_missing(engine, server):
    server.edit = lambda choice: choice | {"logprobs": {"token_logprobs": [-9999.0, None, -2.0]}}
    (found,) = sample(engine, 1)
    values = np.frombuffer(found.logprobs, FLOAT32)
    assert found.missing == 2
    assert np.isnan(values[:2]).all()
    assert values[2] == -2.0


def test_token_ids_in_the_tokens_own_names_will_do_and_text_will_not(engine, server):
    server.edit = lambda choice: {key: value for key, value in choice.items() if key != "token_ids"}
    assert firsts(sample(engine, 2)) == [1001, 2001]
    server.edit = lambda choice: {
        **choice,
        "token_ids": None,
        "logprobs": {"tokens": ["a", "b", "c"], "token_logprobs": [-1] * 3},
    }
    with pytest.raises(EngineError, match="token ids"):
        sample(engine, 1)


def test_a_completion_that_ended_at_once_is_empty_where_the_stop_token_is_left_out(engine, server):
    empty = {"token_ids": [], "finish_reason": "stop", "logprobs": {"tokens": [], "token_logprobs": []}}
    server.edit = lambda choice: choice | empty
    (found,) = sample(engine, 1)
    assert (found.token_ids, found.logprobs, found.finish_reason) == (b"", b"", "stop")
    server.edit = lambda choice: choice | empty | {"finish_reason": "length"}
    with pytest.raises(EngineError, match="token ids"):
        sample(engine, 1)


def test_prompts_that_the_server_counts_otherwise_were_edited(engine, server):
    drawn = [Samples.of(rows(3), sample(engine, 3), SamplingParams(max_tokens=3))]
    server.inserted = 9
    drawn.append(Samples.of(rows(3), sample(engine, 3), SamplingParams(max_tokens=3)))
    assert miscounted_prompts(drawn[0]) is None
    told = miscounted_prompts(drawn[1])
    assert told is not None
    assert told.cause == "prompt_edited"
    assert "11 where 2 were sent" in told.evidence


def test_fewer_choices_or_logprobs_than_asked_for_are_refused(engine, server):
    server.edit = lambda choice: choice | {"logprobs": {"token_logprobs": [-1.0]}}
    with pytest.raises(EngineError, match="1 log-probabilities"):
        sample(engine, 1)


def test_the_key_is_sent_and_written_nowhere(engine, server):
    sample(engine, 1)
    assert server.keys_seen[0] == f"Bearer {KEY}"
    assert KEY not in repr(engine.ready)


def test_a_refusal_is_usage_and_is_not_tried_again(engine, server):
    server.trouble = lambda number, body: 401
    with pytest.raises(UsageError, match="api_key_env"):
        sample(engine, 1)
    assert len(server.bodies) == 1


def test_no_more_connections_than_asked_for(server):
    engine = engine_of(server, max_connections=3)
    server.trouble = lambda number, body: time.sleep(0.05)
    assert len(sample(engine, 12)) == 12
    assert server.busiest <= 3
    engine.close()


def test_a_slow_answer_is_given_up_and_a_dead_server_is_named(server):
    engine = engine_of(server, timeout_s=0.2, retries=1)
    patient = engine_of(server, retries=1)
    server.trouble = lambda number, body: time.sleep(1.0)
    with pytest.raises(EngineDied, match=r"no whole answer in 0\.2 s"):
        sample(engine, 1)
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineDied, match="after 2 tries"):
        sample(patient, 1)
    for each in (engine, patient):
        each.close()


def test_what_http_cannot_do_is_refused_with_the_reason(engine):
    with pytest.raises(CapabilityError, match="no weights"):
        engine.load(WeightUpdate(1, "x"))
    with pytest.raises(CapabilityError, match="T = 1"):
        engine.score(rows(1), temperature=0.5)


@pytest.mark.parametrize("setting", [{"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}], ids=str)
def test_a_server_that_is_not_vllm_is_sent_no_field_that_it_would_ignore(server, setting):
    server.owner = "another"
    engine = engine_of(server)
    with pytest.raises(CapabilityError, match="not a vLLM server"):
        sample(engine, 1, **setting)
    assert not server.bodies
    assert firsts(sample(engine, 1, presence_penalty=0.5, seed=3)) == [1001]
    assert server.bodies[0]["presence_penalty"] == 0.5
    engine.close()


def test_an_unknown_option_and_a_missing_url_are_usage(server):
    with pytest.raises(UsageError, match="base_urll"):
        engine_of(server, base_urll="x")
    with pytest.raises(UsageError, match="base_url"):
        connect(spec_of({}))


OK = b"HTTP/1.1 200 OK\r\n"
HEADS = [
    b"",
    b"\x00\xff\x1b[2J" * 40,
    b"SSH-2.0-x\r\n",
    b"HTTP/1.1 2OO OK\r\n\r\n",
    b"HTTP/9.9 200 OK\r\n\r\n",
    b"HTTP/1.1 200 \x1b]0;x\x07\r\n\r\n",
    OK + b"X: " + b"a" * 200_000,
    OK + b"Content-Length: -5\r\n\r\n{}",
    OK + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    OK + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    OK + b"Content-Type: text/html; charset=\xff\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("head", HEADS)
def test_what_is_no_http_is_an_error_that_names_the_server(head):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with contextlib.suppress(OSError):
                peer, _ = listener.accept()
                with peer:
                    peer.recv(65536)
                    peer.sendall(head)

        thread = threading.Thread(target=answer)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(EngineError, match=f"engine at http://127.0.0.1:{port}/v1/models") as caught:
            connect(spec_of({"base_url": f"http://127.0.0.1:{port}", "retries": 0, "timeout_s": 5.0}))
        assert not OBEYED.search(printable(str(caught.value)))
        thread.join()
