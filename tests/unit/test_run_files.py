"""Where a run may lie, who may read its files, and what becomes of those that are damaged."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from lockstep import api
from lockstep.errors import RunError, UsageError
from lockstep.records.verdicts import OfCheck, Verdict
from lockstep.rollout import store
from lockstep.runs import durable
from lockstep.runs.certificate import read_certificate
from lockstep.runs.durable import write_atomically
from lockstep.runs.layout import existing_run, forget_partials, new_run
from lockstep.runs.manifest import read_recipe
from lockstep.runs.record import open_recorder
from lockstep.runs.signature import read_key
from lockstep.runs.strict import append, drop_partial_line, read_lines
from tests.unit.bag_pair import recipe_of
from tests.unit.test_store import rollouts


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o777], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.parametrize("given", [0o755, 0o1777, 0o700, 0o2775])
def test_a_directory_that_was_there_keeps_its_mode(tmp_path, given):
    root = tmp_path / "mine"
    root.mkdir()
    root.chmod(given)
    layout = new_run(root)
    with layout.held():
        write_atomically(layout.manifest, b"{}")
    assert mode(root) == given


def test_what_we_make_is_private_whatever_the_umask(tmp_path, umask):
    tmp_path.chmod(0o755)
    layout = new_run(tmp_path / "run")
    with layout.held():
        write_atomically(layout.manifest, b"{}")
        open_recorder(layout).step(0, 1, {"loss": 0.0})
        open_recorder(layout).verdict(
            OfCheck(), Verdict(layer="weights", status="PASS", summary="", n_tokens=1)
        )
        store.save(layout.drawn(0), rollouts(0))
        store.admit(layout, 0)
        store.save(layout.drawn(1), rollouts(1))
        store.refuse(layout, 1)
    files = [path for path in layout.root.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {mode(path) for path in files} == {0o600}
    assert {mode(path) for path in (layout.root, *layout.root.rglob("*")) if path.is_dir()} == {0o700}
    assert mode(tmp_path) == 0o755


def test_files_of_others_are_not_mixed_with_a_runs(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt and no run") as raised:
        new_run(tmp_path)
    assert raised.value.hint == f"--out {tmp_path / 'run'}"
    assert new_run(tmp_path / "run").root.is_dir(), "the hint is good"
    with pytest.raises(UsageError, match="a file"):
        new_run(tmp_path / "notes.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run"]


@pytest.mark.parametrize("opened", [new_run, existing_run], ids=["--out", "--resume"])
def test_a_name_that_the_system_refuses_is_usage(tmp_path, opened):
    with pytest.raises(UsageError, match="File name too long"):
        opened(tmp_path / ("a" * 300))


def test_a_check_into_a_file_is_refused_before_anything_is_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"--out .*notes\.txt: got a file"):
        api.check(recipe_of(), out=tmp_path / "notes.txt")


def test_a_key_that_may_have_no_end_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe", 0o600)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("this would wait for ever"))
    with pytest.raises(UsageError, match="got 0 bytes"):
        read_key(tmp_path / "pipe", "--sign-key")


def test_a_start_that_wrote_no_manifest_may_be_made_again_in_its_place(tmp_path):
    layout = new_run(tmp_path / "run")
    with layout.held():
        layout.engine_log.write_text("did not start")
    (layout.root / ".partial-manifest.json").write_bytes(b"{")
    assert new_run(layout.root) == layout
    store.save(layout.rollouts(0), rollouts(0))
    with pytest.raises(UsageError, match="no run"):
        new_run(layout.root)


def test_what_a_killed_process_left_half_written_goes_at_the_next_start(tmp_path):
    layout = new_run(tmp_path / "run")
    write_atomically(layout.manifest, b"{}")
    store.save(layout.rollouts(0), rollouts(0))
    checkpoint = layout.checkpoints / ".partial-step-000002" / "trainer"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_bytes(b"")
    for path in (layout.manifest, layout.rollouts(1), layout.drawn(1)):
        path.parent.mkdir(exist_ok=True)
        path.with_name(f".partial-{path.name}").write_bytes(b"half")
    kept = {path for path in layout.root.rglob("*") if ".partial-" not in str(path)}
    forget_partials(layout)
    assert set(layout.root.rglob("*")) == kept
    assert layout.rollouts(0) in kept


@pytest.mark.parametrize("written", [0, 1, 7])
def test_a_line_that_did_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch, written):
    path = tmp_path / "metrics.jsonl"
    append(path, {"a": 1})
    real = os.write
    monkeypatch.setattr(durable.os, "write", lambda descriptor, line: real(descriptor, line[:written]))
    with pytest.raises(RunError, match=r"metrics\.jsonl: got No space left on device, expected room for it"):
        append(path, {"b": 2})
    monkeypatch.undo()
    append(path, {"c": 3})
    assert path.read_bytes() == b'{"a":1}\n{"c":3}\n'


def test_a_short_write_of_a_file_goes_on_where_it_stopped(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(durable.os, "write", lambda descriptor, content: real(descriptor, content[:3]))
    write_atomically(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"schema": "lockstep.mani', b"[1]", b"null", b"\xff\xfe", bytes(20), b"{}"]
)
def test_a_damaged_manifest_or_certificate_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    for read in (read_recipe, read_certificate):
        with pytest.raises(RunError, match=r"manifest\.json") as raised:
            read(path)
        assert "lockstep" in raised.value.hint


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"a": NaN}', b"\xff", bytes(8), b'{"a": 1', b""])
def test_a_damaged_middle_line_is_an_error_that_names_it(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
        read_lines(path)


@pytest.mark.parametrize("tail", [b"", b'{"b": 2', b"\xff", bytes(4096)])
def test_an_unfinished_last_line_is_left_out_and_cut_off(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a":1}\n' + tail)
    assert read_lines(path) == [{"a": 1}]
    drop_partial_line(path)
    append(path, {"c": np.float64(3.0).item()})
    assert path.read_bytes() == b'{"a":1}\n{"c":3.0}\n'
    path.write_bytes(b"")
    drop_partial_line(path)
    assert read_lines(path) == []
