"""``lockstep report --live``: who is served and what, a run that grows meanwhile, and its end."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import psutil
import pytest

from lockstep.cli.main import app
from lockstep.errors import UsageError
from lockstep.report import live
from lockstep.report.build import of_run
from lockstep.report.live import HEADERS, Followed, serving
from lockstep.report.page import page
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import open_run
from lockstep.runs.record import open_recorder
from tests.report import made

CALL_S = 10.0


@pytest.fixture
def layout(tmp_path):
    return made.run(tmp_path / "run", steps=2)


@pytest.fixture
def followed(layout):
    return Followed(layout.root)


@pytest.fixture
def address(followed):
    with serving(followed) as url:
        yield urlsplit(url)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """One that nothing happens to, and its address."""
    layout = made.run(tmp_path_factory.mktemp("fixed") / "run", steps=2)
    with serving(Followed(layout.root)) as url:
        yield layout, urlsplit(url)


@pytest.fixture(scope="module")
def still(fixed):
    return fixed[1]


def ask(address, path=None, method="GET", host=None, extra=()):
    """Status, headers and body."""
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=CALL_S)
    connection.putrequest(method, path or address.path, skip_host=True)
    for name, value in (("Host", host or address.netloc), *extra):
        if value != "none":
            connection.putheader(name, value)
    connection.endheaders()
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply.status, dict(reply.getheaders()), body


def state(address):
    return json.loads(ask(address, f"{address.path}state.json")[2])


def test_the_address_has_a_token_and_is_this_machines_alone(fixed):
    layout, still = fixed
    assert (still.scheme, still.hostname) == ("http", "127.0.0.1")
    assert re.fullmatch(r"/[\w-]{43}/", still.path), "256 bits"
    with serving(Followed(layout.root)) as other:
        assert urlsplit(other).path != still.path
    listening = [
        tuple(one.laddr)
        for one in psutil.Process().net_connections("all")
        if one.family in (socket.AF_INET, socket.AF_INET6) and one.status == psutil.CONN_LISTEN
    ]
    assert [where for where in listening if where[1] == still.port] == [("127.0.0.1", still.port)]
    assert urlsplit(other).port not in [port for _, port in listening], "it was closed"


def test_the_page_is_the_static_one_and_asks_its_own_server_alone(fixed):
    layout, still = fixed
    status, headers, body = ask(still)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert HEADERS.items() <= headers.items()
    assert not {"Server", "Access-Control-Allow-Origin", "Set-Cookie"} & headers.keys()
    (policy,) = re.findall(r'Security-Policy" content="([^"]*)"', body.decode())
    assert "connect-src 'self'" in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    static = page(of_run(open_run(layout.root)))
    assert "connect-src" not in static
    assert "fetch(" not in static

    def shown(html):
        main = re.sub(r'<p id="live".*?</p>', "", html.partition("<main")[2])
        return main.partition("<script>")[0]

    assert shown(body.decode()) == shown(static)


@pytest.mark.parametrize(
    "path", ["/", "//", "/wrong/", "/wrong/state.json", "/../etc/passwd", "http://127.0.0.1/", "/%00/", "*"]
)
def test_without_the_token_nothing_is_said(still, path):
    for method in ("GET", "HEAD", "POST", "OPTIONS"):
        assert (ask(still, path, method)[0], ask(still, path, method)[2]) == (403, b"")


def test_a_token_cut_short_or_gone_on_with_is_none(still):
    token = still.path.strip("/")
    for wrong in (token[:-1], token + "x", token.swapcase(), f"{token}%20", f"x/{token}", f"?{token}"):
        assert ask(still, f"/{wrong}/")[0] == 403
    assert ask(still, f"/{token}")[0] == 404
    assert ask(still, f"/{token}/?x=/")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "0.0.0.0", "[::1", "a b", "", "none", "127.1"]
)
def test_another_host_is_refused_for_a_name_can_be_made_to_point_here(still, host):
    found = ask(still, host=host or " ")
    assert (found[0], found[2]) == (403, b"")


def test_two_hosts_are_none_and_a_forwarded_port_is_fine(still):
    assert ask(still, extra=(("Host", "evil.example"),))[0] == 403
    for host in ("localhost:8080", "127.0.0.1", "[::1]:9"):
        assert ask(still, host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"])
def test_what_would_change_something_is_refused(still, method):
    status, headers, body = ask(still, method=method)
    assert (status, headers["Allow"], body) == (405, "GET, HEAD", b"")
    assert ask(still, method="HEAD")[2] == b""
    assert ask(still, method="HEAD")[0] == 200


@pytest.mark.parametrize(
    "name", ["../manifest.json", "manifest.json", "..%2fmanifest.json", "/etc/passwd", "."]
)
def test_no_file_is_reached_by_its_name(still, name):
    found = ask(still, still.path + name)
    assert (found[0], found[2]) == (404, b"")


def test_what_is_no_request_ends_without_a_word_and_others_are_served_meanwhile(still, capsys):
    with socket.create_connection((still.hostname, still.port), CALL_S) as slow:
        slow.sendall(b"GET /")
        assert ask(still)[0] == 200
        slow.sendall(b"\xff\xfe\x00 x y z\r\n\r\n")
        assert still.path.encode() not in slow.recv(1 << 16)
    with socket.create_connection((still.hostname, still.port), CALL_S) as gone:
        gone.sendall(f"GET {still.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert ask(still)[0] == 200
    assert capsys.readouterr() == ("", "")


def test_a_run_that_grows_is_shown_as_it_is_but_for_a_line_half_written(layout, followed, address):
    with layout.held():
        followed.look()
        assert state(address) == {"version": 0, "words": "Live: 2 of 12 steps are trained."}
        open_recorder(layout).step(2, 3, {"reward_mean": 0.625})
        followed.look()
        assert state(address) == {"version": 1, "words": "Live: 3 of 12 steps are trained."}
        assert "3 steps were trained" in ask(address)[2].decode()
        followed.look()
        assert state(address)["version"] == 1, "nothing changed"
        line = layout.metrics.read_bytes().splitlines(keepends=True)[-1].replace(b'"step":2', b'"step":3')
        for part, trained in ((line[:40], 3), (line[40:], 4)):
            with layout.metrics.open("ab") as file:
                file.write(part)
            followed._rest_until = 0.0
            followed.look()
            assert state(address)["words"] == f"Live: {trained} of 12 steps are trained."
        assert 'data-version="3"' in ask(address)[2].decode()


def test_rendering_takes_a_tenth_of_the_time(layout, followed, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    read = followed._read

    def slowly():
        now[0] += 5.0
        return read()

    monkeypatch.setattr(followed, "_read", slowly)
    rendered = []
    for step in range(2, 102):
        open_recorder(layout).step(step, step + 1, {"reward_mean": 0.5})
        before = now[0]
        followed.look()
        rendered.append(now[0] > before)
        now[0] += 1.0
    assert 2 <= sum(rendered) <= 3
    assert rendered[0]


def test_a_damaged_line_is_said_and_what_was_read_stays(layout, followed, address):
    with layout.verdicts.open("ab") as file:
        file.write(b"<script>\n")
    followed.look()
    said = state(address)
    assert "Shown is what was there before" in said["words"]
    assert "verdicts.jsonl" in said["words"]
    assert "2 steps were trained" in ask(address)[2].decode()


def test_its_end_is_said_and_told_from_one_before_its_last_step(layout, followed, monkeypatch):
    said = []

    def stop(_):
        raise KeyboardInterrupt

    with layout.held():
        followed.look()
        assert followed.words.startswith("Live: ")
        for step in range(2, 11):
            open_recorder(layout).step(step, step + 1, {"reward_mean": 0.5})
    followed.look()
    assert followed.words.startswith("Nothing is at this run any more: 11 of 12 steps are trained.")
    assert f"lockstep train --resume {layout.root}" in followed.words
    open_recorder(layout).step(11, 12, {"reward_mean": 0.5})
    followed._rest_until = 0.0
    followed.look()
    monkeypatch.setattr(live.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        followed.follow(said.append)
    assert said == ["The run has ended: 12 of 12 steps are trained. Ctrl-C ends this."]


def test_a_run_that_a_proof_stopped_is_not_said_to_go_on(tmp_path):
    followed = Followed(made.run(tmp_path / "run", steps=0, failed=True).root)
    assert followed.words == "Nothing is at this run any more: 0 of 12 steps are trained."
    assert b"The cause is raw logprobs" in followed.shown[""][1]


def test_a_run_that_has_no_manifest_yet_is_waited_for(tmp_path):
    source = made.run(tmp_path / "made" / "run", steps=1)
    begun = RunLayout(tmp_path / "run")
    begun.root.mkdir()
    with pytest.raises(UsageError, match=r"no manifest\.json"):
        Followed(begun.root)
    with begun.held():
        followed = Followed(begun.root)
        assert followed.words == "Live."
        os.rename(source.metrics, begun.metrics)
        os.rename(source.manifest, begun.manifest)
        followed.look()
        assert followed.words == "Live: 1 of 12 steps are trained."


def test_looking_keeps_nobody_from_a_run(layout):
    assert not layout.at_work()
    with layout.held():
        assert layout.at_work()
        with pytest.raises(UsageError), layout.held():
            pass
    assert not layout.at_work()
    assert not RunLayout(layout.root / "absent").at_work()


def begin(*args):
    # Where the tests run in the background of a shell, the interrupt is ignored from the start.
    return subprocess.Popen(
        [sys.executable, "-m", "lockstep.cli.main", "report", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_ends_it_and_nothing_listens_or_lies_there_after(layout):
    there = {path: path.stat().st_mtime_ns for path in layout.root.rglob("*")}
    process = begin("--live", layout.root)
    address = urlsplit(process.stdout.readline().strip())
    with socket.create_connection((address.hostname, address.port), CALL_S):  # a request that never comes
        assert ask(address)[0] == 200
        open_files = psutil.Process(process.pid).net_connections("inet")
        assert [tuple(one.laddr) for one in open_files if one.status == psutil.CONN_LISTEN] == [
            ("127.0.0.1", address.port)
        ]
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=CALL_S)
    assert time.monotonic() - began < 5.0
    assert (process.returncode, output) == (130, "")
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted"
    assert address.path not in errors
    with pytest.raises(ConnectionRefusedError):
        ask(address)
    assert {path: path.stat().st_mtime_ns for path in layout.root.rglob("*")} == there


@pytest.mark.parametrize("more", [["--json"], ["--out", "elsewhere"], ["--port", "taken"]])
def test_flags_that_do_not_go_together_and_a_port_that_is_taken_are_usage(fixed, more):
    layout, still = fixed
    args = [str(still.port) if one == "taken" else one for one in more]
    with pytest.raises(UsageError, match=r"flag --(live|port)"):
        app(["report", "--live", str(layout.root), *args], standalone_mode=False)
