"""A run followed in a real browser: what is new appears in place, its end is said, a token is needed."""

import json
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from lockstep.report.live import Followed, serving
from lockstep.runs.record import open_recorder
from tests.report import made
from tests.report.browser import CALL_S, CHROMIUM, DRIVER, MISSING, browser, keep

WORDS = "return document.querySelector('#live').textContent"
MAIN = "return document.querySelector('main').textContent"

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)


@pytest.fixture(scope="module")
def session():
    with browser() as opened:
        yield opened


def urls(session):
    asked = [json.loads(entry["message"])["message"] for entry in session.log("performance")]
    sent = (one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent")
    return {url for url in sent if not url.startswith("data:")}


def test_a_page_that_follows_takes_what_is_new_and_leaves_the_rest_as_it_is(session, tmp_path):
    layout = made.run(tmp_path / "run", steps=2)
    session.looks(1440, "light")
    session.log("performance")
    session.log("browser")
    followed = Followed(layout.root)
    with layout.held(), serving(followed) as address:
        session.open(address)
        session.run(
            "document.querySelector('details').open = true; window.first = document.querySelector('h3')"
        )
        open_recorder(layout).step(2, 3, {"reward_mean": 0.625})
        followed.look()
        assert session.wait(WORDS, "Live: 3 of 12 steps are trained.") == "Live: 3 of 12 steps are trained."
        assert "3 steps were trained" in session.run(MAIN)
        assert session.run("return document.querySelector('details').open")
        assert session.run("return window.first.isConnected"), "the ladder has not changed"
        counts = (f"document.querySelectorAll('{kind}').length" for kind in (".uplot canvas", ".live"))
        drawn, plots = session.run(f"return [{', '.join(counts)}]")
        assert drawn == plots > 0
    assert urls(session) == {address, f"{address}state.json"}
    assert [entry for entry in session.log("browser") if "ERR_CONNECTION_REFUSED" not in str(entry)] == []
    keep("live-1440-light", session.screenshot())


def test_a_line_that_is_appended_appears_and_the_end_of_run_and_server_is_said(session, tmp_path):
    """The command itself, over a run that another process writes."""
    layout = made.run(tmp_path / "run", steps=11)
    line = layout.metrics.read_bytes().splitlines(keepends=True)[-1]
    command = [sys.executable, "-m", "lockstep.cli.main", "report", "--live", str(layout.root)]
    # Where the tests run in the background of a shell, the interrupt is ignored from the start.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with layout.held():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heeds
        )
        try:
            address = process.stdout.readline().strip()
            session.log("performance")
            session.open(address)
            assert session.run(WORDS) == "Live: 11 of 12 steps are trained."
            session.run("window.stays = true")
            with layout.metrics.open("ab") as file:
                file.write(line.replace(b'"step":10', b'"step":11'))
            said = "Live: 12 of 12 steps are trained."
            assert session.wait(WORDS, said) == said
            assert "12 steps were trained" in session.run(MAIN)
        except BaseException:
            process.kill()
            raise
    said = "The run has ended: 12 of 12 steps are trained."
    assert session.wait(WORDS, said) == said
    assert urls(session) == {address, f"{address}state.json"}
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=CALL_S)
    said = "The server of this page does not answer. Shown is what it said last."
    assert session.wait(WORDS, said) == said
    assert "12 steps were trained" in session.run(MAIN)
    assert session.run("return window.stays"), "nothing was loaded anew"


@pytest.mark.parametrize("wrong", ["/", "/{}x/", "/wrong/"])
def test_a_browser_without_the_token_is_shown_nothing(session, tmp_path, wrong):
    followed = Followed(made.run(tmp_path / "run", steps=2).root)
    with serving(followed) as address:
        parts = urlsplit(address)
        session.open(f"http://{parts.netloc}{wrong.format(parts.path.strip('/'))}")
        status = "return performance.getEntriesByType('navigation')[0].responseStatus"
        assert session.run(status) == 403
        assert "trained" not in session.run("return document.documentElement.outerHTML")
        session.open(address)
        assert session.run(status) == 200
