"""``lockstep train`` on a disk that fills up.

Exit code 3, a sentence that names the file, and the same end with room again.
"""

import re
import shutil

import pytest

from lockstep.runs.layout import RunLayout
from tests.chaos.small_disk import mounted
from tests.chaos.whole_run import state_of

KB = 1024
QUICK = 200 * KB
"""Room for some steps, and not for all. ``make chaos`` goes from none to enough."""


def fails_and_goes_on(zygote, here, disk, left):
    """The file that did not fit, or nothing where all did."""
    recipe, expected = here
    layout = RunLayout(disk.path / "run")
    disk.fill(left)
    code, output = zygote("train", recipe, "--out", layout.root)
    named = re.search(r"writing (\S+): got No space left on device, expected room for it", output)
    disk.make_room()
    if code == 0:
        return None
    assert code == 3, output
    assert "Traceback" not in output
    assert named, output
    assert "free space" in output
    began = layout.manifest.exists()
    if began:
        assert f"lockstep train --resume {layout.root}" in output
    code, output = zygote("train", *(("--resume", layout.root) if began else (recipe, "--out", layout.root)))
    assert code == 0, output
    assert state_of(layout) == expected
    assert not list(layout.root.rglob(".partial-*"))
    shutil.rmtree(layout.root)
    return named[1].removeprefix(f"{layout.root}/")


def test_a_run_that_does_not_fit_says_so_and_goes_on_when_there_is_room(zygote, here, tmp_path):
    with mounted(tmp_path / "disk", 4096) as disk:
        assert fails_and_goes_on(zygote, here, disk, QUICK)


@pytest.mark.chaos
def test_at_every_amount_of_room_up_to_enough(zygote, here, tmp_path):
    hit = set()
    with mounted(tmp_path / "disk", 4096) as disk:
        for left in range(0, 4096 * KB, 24 * KB):
            name = fails_and_goes_on(zygote, here, disk, left)
            if name is None:
                break
            print(f"{left // KB} KB: {name}")
            hit.add(re.sub(r"\d+", "N", name))
    assert {
        "manifest.json",
        "checkpoints/step-N/model.safetensors",
        "checkpoints/step-N/trainer/optimizer.safetensors",
    } <= hit
