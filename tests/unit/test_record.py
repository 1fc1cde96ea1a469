"""What the loop records is on disk byte for byte as it always was, and is read back as what was recorded."""

import csv
import math

import msgspec
import numpy as np
import pytest

import lockstep
from lockstep.config.recipe import parse_recipe
from lockstep.errors import RunError, UsageError
from lockstep.metrics.catalog import METRICS
from lockstep.records.verdicts import (
    AfterSync,
    BeforeCheckpoint,
    BeforeStep,
    Finding,
    OfCheck,
    Verdict,
    when_of,
)
from lockstep.runs.layout import RunLayout, new_run
from lockstep.runs.manifest import write_manifest
from lockstep.runs.read import open_run, read_steps, read_verdicts
from lockstep.runs.record import Recorder, open_recorder
from lockstep.runs.sinks import csv as csv_sink
from lockstep.runs.strict import drop_partial_line
from lockstep.summary import summarise
from tests.unit.test_runs import manifest

PASSED = Verdict(layer="weights", status="PASS", summary="version 1 is served", n_tokens=8)
FAILED = Verdict(
    layer="path",
    status="FAIL",
    summary="decode and prefill differ",
    n_tokens=4,
    findings=(
        Finding(cause="x", effect_nats=math.nan, ci95=(-math.inf, 0.5), n_tokens=4, fix="f", evidence="e"),
    ),
    figures={"gap_abs_max_nats": math.inf, "by_row": [1.0, math.nan]},
)
LINES = (
    b'{"schema":"lockstep.metrics/1","step":0,"weight_version":1,'
    b'"metrics":{"loss":0.5,"gap_abs_max_nats":{"nonfinite":"nan"}}}\n'
    b'{"schema":"lockstep.metrics/1","step":1,"weight_version":2,"metrics":{"loss":-1e-9,"step_s":2.0}}\n'
)
VERDICT = (
    b'{"schema":"lockstep.verdict/1","when":"after sync 1","layer":"weights","status":"PASS",'
    b'"summary":"version 1 is served","reason":"","n_tokens":8,"findings":[],"figures":{}}\n'
)


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path)


def recorded(layout):
    recorder = open_recorder(layout)
    recorder.step(0, 1, {"loss": 0.5, "gap_abs_max_nats": math.nan})
    recorder.step(1, 2, {"loss": -1e-9, "step_s": 2.0})
    recorder.verdict(AfterSync(1), PASSED)
    return recorder


def test_the_lines_are_byte_for_byte_those_of_schema_1(layout):
    recorded(layout)
    assert layout.metrics.read_bytes() == LINES
    assert layout.verdicts.read_bytes() == VERDICT


def test_columns_hold_what_was_recorded_and_tell_what_was_not_measured(layout):
    recorded(layout)
    steps = read_steps(layout.metrics)
    assert [(record.step, record.weight_version) for record in steps] == [(0, 1), (1, 2)]
    np.testing.assert_array_equal(steps.column("loss"), [0.5, -1e-9])
    for name, measured in (
        ("gap_abs_max_nats", [True, False]),
        ("step_s", [False, True]),
        ("lr", [False, False]),
    ):
        assert steps.measured(name).tolist() == measured
    np.testing.assert_array_equal(steps.column("gap_abs_max_nats"), [math.nan, math.nan])
    np.testing.assert_array_equal(steps.column("step_s"), [math.nan, 2.0])
    assert steps.column("loss").dtype == np.float64
    with pytest.raises(KeyError, match="los_s"):
        steps.column("los_s")


@pytest.mark.parametrize(
    "when", [BeforeStep(0), BeforeStep(12), AfterSync(7), BeforeCheckpoint(24), OfCheck()]
)
@pytest.mark.parametrize("verdict", [PASSED, FAILED])
def test_a_verdict_and_its_moment_come_back_as_they_were(layout, when, verdict):
    open_recorder(layout).verdict(when, verdict)
    (record,) = read_verdicts(layout.verdicts)
    assert record.when == when
    assert repr(record.verdict) == repr(msgspec.structs.replace(verdict, figures=dict(verdict.figures))), (
        "NaN included"
    )


