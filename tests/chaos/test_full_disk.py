"""A full disk at each write of a run.

An error that names the file, nothing half-written, and the run goes on with room again.
"""

import errno
import os
import shutil
import tempfile
from itertools import count
from pathlib import Path

import pytest

from lockstep.errors import RunError
from lockstep.records.verdicts import BeforeStep
from lockstep.rollout import store
from lockstep.runs.checkpoints import checked, newest_checkpoint
from lockstep.runs.durable import write_atomically
from lockstep.runs.layout import RunLayout, new_run
from lockstep.runs.record import open_recorder
from lockstep.runs.strict import read_lines
from lockstep.training import checkpoint
from lockstep.training.checkpoint import load_checkpoint, save_checkpoint
from tests.chaos.small_disk import PAGE, mounted
from tests.chaos.tiny_run import (
    HOLDS,
    SAMPLING,
    Trainer,
    assert_finished,
    assert_nothing_half_written,
    score,
    start,
)

DISK_KB = 1536


@pytest.fixture(scope="module")
def trainer(tiny_model_dir):
    return Trainer.of(tiny_model_dir)


@pytest.fixture(scope="module")
def undisturbed(trainer, tmp_path_factory):
    """What a run comes to that nothing happens to."""
    layout = start(tmp_path_factory.mktemp("undisturbed") / "run", trainer)
    weights = trainer.weights()
    assert_finished(layout, trainer, weights)
    return weights


@pytest.fixture
def in_memory(tmp_path):
    """Where a flush costs nothing: thousands are made here."""
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    ) as directory:
        yield Path(directory)


def refusal(action, *args) -> RunError | None:
    """The error that ``action`` ends in, if it does."""
    try:
        action(*args)
    except RunError as error:
        return error
    return None


class Disk:
    """Says no from its ``fails_at``-th operation on that needs the disk, until :meth:`repair`."""

    def __init__(self, monkeypatch, code: int, fails_at: int, *, once: bool = False) -> None:
        self.code = code
        self.fails_at = fails_at
        self.once = once
        self.seen: list[str] = []
        self.refused: list[str] = []
        self._patch = monkeypatch
        for module, name in (
            *((os, name) for name in ("open", "write", "fsync", "replace", "mkdir", "ftruncate")),
            (shutil, "copyfile"),
            (Path, "write_bytes"),
            (checkpoint, "save_file"),
        ):
            monkeypatch.setattr(module, name, self._watch(name, getattr(module, name)))

    def _watch(self, name, real):
        def watched(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)  # reading needs no room
            if name != "ftruncate":  # neither does shrinking
                self.seen.append(name)
                at = len(self.seen) - 1
                if at == self.fails_at or (at > self.fails_at and not self.once):
                    self.refused.append(name)
                    raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return watched

    def repair(self) -> None:
        """There is room again."""
        self._patch.undo()


@pytest.mark.parametrize(
    ("code", "once"),
    [(errno.ENOSPC, False), pytest.param(errno.EIO, True, marks=pytest.mark.chaos)],
    ids=["full", "broken-once"],
)
def test_at_each_operation_the_run_says_so_and_goes_on_afterwards(
    in_memory, monkeypatch, trainer, undisturbed, code, once
):
    refused = set()
    for n in count():
        root = in_memory / f"run-{n}"
        disk = Disk(monkeypatch, code, n, once=once)
        error = refusal(start, root, trainer)
        disk.repair()
        if error is None:
            assert not disk.refused
            break
        assert os.strerror(code) in error.got
        assert str(root) in error.boundary
        if (root / "manifest.json").exists():
            assert f"lockstep train --resume {root}" in error.hint
        refused.add(disk.refused[0])
        assert_nothing_half_written(root)
        assert_finished(start(root, trainer), trainer, undisturbed)
        shutil.rmtree(root)
    assert n > 80
    assert refused == {"open", "write", "fsync", "replace", "mkdir", "copyfile", "write_bytes", "save_file"}


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", DISK_KB) as disk:
        yield disk


