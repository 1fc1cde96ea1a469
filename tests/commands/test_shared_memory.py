"""Shared memory that is small or not there.

The weights lie on a disk, which is said, or there is a named error; no SIGBUS.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lockstep.errors import NoRoomError
from lockstep.weights import directory as place
from lockstep.weights.directory import FILE_NAME, remove_weights, reserve, weights_directory
from lockstep.weights.publish import WeightPublisher
from tests.commands.tiny_run import write_recipe

MB = 1 << 20
TRAIN_UNDER_SMALL_SHM = """\
import sys
from ctypes import CDLL, get_errno
from lockstep.cli.main import main

for size, recipe, out in zip(*[iter(sys.argv[1:])] * 3):
    if CDLL(None, use_errno=True).mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()):
        raise SystemExit(f"mount: errno {get_errno()}")
    sys.argv = ["lockstep", "train", recipe, "--out", out]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def may_mount():
    """True where a mount namespace of our own can be had."""
    return (
        shutil.which("unshare")
        and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    )


needs_mounts = pytest.mark.skipif(
    not may_mount(), reason="NOT_RUN: no mount namespace for this user; run as root"
)


@contextlib.contextmanager
def tmpfs(path, size):
    """A tmpfs of that size, while it lasts."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"NOT_RUN: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """4 MB in place of /dev/shm, and an empty cache."""
    with tmpfs(tmp_path / "shm", 4 * MB) as shared:
        monkeypatch.setattr(place, "SHARED", shared)
        monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
        yield shared


def model_of(n_bytes):
    return nn.Linear(n_bytes // 4, 1, bias=False)


def test_what_fits_lies_in_shared_memory_and_nothing_is_said(small):
    said = []
    model = model_of(2 * MB)
    publisher = WeightPublisher(model, weights_directory(), said.append)
    assert said == []
    assert not publisher.path.is_symlink()
    assert os.statvfs(small).f_bavail * 4096 < 2 * MB, "every byte is reserved before it is written"
    remove_weights(publisher.directory)
    assert list(small.iterdir()) == []


def test_what_does_not_fit_lies_in_the_cache_works_the_same_and_is_told(small, tmp_path):
    said = []
    model = model_of(6 * MB)
    before = model.weight.detach().clone()
    publisher = WeightPublisher(model, weights_directory(), said.append)
    (sentence,) = said
    for part in (
        f"{small} has 4 MB free of 4",
        "6 MB are needed",
        str(tmp_path / "cache" / "weights"),
        "--shm-size=1g",
    ):
        assert part in sentence
    assert torch.equal(model.weight, before)
    with torch.no_grad():
        model.weight.add_(1.0)
    update = publisher.publish(3)
    assert Path(update.path).parent == publisher.directory, (
        "the engine is still told of the directory that it knows"
    )
    assert torch.equal(load_file(update.path)["weight"], before + 1.0)
    (beside,) = (tmp_path / "cache" / "weights").iterdir()
    assert beside.stat().st_mode & 0o777 == 0o700
    remove_weights(publisher.directory)
    assert not beside.exists()
    assert list(small.iterdir()) == []


def test_no_room_anywhere_is_a_named_error_and_leaves_nothing(small, tmp_path, monkeypatch):
    with tmpfs(tmp_path / "disk", 5 * MB) as disk:
        monkeypatch.setenv("LOCKSTEP_CACHE", str(disk))
        directory = weights_directory()
        with pytest.raises(NoRoomError) as raised:
            reserve(directory, 6 * MB, print)
        assert raised.value.exit_code == 3
        for part in (
            f"{small} has 4 MB free of 4",
            f"{disk}/weights has 5 MB free of 5",
            str(6 * MB),
            "mount -o remount,size=1g",
        ):
            assert part in str(raised.value)
        assert list(directory.iterdir()) == []
        assert list((disk / "weights").iterdir()) == []
        remove_weights(directory)


def test_without_shared_memory_the_cache_takes_its_place_and_has_no_second_chance(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "SHARED", tmp_path / "not there")
    with tmpfs(tmp_path / "disk", 5 * MB) as disk:
        monkeypatch.setenv("LOCKSTEP_CACHE", str(disk))
        directory = weights_directory()
        assert directory.parent == disk / "weights"
        with pytest.raises(NoRoomError, match="5 MB free of 5"):
            reserve(directory, 6 * MB, print)
        with reserve(directory, 3 * MB, print) as file:
            assert os.fstat(file.fileno()).st_size == 3 * MB
        remove_weights(directory)
        assert not directory.exists()


def test_what_a_killed_trainer_left_in_the_cache_is_given_back(small, tmp_path):
    left = tmp_path / "cache" / "weights" / f"{place.PREFIX}left"
    left.mkdir(parents=True)
    (left / FILE_NAME).write_bytes(b"x")
    os.utime(left, (0, 0))
    remove_weights(weights_directory())
    assert not left.exists()


@needs_mounts
def test_training_under_a_dev_shm_of_4_and_of_64_mb(tmp_path):
    """64 MB are what Docker gives. The models are larger, and their trainers were ended by SIGBUS."""
    runs = {"4m": 2_000, "64m": 30_000}
    args = [
        arg
        for size, width in runs.items()
        for arg in (size, write_recipe(tmp_path / size, width), tmp_path / size / "run")
    ]
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", TRAIN_UNDER_SMALL_SHM, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"LOCKSTEP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("so they lie in") == 2
    for size in runs:
        assert (tmp_path / size / "run" / "checkpoints" / "step-000001").is_dir()
    assert list((tmp_path / "cache" / "weights").iterdir()) == []