@pytest.mark.parametrize(
    "text",
    ["", "after sync", "after sync ", "after sync x", "after sync -1", "after sync ²", "before  3", "checks"],
)
def test_a_moment_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="is none of 'before step N'"):
        when_of(text)


@pytest.mark.parametrize(
    ("line", "needle"),
    [
        (b"nonsense", "malformed"),
        (b"[1]", "Expected `object`"),
        (b"{}", "schema None"),
        (LINES.splitlines()[0].replace(b"metrics/1", b"metrics/9"), "schema 'lockstep.metrics/9'"),
        (LINES.splitlines()[0].replace(b'"step":0', b'"step":"0"'), "Expected `int`, got `str`"),
        (LINES.splitlines()[0].replace(b"0.5", b"null"), "Expected `float`, got `null`"),
        (LINES.splitlines()[0].replace(b"0.5", b'{"nonfinite":"lots"}'), "Expected `float`"),
        (LINES.splitlines()[0].replace(b'"step":0,', b""), "missing required field `step`"),
    ],
)
def test_a_line_that_is_no_step_is_an_error_that_names_file_and_line(layout, line, needle):
    layout.metrics.write_bytes(LINES + line + b"\n" + LINES)
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 3") as raised:
        read_steps(layout.metrics)
    assert needle in raised.value.got
    assert raised.value.hint == f"sed -n 3p {layout.metrics}"


@pytest.mark.parametrize(
    ("before", "after", "needle"),
    [
        (b"after sync 1", b"after sink 1", "'after sink 1' is none of"),
        (b'"n_tokens":8', b'"n_tokens":0', "PASS over 0 tokens"),
        (b'"weights"', b'"heights"', "Invalid enum value"),
        (b"verdict/1", b"verdict/2", "schema 'lockstep.verdict/2'"),
        (b'"when":"after sync 1",', b"", "'' is none of"),
    ],
)
def test_a_line_that_is_no_verdict_is_an_error_that_names_file_and_line(layout, before, after, needle):
    assert before in VERDICT
    layout.verdicts.write_bytes(VERDICT + VERDICT.replace(before, after))
    with pytest.raises(RunError, match=r"verdicts\.jsonl, line 2") as raised:
        read_verdicts(layout.verdicts)
    assert needle in raised.value.got


def test_a_last_line_that_a_kill_cut_short_is_left_out_and_then_cut_off(layout):
    recorder = recorded(layout)
    with layout.metrics.open("ab") as file:
        file.write(b'{"step": 2, "metr')
    assert len(read_steps(layout.metrics)) == 2
    drop_partial_line(layout.metrics)
    recorder.step(2, 3, {"loss": 0.1})
    assert [record.step for record in read_steps(layout.metrics)] == [0, 1, 2]


def test_a_figure_that_is_not_in_the_catalog_reaches_no_sink(layout):
    with pytest.raises(KeyError, match="los_s"):
        open_recorder(layout).step(0, 1, {"los_s": 1.0})
    assert not layout.metrics.exists()


def test_every_sink_gets_every_record_in_order(layout):
    class Memory:
        def __init__(self):
            self.seen = []

        def step(self, record):
            self.seen.append(record)

        def verdict(self, record):
            self.seen.append(record)

    first, second = Memory(), Memory()
    recorder = Recorder([first, second])
    recorder.step(0, 1, {"loss": 0.5})
    recorder.verdict(BeforeStep(1), PASSED)
    assert first.seen == second.seen
    assert [type(record).__name__ for record in first.seen] == ["StepRecord", "VerdictRecord"]
    assert first.seen[1].when == BeforeStep(1)
    assert len(open_recorder(layout, ["jsonl"]).sinks) == 1, "named twice, written once"


def test_a_sink_that_nobody_has_is_refused_with_the_nearest(layout):
    with pytest.raises(
        UsageError, match=r"recording\.sinks: got 'cvs', expected sinks out of csv, jsonl"
    ) as raised:
        open_recorder(layout, ["cvs"])
    assert raised.value.hint == "--set 'recording.sinks=[\"csv\"]'"


