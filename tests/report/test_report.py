"""``lockstep report``: what is in it, that the page is a function of it, and that nothing of a model acts."""

import hashlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lockstep.errors import RunError, UsageError
from lockstep.report.build import of_check, of_run
from lockstep.report.document import write_report
from lockstep.report.of_documents import of_document, of_path
from lockstep.report.page import page, text
from lockstep.report.tokens import edges, quantile_of, read_gaps
from lockstep.report.vocabulary import read_vocabulary
from lockstep.runs.read import open_run
from tests.report import made

VENDOR = Path(made.ROOT / "src" / "lockstep" / "report" / "vendor")
GOLDEN = made.ROOT / "tests" / "golden" / "reports"


class Elements(HTMLParser):
    """Start tags of a page, and the text outside of scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.shown = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.shown.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return of_run(open_run(made.run(tmp_path_factory.mktemp("runs") / "run").root))


def portable(value):
    """Floats to ten digits, for processors differ in the last bit of a power; NaN is alike with itself."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, dict):
        return {key: portable(each) for key, each in value.items()}
    return [portable(each) for each in value] if isinstance(value, list | tuple) else value


def hold(name, report):
    """Compare with the golden file; ``LOCKSTEP_GOLDEN=write`` writes it.

    The recipe's table is left out: its keys have a golden file of their own.
    """
    path = GOLDEN / f"{name}.json"
    sections = [
        msgspec.structs.replace(part, tables=tuple(t for t in part.tables if t.title != "Recipe"))
        for part in report.sections
    ]
    report = msgspec.structs.replace(report, lockstep_version="0", sections=tuple(sections))
    if os.environ.get("LOCKSTEP_GOLDEN") == "write":
        write_report(path, report)
    golden, now = (portable(msgspec.to_builtins(each)) for each in (of_path(path), report))
    assert golden == now, f"report of {name} changed"


def test_the_report_of_a_run_is_the_golden_one(report):
    hold("run", report)


def test_the_report_of_a_failed_check_is_the_golden_one(tmp_path):
    layout = made.run(tmp_path / "check", steps=0, failed=True)
    layout.manifest.unlink()
    failed = of_check(layout.root)
    hold("check", failed)
    assert failed.status == "FAIL"
    assert "raw logprobs" in failed.words[1]


def test_words_come_first_and_say_the_verdict(report):
    assert report.status == "PASS"
    assert report.words[0] == "Engine and trainer were proven to be the same policy, layer by layer."
    assert "12 steps were trained" in report.words[1]
    assert "largest |trainer − engine| is 0.25 nats" in report.words[2]
    assert "12 tokens have no finite" in report.words[3]


def test_the_page_is_a_pure_function_of_the_report(report, tmp_path):
    write_report(tmp_path / "report.json", report)
    assert page(of_path(tmp_path / "report.json")) == page(report)
    (tmp_path / "cut.json").write_text('{"schema": "lockstep.report/1", "kind": "run"}')
    with pytest.raises(RunError, match="make the document anew"):
        of_path(tmp_path / "cut.json")


def test_nothing_that_a_model_said_is_an_element(report):
    found = Elements(page(report))
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == 2, "the data and our own"
    assert tags.count("img") == tags.count("iframe") == 0
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    shown = "".join(found.shown)
    assert made.SCRIPT in shown
    for character in ("\x1b", "\u202e", "\u2066", "\ufeff", "\u200b"):
        assert character not in page(report)
    assert "\\x1b" in shown
    assert "\\u202e" in shown
    assert "\\ufeff" in shown


def test_a_request_is_forbidden_and_none_is_written(report):
    html = page(report)
    found = Elements(html)
    policy = next(attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for tag, attrs in found.tags:
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            if name in attrs and tag != "meta":
                assert attrs[name].startswith(("#", "data:")), (tag, attrs)
        assert "style" not in attrs, "a style attribute is blocked by the page's own policy"


def test_the_vendored_files_are_those_that_the_readme_lists():
    listed = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", (VENDOR / "README.md").read_text(), re.M)[::1])
    assert set(listed.values()) == {path.name for path in VENDOR.iterdir()} - {"README.md"}
    for digest, name in listed.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a<b", "a&lt;b"),
        ("\x00", '<i class="ctl">\\x00</i>'),
        ("\u2028", '<i class="ctl">\\u2028</i>'),
        ("\t", '<i class="ctl">\\t</i>'),
    ],
)
def test_text_is_escaped_and_marked(said, shown):
    assert text(said) == shown