def test_each_file_of_a_run_on_a_disk_that_is_full(small_disk, trainer):
    layout = new_run(small_disk.path / "run")
    trainer.restart()
    scored = score(trainer.draw(0))
    writes = {
        "manifest.json": lambda: write_atomically(layout.manifest, b"{}"),
        "certificate.json": lambda: write_atomically(layout.certificate, b"{}"),
        "verdicts.jsonl": lambda: open_recorder(layout).verdict(BeforeStep(0), HOLDS),
        "metrics.jsonl": lambda: open_recorder(layout).step(0, 1, {"loss": 0.5}),
        "drawn/step-000000.parquet": lambda: store.save(layout.drawn(0), trainer.draw(0)),
        "drawn/step-000000.parquet, scored": lambda: store.save(layout.drawn(0), scored),
    }
    for name, write in writes.items():
        path = layout.root / name.partition(",")[0] if "drawn" not in name else layout.drawn(0)
        before = path.read_bytes() if path.exists() else b""
        small_disk.fill()
        with pytest.raises(RunError, match="got No space left on device, expected room for it") as raised:
            write()
        assert str(path) in raised.value.boundary
        assert (path.read_bytes() if path.exists() else b"") == before
        assert_nothing_half_written(layout.root)
        small_disk.make_room()
        write()
    assert store.load(layout.drawn(0), 2, SAMPLING).rewards.tolist() == [0.0, 1.0]
    small_disk.fill()
    assert store.load(store.admit(layout, 0), 2, SAMPLING).rewarded, "a name needs no room here"


def test_a_line_that_fits_only_in_part_is_undone(small_disk):
    layout = new_run(small_disk.path / "run")
    open_recorder(layout).step(0, 1, {"loss": 0.5})
    first = layout.metrics.read_bytes()
    with layout.metrics.open("ab") as file:  # up to 20 bytes before the end of the page
        file.write(b'{"pad":"' + b"x" * (PAGE - 20 - len(first) - 11) + b'"}\n')
    before = layout.metrics.read_bytes()
    assert len(before) == PAGE - 20
    small_disk.fill()
    for _ in range(2):
        with pytest.raises(RunError, match=r"metrics\.jsonl: got No space left on device"):
            open_recorder(layout).step(1, 2, {"loss": 0.5})
        assert layout.metrics.read_bytes() == before
    small_disk.make_room()
    open_recorder(layout).step(1, 2, {"loss": 0.5})
    assert [row.get("step") for row in read_lines(layout.metrics)] == [0, None, 1]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk, trainer):
    directory = RunLayout(small_disk.path / "run").checkpoints
    trainer.restart()
    trainer.train(score(trainer.draw(0)))

    def save(step: int) -> Path:
        return save_checkpoint(directory, step, trainer.policy, trainer.optimizer, trainer.model_path)

    first = save(1)
    size = sum(path.stat().st_size for path in first.rglob("*"))
    hit = set()
    for left in range(0, 2 * size, PAGE):
        small_disk.fill(left)
        error = refusal(save, 2)
        if error is None:
            break
        hit.add(Path(error.boundary).name)
        assert newest_checkpoint(directory) == first
        assert [path.name for path in directory.iterdir()] == [first.name]
        assert load_checkpoint(checked(first), trainer.policy, trainer.optimizer) == 1
        small_disk.make_room()
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= hit, hit
    assert newest_checkpoint(directory) == directory / "step-000002"
    assert left > size // 2


def test_a_whole_run_on_small_disks_goes_on_when_there_is_room(small_disk, trainer, undisturbed):
    failed = 0
    root = small_disk.path / "run"
    for left in range(0, DISK_KB * 1024, 8 * PAGE):
        small_disk.fill(left)
        error = refusal(start, root, trainer)
        if error is None:
            break
        failed += 1
        assert "No space left" in error.got
        assert_nothing_half_written(root)
        small_disk.make_room()
        assert_finished(start(root, trainer), trainer, undisturbed)
        shutil.rmtree(root)
    assert failed >= 10
