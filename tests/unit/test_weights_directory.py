"""Published weights take as much memory as the model: what a killed trainer left is given back, what is in use stays."""

import os

from lockstep.weights.directory import PREFIX, SETTLED_S, weights_directory


def test_what_killed_trainers_left_is_removed_and_what_is_held_stays():
    mine = weights_directory()
    assert mine.stat().st_mode & 0o777 == 0o700
    abandoned, new = mine.with_name(f"{PREFIX}abandoned"), mine.with_name(f"{PREFIX}new")
    try:
        for directory in (abandoned, new):
            directory.mkdir()
        (abandoned / "weights.safetensors").write_bytes(b"x")
        for directory in (mine, abandoned):
            os.utime(directory, (0, new.stat().st_mtime - SETTLED_S - 1))
        other = weights_directory()
        assert (mine.exists(), new.exists(), abandoned.exists()) == (True, True, False)
        other.rmdir()
    finally:
        mine.rmdir()
        new.rmdir()
