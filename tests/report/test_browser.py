"""The page in a real browser: it asks for nothing, complains of nothing, and does nothing that a model wrote.

Where ``LOCKSTEP_SCREENSHOTS`` names a directory, what was seen is kept there.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from lockstep.report.build import of_check, of_run
from lockstep.report.compare import compare
from lockstep.report.of_comparison import of_comparison
from lockstep.report.page import page
from lockstep.report.trajectories import Arm, Trajectory
from lockstep.runs.read import open_run
from tests.report import made
from tests.report.browser import CHROMIUM, DRIVER, MISSING, browser

AXE = Path(__file__).parents[1] / "data" / "axe-core" / "axe.min.js"
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