def test_quantiles_from_counts_are_those_of_the_tokens(tmp_path):
    layout = made.run(tmp_path / "run", steps=3, rows=64, length=50)
    paths = [layout.rollouts(step) for step in range(3)]
    gaps = read_gaps(paths)
    from pyarrow import parquet

    columns = [parquet.read_table(path, columns=["engine_logprobs", "sampling_logprobs"]) for path in paths]
    engine, trainer = (
        np.concatenate([np.concatenate(table[name].to_pylist()) for table in columns]).astype(np.float32)
        for name in ("engine_logprobs", "sampling_logprobs")
    )
    size = np.abs(trainer - engine)
    finite = size[np.isfinite(size)]
    assert (gaps.tokens, gaps.compared, gaps.missing) == (9600, 9597, 3)
    assert gaps.largest == pytest.approx(finite.max(), rel=1e-6)
    for share in (0.5, 0.9, 0.99):
        assert quantile_of(gaps.counts, share) == pytest.approx(np.quantile(finite, share), rel=0.05)
    rare = (np.exp(engine) < 0.1) & (np.exp(engine) >= 0.01) & np.isfinite(size)
    assert gaps.by_probability[3].sum() == rare.sum()
    assert gaps.by_position[0].sum() == 192
    assert gaps.by_position[5].sum() == 192 * 16
    assert quantile_of(gaps.by_position[2], 1.0) == pytest.approx(0.25, rel=0.05), "token 3 of row 0"
    assert gaps.shown[0].row == 0
    assert edges().size == gaps.counts.size - 1


def test_a_damaged_file_of_rollouts_is_said_and_the_rest_is_shown(tmp_path):
    layout = made.run(tmp_path / "run", steps=3)
    content = layout.rollouts(1).read_bytes()
    layout.rollouts(1).write_bytes(content[: len(content) // 2])
    broken = of_run(open_run(layout.root))
    assert any("not read" in line for section in broken.sections for line in section.text)
    assert [section.title for section in broken.sections].count("Rollouts") == 0
    assert "Trajectories" in [section.title for section in broken.sections]


def test_tokens_of_byte_level_bpe_are_read_as_text(tmp_path):
    import json

    words = {"Ġhello": 0, "Ã": 1, "ĊĊ": 2, "<0x0A>": 3}
    table = {
        "model": {"vocab": words},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 9, "content": "</s>"}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    vocabulary = read_vocabulary(tmp_path)
    assert [vocabulary.text(token) for token in (0, 1, 2, 9, 77)] == [
        " hello",
        "\\xc3",
        "\n\n",
        "</s>",
        "⟨77⟩",
    ]
    assert "by id" in read_vocabulary(tmp_path / "none").why_not


def test_documents_of_other_verbs_have_reports_and_unknown_ones_are_refused(tmp_path):
    told = of_document(made.DIAGNOSIS, "d.json")
    assert (told.kind, told.status) == ("diagnose", "PASS")
    assert told.sections[0].tables[0].rows == (("engine.options.x=1", "0.1", "0.1", "leave it out"),)
    assert of_document(made.CAMPAIGN, "f.json").status == "PASS"
    assert Elements(page(of_document(made.CAMPAIGN, "f.json"))).tags
    with pytest.raises(UsageError, match="schema"):
        of_document({"schema": "lockstep.train/1"}, "t.json")
    with pytest.raises(RunError):
        of_document({"schema": "lockstep.diagnose/1"}, "d.json")
    with pytest.raises(UsageError):
        of_path(tmp_path / "none")


def test_alarms_and_a_run_without_proof_are_said_first(tmp_path):
    from lockstep.records.alarms import Alarm, Override
    from lockstep.runs.record import open_recorder

    layout = made.run(tmp_path / "run", steps=3)
    recorder = open_recorder(layout)
    recorder.override = Override(reason="we know", layer="semantics", cause="raw_logprobs")
    recorder.step(3, 4, {"reward_mean": 0.5})
    recorder.alarm(Alarm(step=3, name="mismatch", layer="semantics", sentence=f"ESS 0.71 {made.SCRIPT}"))
    told = of_run(open_run(layout.root))
    assert told.status == "NOT_RUN"
    assert told.words[0].startswith("It was trained without proof. OVERRIDDEN (semantics")
    assert any("1 alarm was raised" in sentence for sentence in told.words)
    sections = {section.title: section for section in told.sections}
    assert sections["Alarms"].tables[0].rows[0][:3] == ("4", "mismatch", "semantics")
    assert all("not proven" in plot.title for plot in sections["Trajectories"].plots)
    assert made.SCRIPT not in page(told)


def test_what_is_measured_every_so_many_steps_is_drawn_where_it_was(tmp_path):
    from lockstep.runs.record import open_recorder

    layout = made.run(tmp_path / "run", steps=4)
    recorder = open_recorder(layout)
    for step in (4, 5, 6):
        held_out = {"evaluation_reward_mean": 0.1 * step} if step % 2 == 0 else {}
        recorder.step(step, step + 1, {"rewards/brief/mean": 0.25, "reward_mean": 0.5} | held_out)
    sections = {section.title: section for section in of_run(open_run(layout.root)).sections}
    plots = {plot.title: plot for plot in sections["Trajectories"].plots}
    assert plots["Held-out reward"].xs == (5.0, 7.0)
    assert plots["Held-out reward"].lines[0].ys == pytest.approx((0.4, 0.6))
    assert plots["Each reward, before its weight"].lines[0].name == "rewards/brief/mean"
    assert "Turns and tool calls" not in plots
