"""The page in a real browser: it asks for nothing, complains of nothing, and does nothing that a model wrote.

Where ``LOCKSTEP_SCREENSHOTS`` names a directory, what was seen is kept there.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from lockstep.report.build import of_check, of_run
from lockstep.report.compare import compare
from lockstep.report.live import Followed, serving
from lockstep.report.of_comparison import of_comparison
from lockstep.report.page import page
from lockstep.report.trajectories import Arm, Trajectory
from lockstep.runs.read import open_run
from lockstep.runs.record import open_recorder
from tests.report import made
from tests.report.browser import CHROMIUM, DRIVER, MISSING, browser

AXE = Path(__file__).parents[1] / "data" / "axe-core" / "axe.min.js"
SEEN_S = 30.0
LOOKS = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)


@pytest.fixture(scope="module")
def session():
    with browser() as opened:
        yield opened


def compared():
    random = np.random.default_rng(0)

    def arm(name, clip):
        runs = []
        for seed in range(3):
            steps = np.arange(40.0)
            columns = {"clip_fraction": clip + 0.002 * random.normal(size=40), "reward_mean": 0.01 * steps}
            absent = {figure: np.zeros(40, bool) for figure in columns}
            runs.append(
                Trajectory(f"{name}-{seed}", steps, columns, absent, {f: f for f in columns}, str(seed))
            )
        return Arm(name, tuple(runs))

    return of_comparison(compare([arm("V0", 0.01), arm(f"V1 {made.SCRIPT}", 0.2), arm("V1 mended", 0.01)]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    reports = {"run": of_run(open_run(made.run(root / "run").root)), "compare": compared()}
    failed = made.run(root / "check", steps=0, failed=True)
    reports["check"] = of_check(failed.root)
    for name, report in reports.items():
        (root / f"{name}.html").write_text(page(report), encoding="utf-8")
    return {name: (root / f"{name}.html").as_uri() for name in reports}


@pytest.mark.parametrize("name", ["run", "check", "compare"])
def test_nothing_is_asked_for_and_nothing_is_complained_of(session, pages, name):
    session.log("performance")
    session.log("browser")
    session.looks(1440, "light")
    session.open(pages[name])
    sent = [
        entry["message"]
        for entry in session.log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    assert sent, "the page itself is among them"
    assert not [
        message for message in sent if '"url":"file:' not in message and '"url":"data:' not in message
    ]
    assert session.log("browser") == []
    assert session.run("return document.title") != "owned"
    assert session.run("return document.querySelectorAll('script').length") == 2
    counts = (f"document.querySelectorAll('{kind}').length" for kind in (".uplot canvas", ".live"))
    drawn, plots = session.run(f"return [{', '.join(counts)}]")
    assert drawn == plots
    assert plots > 0 or name == "check"


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
@pytest.mark.parametrize("name", ["run", "compare"])
def test_it_fits_is_accessible_and_has_no_serious_fault(session, pages, name, width, scheme):
    session.looks(width, scheme)
    session.open(pages[name])
    assert session.run("return document.documentElement.scrollWidth") <= width
    dark = session.run("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    assert dark == (scheme == "dark")
    session.run("document.querySelectorAll('details').forEach((one) => one.open = true)")
    session.run(AXE.read_text(encoding="utf-8"))
    found = session.run_async("axe.run().then(arguments[arguments.length - 1])")
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert not serious, [(v["id"], [node["html"][:120] for node in v["nodes"][:3]]) for v in serious]
    assert len(found["passes"]) > 10
    if kept := os.environ.get("LOCKSTEP_SCREENSHOTS"):
        session.open(pages[name])
        (Path(kept) / f"report-{name}-{width}-{scheme}.png").write_bytes(session.screenshot())


def test_a_completions_script_is_text(session, pages):
    session.looks(1440, "light")
    session.open(pages["run"])
    shown = session.run("return document.querySelector('.tokens').textContent")
    assert made.SCRIPT in shown
    assert "\\x1b" in shown
    assert "\\u202e" in shown
    assert "\u202e" not in session.run("return document.body.textContent")


def test_the_keyboard_reaches_all_there_is_to_reach(session, pages):
    session.open(pages["run"])
    every = "[...document.querySelectorAll('a[href],summary,.scroll')]"
    assert session.run(f"return {every}.filter((one) => one.tabIndex < 0).length") == 0
    first = session.run("return document.querySelector('a[href]').className")
    assert first == "skip"


def test_printed_it_has_the_static_plots(session, pages):
    session.open(pages["run"])
    shown = "return getComputedStyle(document.querySelector('{}')).display"
    assert (session.run(shown.format(".static")), session.run(shown.format(".live"))) == ("none", "block")
    session.devtools("Emulation.setEmulatedMedia", media="print")
    assert (session.run(shown.format(".static")), session.run(shown.format(".live"))) == ("block", "none")
    session.devtools("Emulation.setEmulatedMedia", media="")


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
        words = "return document.querySelector('#live').textContent"
        deadline = time.monotonic() + SEEN_S
        while "3 of 12" not in session.run(words) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert session.run(words) == "Live: 3 of 12 steps are trained."
        assert "3 steps were trained" in session.run("return document.querySelector('main').textContent")
        assert session.run("return document.querySelector('details').open")
        assert session.run("return window.first.isConnected"), "the ladder has not changed"
        counts = (f"document.querySelectorAll('{kind}').length" for kind in (".uplot canvas", ".live"))
        drawn, plots = session.run(f"return [{', '.join(counts)}]")
        assert drawn == plots > 0
    asked = [json.loads(entry["message"])["message"] for entry in session.log("performance")]
    urls = {one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {address, f"{address}state.json"}
    assert [entry for entry in session.log("browser") if "ERR_CONNECTION_REFUSED" not in str(entry)] == []
    if kept := os.environ.get("LOCKSTEP_SCREENSHOTS"):
        (Path(kept) / "report-live-1440-light.png").write_bytes(session.screenshot())
