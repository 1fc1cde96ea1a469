"""What was not flushed is lost, at every point of a run.

What is left is whole, in order, and goes on to the same end.
"""

import errno
import os
import tempfile
from pathlib import Path

import msgspec
import pytest

from lockstep.errors import RunError
from lockstep.rollout import store
from lockstep.runs import durable
from lockstep.runs.checkpoints import checked, newest_checkpoint
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import read_steps
from lockstep.runs.rollouts import read_table
from lockstep.training.checkpoint import load_checkpoint, save_checkpoint
from tests.chaos.lost_flush import recorded
from tests.chaos.tiny_run import (
    CHECKPOINT_EVERY,
    GROUP_SIZE,
    SAMPLING,
    STEPS,
    Trainer,
    assert_finished,
    score,
    start,
)


@pytest.fixture(scope="module")
def trainer(tiny_model_dir):
    return Trainer.of(tiny_model_dir)


@pytest.fixture(scope="module")
def recording(trainer):
    """A whole run, what it came to, and all its cut points."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as directory:
        with pytest.MonkeyPatch.context() as patch, recorded(Path(directory), patch.setattr) as recorder:
            start(Path(directory) / "run", trainer)
        yield recorder, trainer.weights()


def assert_in_order(layout: RunLayout, trainer: Trainer) -> None:
    """What a line or a name says is there, is there."""
    admitted = [step for step in range(STEPS) if layout.rollouts(step).is_file()]
    if (layout.root / "rollouts").exists():
        assert msgspec.json.decode(layout.manifest.read_bytes())["schema"] == "lockstep.manifest/1"
    newest = newest_checkpoint(layout.checkpoints)
    kept = load_checkpoint(checked(newest), trainer.policy, trainer.optimizer) if newest else 0
    for step in admitted:
        assert len(read_table(layout.rollouts(step))[0]) == GROUP_SIZE
        assert store.load(layout.rollouts(step), GROUP_SIZE, SAMPLING).rewarded
    lines = [record.step for record in read_steps(layout.metrics)]
    assert lines == list(range(len(lines)))
    assert admitted == list(range(len(admitted))), "steps are admitted one after the other"
    assert len(lines) <= len(admitted), "a line is written when its rollouts are there"
    assert kept <= len(lines), "a checkpoint is written when its step's line is"
    assert kept >= len(lines) // CHECKPOINT_EVERY * CHECKPOINT_EVERY - CHECKPOINT_EVERY, (
        "an older one went before its time"
    )


@pytest.mark.parametrize("disk", ["strict", "eager"])
def test_at_every_cut_what_is_left_is_whole_and_the_run_ends_as_if_undisturbed(
    recording, trainer, tmp_path, disk
):
    recorder, undisturbed = recording
    cuts = recorder.cuts[disk]
    assert len(cuts) >= 20
    print(f"{disk}: {len(cuts)} cuts")
    wanted = {"checkpoint": 0, "line": 0, "rollouts": 0}
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    ) as directory:
        for number, cut in enumerate(cuts):
            root = cut.build(Path(directory) / f"{number}") / "run"
            layout = RunLayout(root)
            if root.exists():
                assert_in_order(layout, trainer)
                wanted["checkpoint"] += newest_checkpoint(layout.checkpoints) is not None
                wanted["line"] += bool(len(read_steps(layout.metrics)))
                wanted["rollouts"] += layout.rollouts(0).is_file()
            assert_finished(start(root, trainer), trainer, undisturbed)
    assert min(wanted.values()) >= 10, wanted


def test_the_recorder_sees_what_a_missing_flush_loses(tmp_path, monkeypatch):
    """The check can fail: a rename before the flush leaves an empty file, an unflushed name is lost."""
    path = tmp_path / "a" / "file"
    with pytest.MonkeyPatch.context() as patch, recorded(tmp_path, patch.setattr) as recorder:
        durable.make_directory(path.parent)
        durable.write_atomically(path, b"first")
        partial = path.with_name("partial")
        partial.write_bytes(b"second")
        os.replace(partial, path)
        recorder.cut("the end")
    assert recorder.cuts["strict"][-1].files == {"a/file": b"first"}
    assert recorder.cuts["eager"][-1].files == {"a/file": b""}


@pytest.mark.parametrize("lost", ["flush_file", "flush_directory"])
def test_without_one_kind_of_flush_the_check_fails(trainer, tmp_path, lost):
    """Each flush is needed: without it some cut loses what it must not."""
    from lockstep.training import checkpoint

    with pytest.MonkeyPatch.context() as patch:
        for module in (durable, checkpoint):
            patch.setattr(module, lost, lambda path: None)
        (tmp_path / "disk").mkdir()
        with recorded(tmp_path / "disk", patch.setattr) as recorder:
            start(tmp_path / "disk" / "run", trainer)
    failed = 0
    for disk, cuts in recorder.cuts.items():
        root = cuts[-1].build(tmp_path / disk) / "run"
        layout = RunLayout(root)
        newest = newest_checkpoint(layout.checkpoints)
        failed += newest is None or newest.name != f"step-{STEPS:06d}"
    assert failed


@pytest.mark.parametrize("disk", ["strict", "eager"])
def test_a_checkpoint_that_is_saved_again_is_there_at_every_cut(trainer, tmp_path, disk):
    directory = tmp_path / "disk" / "checkpoints"
    trainer.restart()
    trainer.train(score(trainer.draw(0)))
    first = trainer.weights()
    with pytest.MonkeyPatch.context() as patch:
        directory.parent.mkdir()
        with recorded(directory.parent, patch.setattr) as recorder:
            save_checkpoint(directory, 1, trainer.policy, trainer.optimizer, trainer.model_path)
            before = {name: len(cuts) for name, cuts in recorder.cuts.items()}
            trainer.train(score(trainer.draw(1)))
            save_checkpoint(directory, 1, trainer.policy, trainer.optimizer, trainer.model_path)
    second = trainer.weights()
    found = []
    for number, cut in enumerate(recorder.cuts[disk][before[disk] - 1 :]):
        newest = newest_checkpoint(cut.build(tmp_path / f"{number}") / "checkpoints")
        assert newest is not None, cut.after
        assert load_checkpoint(checked(newest), trainer.policy, trainer.optimizer) == 1
        found.append(trainer.weights())
    n_first = found.count(first)
    assert found == [first] * n_first + [second] * (len(found) - n_first)
    assert 3 <= n_first < len(found)


def test_a_file_system_that_flushes_no_directory_is_taken_as_it_is(tmp_path, monkeypatch):
    real = os.fsync

    def refuses(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    code = errno.EINVAL
    durable.write_atomically(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    code = errno.EIO
    with pytest.raises(RunError, match="Input/output error"):
        durable.write_atomically(tmp_path / "b", b"content")
