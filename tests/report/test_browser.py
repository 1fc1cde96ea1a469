"""The page in a real browser: it asks for nothing, complains of nothing, and does nothing that a model wrote.

Where ``LOCKSTEP_SCREENSHOTS`` names a directory, what was seen is kept there; ``LOCKSTEP_SHOWN=RUN`` has a
run of one's own among the pages.
"""

import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from lockstep.report.build import of_check, of_run
from lockstep.report.compare import compare
from lockstep.report.of_comparison import of_comparison
from lockstep.report.of_documents import of_document, of_path
from lockstep.report.page import page
from lockstep.report.trajectories import Arm, Trajectory
from lockstep.runs.read import open_run
from tests.report import made
from tests.report.browser import CALL_S, CHROMIUM, DRIVER, MISSING, browser, keep

AXE = Path(__file__).parents[1] / "data" / "axe-core" / "axe.min.js"
LOOKS = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]
OWN = os.environ.get("LOCKSTEP_SHOWN", "")
PAGES = ["run", "check", "compare", "upgrade", "faults", "diagnose", *(["own"] if OWN else [])]
UPGRADE = made.ROOT / "evidence" / "upgrade" / "0.18.1-to-0.32.0.json"
REACHED = "a[href],summary,.scroll"
LABELS = """window.labels = [];
const seen = [], fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text) {
  if (!seen.includes(this)) seen.push(this);
  window.labels.push([`canvas ${seen.indexOf(this)}, ${this.textAlign}, ${this.font}`, String(text)]);
  return fillText.apply(this, arguments);
};"""
"""Keeps what is written on canvases; runs before the page's own scripts."""

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
    reports = {
        "run": of_run(open_run(made.whole_run(root / "run").root)),
        "check": of_check(made.run(root / "check", steps=0, failed=True).root),
        "compare": compared(),
        "upgrade": of_path(UPGRADE),
        "faults": of_document(made.CAMPAIGN, "faults.json"),
        "diagnose": of_document(made.DIAGNOSIS, "diagnose.json"),
    }
    if OWN:
        reports["own"] = of_path(Path(OWN))
    for name, report in reports.items():
        (root / f"{name}.html").write_text(page(report), encoding="utf-8")
    return {name: (root / f"{name}.html").as_uri() for name in reports}


def counts(session, *selectors):
    return [session.run(f"return document.querySelectorAll('{one}').length") for one in selectors]


