"""Run directories: found again when interrupted, held by one process at a time."""

from pathlib import Path

import msgspec
import pytest

from lockstep.config.recipe import load_recipe
from lockstep.errors import RunError, UsageError
from lockstep.runs.layout import existing_run, new_run
from lockstep.runs.manifest import read_recipe, unfinished_run
from lockstep.runs.read import read_lines
from lockstep.runs.write import append_metrics, write_atomically

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.toml", ["training.steps=2"])


def made(root, recipe=RECIPE, steps=0):
    layout = new_run(root)
    write_atomically(layout.manifest, msgspec.json.encode({"schema": "lockstep.manifest/1", "recipe": recipe}))
    for step in range(steps):
        append_metrics(layout.metrics, step, step + 1, {"loss": 0.0})
    return layout


def test_an_interrupted_run_is_found_and_a_finished_or_other_one_is_not(tmp_path):
    assert unfinished_run(RECIPE, tmp_path) is None
    layout = made(tmp_path / "a", steps=1)
    assert unfinished_run(RECIPE, tmp_path) == layout
    assert read_recipe(layout.manifest) == RECIPE
    other = msgspec.structs.replace(RECIPE, training=msgspec.structs.replace(RECIPE.training, seed=9))
    assert unfinished_run(other, tmp_path) is None
    append_metrics(layout.metrics, 1, 2, {"loss": 0.0})
    assert unfinished_run(RECIPE, tmp_path) is None


def test_a_run_is_held_by_one_process_and_not_taken_up_meanwhile(tmp_path):
    layout = made(tmp_path / "a")
    with layout.held():
        with pytest.raises(UsageError, match="another process"), layout.held():
            pass
        assert unfinished_run(RECIPE, tmp_path) is None
    assert unfinished_run(RECIPE, tmp_path) == layout


def test_a_run_directory_is_private_and_never_overwritten(tmp_path):
    layout = made(tmp_path / "a")
    assert layout.root.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UsageError, match="--resume"):
        new_run(tmp_path / "a")
    with pytest.raises(UsageError, match=r"manifest\.json"):
        existing_run(tmp_path / "b")


def test_a_line_that_is_no_json_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(RunError, match="line 2"):
        read_lines(path)
