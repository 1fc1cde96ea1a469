"""Sinks of other libraries, each with the real one, offline, read back from what it wrote.

One that is not installed is NOT_RUN, and says so; ``make extras`` has all of them.
"""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.config.recipe import load_recipe, with_sets
from lockstep.metrics.aliases import aliases_of
from lockstep.records.alarms import Alarm, Override
from lockstep.records.verdicts import BeforeStep, Verdict
from lockstep.report.sources.read import read_runs
from lockstep.runs.layout import RunLayout, new_run
from lockstep.runs.record import open_recorder, recorder_of, sink_names
from lockstep.runs.sinks.base import ShownCompletions, table
from tests.conftest import EXTRAS, need_extra

QUICKSTART = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.toml")
PASSED = Verdict(layer="semantics", status="PASS", summary="the sampler's", n_tokens=8)
ALARM = Alarm(step=1, name="flat groups", layer="task", sentence="95% of the groups teach nothing")
SHOWN = ShownCompletions(step=0, rows=(("1 + 1 =", "2 | or\nthree", 0.5, -1.25, "stop"),))


@pytest.fixture
def layout(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    (tmp_path / "run").mkdir()
    return RunLayout(tmp_path / "run")


def recorded(layout, name, override=False):
    need_extra(name)
    recorder = open_recorder(layout, [name], aliases_of("trl", QUICKSTART))
    assert not any((layout.root / name).iterdir() if (layout.root / name).exists() else ()), "not written yet"
    if override:
        recorder.override = Override(reason="a sentence", layer="semantics", cause="raw logprobs")
    recorder.verdict(BeforeStep(0), PASSED)
    recorder.completions(SHOWN)
    recorder.step(0, 1, {"loss": 0.25, "grad_norm": 1.5, "gap_abs_max_nats": math.nan})
    recorder.step(1, 2, {"loss": -1.0, "grad_norm": 2.5})
    recorder.alarm(ALARM)
    return recorder.sinks[1]


def test_tensorboard_reads_scalars_texts_and_the_stamp(layout):
    recorded(layout, "tensorboard", override=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(layout.root / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(0, 0.25), (1, -1.0)]
    assert math.isnan(found.Scalars("gap_abs_max_nats")[0].value)
    texts = {
        tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]
    }
    assert texts["completions"] == table(SHOWN)
    assert "a sentence" in texts["override"]
    assert texts["alarm"] == str(ALARM)
    assert "PASS" in texts["verdict/semantics"]


def test_wandb_has_the_figures_under_both_names_offline(layout):
    sink = recorded(layout, "wandb", override=True)
    run = sink._run
    assert run.settings._offline
    run.finish()
    sink._wandb.teardown()  # finish() does not wait until the other process has written the file to its end
    (file,) = layout.root.glob("wandb/offline-run-*/run-*.wandb")
    (read,) = read_runs(file, {})  # W&B has no reader of its own any more: compare's, held to W&B's files
    assert read.figures["loss"].tolist() == [0.25, -1.0]
    assert read.figures["grad_norm"].tolist() == [1.5, 2.5]
    content = file.read_bytes()
    assert b"a sentence" in content
    assert b"teach nothing" in content
    (shown,) = layout.root.glob("wandb/offline-run-*/files/media/table/completions*.json")
    assert json.loads(shown.read_text())["data"] == [["1 + 1 =", "2 | or\nthree", 0.5, -1.25, "stop"]]


def test_mlflow_has_figures_tags_and_the_table_and_goes_on_with_its_run(layout):
    sink = recorded(layout, "mlflow", override=True)
    open_recorder(layout, ["mlflow"]).step(2, 3, {"loss": 5.0})
    client = sink._client
    (run,) = client.search_runs([client.get_experiment_by_name("lockstep").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 0.25), (1, -1.0), (2, 5.0)]
    assert run.info.run_name == "run"
    assert "a sentence" in run.data.tags["override"]
    assert run.data.tags["alarm.000001"] == str(ALARM)
    assert run.data.tags["verdict.semantics"].startswith("PASS")
    (artifact,) = client.list_artifacts(run.info.run_id, "completions")
    where = client.download_artifacts(run.info.run_id, artifact.path)
    with open(where) as file:
        shown = json.load(file)
    assert (shown["reward"], shown["advantage"]) == ([0.5], [-1.25])


def test_trackio_has_the_figures_the_stamp_and_the_alert(layout):
    sink = recorded(layout, "trackio", override=True)
    sink._trackio.finish()
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("lockstep", "run")
    steps = [row for row in rows if "loss" in row]
    assert [(row["step"], row["loss"]) for row in steps] == [(0, 0.25), (1, -1.0)]
    assert ["a sentence" in row["override"] for row in steps] == [True, True]
    assert any("completions" in row for row in rows)
    (alert,) = sink._trackio.Api().runs("lockstep")[0].alerts()
    assert alert["title"] == "flat groups"


@pytest.mark.parametrize("name", sink_names())
def test_a_sink_writes_nothing_before_its_first_record(tmp_path, name):
    """Otherwise a start that fails before its manifest could not be made again in its place."""
    if name not in ("csv", "jsonl"):
        need_extra(name)
    layout = new_run(tmp_path / "run")
    open_recorder(layout, [name])
    assert list(layout.root.iterdir()) == []


@pytest.mark.parametrize("does", ["", "sys.argv = ['lockstep', '--help']; lockstep.cli.main.main()"])
def test_no_extra_is_imported_unless_asked_for(does):
    """Where all are installed, as ``make extras`` has them, one that is imported if it is there shows too."""
    code = (
        "import sys, lockstep, lockstep.runs.record, lockstep.cli.main\n"
        f"try: {does or 'pass'}\n"
        f"finally: print(set({EXTRAS!r}) & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    assert ("Usage" in done.stdout) == bool(does)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_one_that_is_missing_gives_the_line_that_installs_it(layout, monkeypatch, name):
    from lockstep.errors import RecipeError

    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    importlib.invalidate_caches()
    with pytest.raises(RecipeError) as raised:
        open_recorder(layout, [name])
    assert f'pip install "lockstep-rl[{name}]"' in raised.value.hint


def test_aliases_go_to_sinks_and_not_to_the_runs_own_files(layout):
    from lockstep.runs.sinks import csv

    recorder = open_recorder(layout, ["csv"], aliases_of("trl", QUICKSTART))
    seen = []
    recorder.sinks[1].step = seen.append
    recorder.step(0, 1, {"reward_mean": 0.5, "mismatch_ratio_mean": 1.0})
    assert seen[0].metrics == {"reward_mean": 0.5, "mismatch_ratio_mean": 1.0, "reward": 0.5}
    assert b'"reward":' not in layout.metrics.read_bytes()
    csv.open_sink(layout).step(seen[0])
    assert "reward," not in (layout.root / "metrics.csv").read_text().partition("\n")[0]


def test_a_run_is_told_once_which_names_it_does_not_get(layout):
    said = []
    asking = with_sets(QUICKSTART, ["recording.aliases=trl", 'recording.sinks=["csv"]'])
    recorder = recorder_of(asking, layout, said.append)
    seen = []
    recorder.sinks[1].step = seen.append
    recorder.step(0, 1, {"clip_fraction": 0.5})
    assert seen[0].metrics == {"clip_fraction": 0.5, "clip_ratio/region_mean": 0.5}
    (sentence,) = said
    assert "lockstep metrics --aliases trl says how" in sentence
    recorder_of(QUICKSTART, layout, said.append)
    assert len(said) == 1, "who asks for none is told of none"


def test_a_table_escapes_what_would_break_it():
    assert table(SHOWN).splitlines()[-1] == "| 1 + 1 = | 2 \\| or ⏎ three | 0.5 | -1.25 | stop |"