@pytest.mark.parametrize("name", PAGES)
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
    drawn, plots, scripts = counts(session, ".uplot canvas", ".live", "script")
    assert scripts == 2
    assert drawn == plots
    assert (plots > 0) == (name in ("run", "compare", "own"))


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
@pytest.mark.parametrize("name", PAGES)
def test_it_fits_is_accessible_and_has_no_serious_fault(session, pages, name, width, scheme):
    session.looks(width, scheme)
    session.open(pages[name])
    keep(f"{name}-{width}-{scheme}", session.screenshot())
    keep(f"{name}-{width}-{scheme}-whole", session.screenshot_of("html"))
    if name in ("run", "own"):
        keep(f"{name}-{width}-{scheme}-ladder", session.screenshot_of("header", "[aria-labelledby=s1]"))
    assert session.run("return document.documentElement.scrollWidth") <= width
    dark = session.run("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    assert dark == (scheme == "dark")
    session.run("document.querySelectorAll('details').forEach((one) => one.open = true)")
    assert session.run("return document.documentElement.scrollWidth") <= width, "what was folded fits too"
    session.run(AXE.read_text(encoding="utf-8"))
    found = session.run_async("axe.run().then(arguments[arguments.length - 1])")
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert not serious, [(v["id"], [node["html"][:120] for node in v["nodes"][:3]]) for v in serious]
    assert len(found["passes"]) > 10


def test_a_completions_script_is_text(session, pages):
    session.looks(1440, "light")
    session.open(pages["run"])
    shown = session.run("return document.querySelector('article .tokens').textContent")
    assert made.SCRIPT in shown
    assert "\\x1b" in shown
    assert "\\u202e" in shown
    assert "\u202e" not in session.run("return document.body.textContent")


def test_the_keyboard_reaches_all_there_is_and_is_seen_where_it_is(session, pages):
    session.looks(390, "light")
    session.open(pages["run"])
    session.run(
        f"window.wanted = [...document.querySelectorAll('{REACHED}')].filter(e => e.checkVisibility())"
    )
    wanted = session.run("return wanted.length")
    assert wanted > 30
    order, unseen = [], []
    for _ in range(wanted):
        session.press("Tab")
        at, outline = session.run(
            "const e = document.activeElement; return [wanted.indexOf(e), getComputedStyle(e).outlineStyle]"
        )
        order.append(at)
        unseen += [at] if outline == "none" else []
    assert order == list(range(wanted)), "in the order of the page, none left out"
    assert unseen == []
    assert session.run("return wanted[0].className") == "skip"
    session.run("wanted[0].focus()")
    session.press("Enter")
    assert session.run("return document.activeElement.id") == "main"
    session.run("window.folded = document.querySelector('summary'); folded.focus()")
    session.press("Enter")
    assert session.run("return folded.parentElement.open")
    wide = "[...document.querySelectorAll('.scroll')].find((e) => e.scrollWidth > e.clientWidth + 50)"
    session.run(f"window.wide = {wide}; wide.focus()")
    session.press("ArrowRight")
    session.press("ArrowRight")
    assert session.wait("return wide.scrollLeft > 0", True)


def test_without_colour_verdicts_lines_and_tints_are_told_apart(session, pages):
    for name in ("run", "compare"):
        session.looks(1440, "light")
        session.open(pages[name])
        marks = session.run("return [...document.querySelectorAll('.status')].map((e) => e.textContent)")
        assert marks
        assert all(mark in ("✓ PASS", "✗ FAIL", "– NOT_RUN") for mark in marks)
        dashes = session.run(
            "const of = (plot) => [...plot.querySelectorAll('.swatch path')].map((e) => e.outerHTML);"
            "const dash = (html) => html.match(/stroke-dasharray=.*?>/)[0];"
            "return [...document.querySelectorAll('.live')].map((plot) => of(plot).map(dash))"
        )
        assert max(map(len, dashes)) > 1
        assert all(len(set(of_plot)) == len(of_plot) for of_plot in dashes)
    session.open(pages["run"])
    session.media("screen", {"forced-colors": "active"})
    grades = ["g1", "g2", "g4", "gx"]
    style = "return getComputedStyle(document.querySelector('.tokens .{}')).borderBottomStyle"
    assert [session.run(style.format(g)) for g in grades] == ["dotted", "dashed", "solid", "double"]


def test_no_two_marks_of_an_axis_are_written_alike(session, pages):
    """Of a gap of 1e-5 three decimals are all 0."""
    asked = session.devtools("Page.addScriptToEvaluateOnNewDocument", source=LABELS)
    try:
        session.looks(1440, "light")
        for name in (one for one in ("run", "compare", "own") if one in pages):
            session.open(pages[name])
            written = session.run("return window.labels")
            assert written
            for axis, marks in itertools.groupby(written, key=lambda one: one[0]):
                texts = [text for _, text in marks if text]
                assert len(set(texts)) == len(texts), (name, axis, texts)
    finally:
        session.devtools("Page.removeScriptToEvaluateOnNewDocument", identifier=asked["identifier"])


def test_under_the_pointer_the_numbers_are_told(session, pages):
    session.looks(1440, "light")
    session.open(pages["run"])
    session.run(
        "const plot = document.querySelectorAll('.live')[1]; plot.scrollIntoView({ block: 'center' });"
        "window.told = [...plot.querySelectorAll('.u-value')]; window.over = plot.querySelector('.u-over')"
    )
    assert session.run("return told.map((e) => e.textContent)") == ["", ""]
    right, middle = session.run(
        "const box = over.getBoundingClientRect(); return [box.right, (box.top + box.bottom) / 2]"
    )
    session.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=right - 2, y=middle)
    assert session.wait("return told[0].textContent", "13") == "13", "the last step"
    assert float(session.run("return told[1].textContent")) > 0.0


@pytest.mark.parametrize("without", ["print", "noscript"])
def test_printed_or_without_scripts_it_has_the_static_plots(session, pages, without):
    session.looks(1440, "light")
    shown = "return getComputedStyle(document.querySelector('{}')).display"
    session.open(pages["run"])
    assert (session.run(shown.format(".static")), session.run(shown.format(".live"))) == ("none", "block")
    folded = "return document.querySelector('details table').checkVisibility({ contentVisibilityAuto: true })"
    assert not session.run(folded)
    if without == "print":
        session.media("print", {})
    else:
        session.devtools("Emulation.setScriptExecutionDisabled", value=True)
        session.open(pages["run"])
    try:
        assert (session.run(shown.format(".static")), session.run(shown.format(".live"))) == ("block", "none")
        heights = session.run(
            "return [...document.querySelectorAll('.static svg')].map((e) => e.clientHeight)"
        )
        assert len(heights) > 5
        assert min(heights) > 100
        assert session.run(folded) == (without == "print"), "on paper nothing can be unfolded"
        keep(f"run-{without}", session.screenshot_of("html"))
    finally:
        session.media("screen", {})
        session.devtools("Emulation.setScriptExecutionDisabled", value=False)


def test_what_is_downloaded_is_what_the_page_was_made_of(session, pages, tmp_path):
    session.open(pages["run"])
    session.devtools("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    session.run("document.querySelectorAll('a[download]').forEach((one) => one.click())")
    deadline = time.monotonic() + CALL_S
    while {path.name for path in tmp_path.iterdir()} != {"report.json", "metrics.csv"}:
        assert time.monotonic() < deadline, list(tmp_path.iterdir())
        time.sleep(0.2)
    assert json.loads((tmp_path / "report.json").read_text())["kind"] == "run"
    assert (tmp_path / "metrics.csv").read_text().startswith("step,weight_version,")