def test_a_sink_that_cannot_be_opened_leaves_the_place_to_the_next_try(
    tiny_checkpoint, tmp_path, monkeypatch
):
    neutral = {"task": {"name": "t"}, "sampling": {"max_tokens": 1}, "training": {"steps": 1}}
    own = {
        "model": {"path": str(tiny_checkpoint)},
        "engine": {"name": "transformers"},
        "recording": {"sinks": ["csv"]},
    }
    recipe = parse_recipe(neutral | own, "test")

    def open_sink(layout):
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr(csv_sink, "open_sink", open_sink)
    for _ in range(2):
        with pytest.raises(
            UsageError, match="'csv', and No module named 'tensorboard', expected a sink whose packages are"
        ):
            lockstep.train(recipe, out=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock"]
    assert new_run(tmp_path / "run").root.is_dir()


def table(layout):
    with (layout.root / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_every_step_and_tells_unmeasured_from_non_finite(layout):
    recorder = open_recorder(layout, ["csv"])
    recorder.step(0, 1, {"loss": 0.1 + 0.2, "gap_abs_max_nats": math.nan})
    recorder.verdict(AfterSync(1), PASSED)
    recorder.step(1, 2, {"loss": -1e-9, "step_s": math.inf})
    first, second = table(layout)
    names = [m.name for m in METRICS if "NAME" not in m.name]
    assert list(first) == ["step", "weight_version", *names, "override"]
    assert float(first["loss"]) == 0.1 + 0.2
    assert [(row["step"], row["gap_abs_max_nats"], row["step_s"]) for row in (first, second)] == [
        ("0", "nan", ""),
        ("1", "", "inf"),
    ]
    assert (layout.root / "metrics.csv").stat().st_mode & 0o777 == 0o600


def test_the_table_of_a_run_that_goes_on_has_the_steps_that_a_kill_kept_from_it(layout):
    recorder = open_recorder(layout, ["csv"])
    recorder.step(0, 1, {"loss": 0.5})
    with (layout.root / "metrics.csv").open("ab") as file:
        file.write(b"1,2,0.")
    open_recorder(layout).step(1, 2, {"loss": 0.25})
    again = open_recorder(layout, ["csv"])
    for step in (2, 3):
        again.step(step, step + 1, {"loss": float(step)})
    assert [(row["step"], row["loss"]) for row in table(layout)] == [
        ("0", "0.5"),
        ("1", "0.25"),
        ("2", "2.0"),
        ("3", "3.0"),
    ]


def test_a_run_is_opened_whole_and_summarised(layout):
    write_manifest(layout.manifest, manifest())
    run = open_run(layout.root)
    assert (run.certificate, len(run.steps), run.verdicts) == (None, 0, ())
    assert (summarise(run).steps, math.isnan(summarise(run).reward_gain)) == (0, True)
    recorder = open_recorder(layout)
    for step, reward in enumerate([0.0, 0.25, 0.5, 1.0]):
        figures = {"reward_mean": reward, "gap_abs_max_nats": 1e-5 * step, "entropy_mean_nats": 2.0 - step}
        recorder.step(step, step + 1, figures | ({"step_s": 3.0} if step else {}))
        recorder.verdict(AfterSync(step + 1), PASSED)
    recorder.verdict(OfCheck(), PASSED)
    summary = summarise(open_run(layout.root))
    assert (summary.reward_first_quarter, summary.reward_last_quarter, summary.reward_gain) == (0.0, 1.0, 1.0)
    assert (summary.gap_abs_max_nats, summary.entropy_first_nats, summary.entropy_last_nats) == (
        1e-5 * 3,
        2.0,
        -1.0,
    )
    assert (summary.steps, summary.steps_timed, summary.training_s, summary.seconds_per_step) == (
        4,
        3,
        9.0,
        3.0,
    )
    assert (summary.syncs, summary.syncs_proven, summary.syncs_too_small_to_prove) == (4, 4, 0)
