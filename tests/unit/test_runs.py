"""Run directories: found again when interrupted, held by one process at a time."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import msgspec
import pytest

from lockstep.config.imported import imported, source_digest
from lockstep.config.recipe import load_recipe, with_sets
from lockstep.errors import RunError, UsageError
from lockstep.records.messages import Ready
from lockstep.runs import checkpoints
from lockstep.runs.layout import existing_run, new_run
from lockstep.runs.manifest import (
    build_manifest,
    read_manifest,
    read_recipe,
    refuse_other_run,
    unfinished_run,
    write_manifest,
)
from lockstep.runs.record import open_recorder
from lockstep.runs.strict import read_lines

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.toml", ["training.steps=2"])


READY = Ready(
    engine="vllm",
    version="0.32.0",
    generation="V1",
    distribution="sampler",
    resolved={"model_config.seed": 0, "worker.pid": 7},
    capabilities={},
    start_s=1.0,
)
MODEL = {"weights_sha256": "a" * 64}


def manifest(recipe=RECIPE, ready=READY, model=MODEL, planted=()):
    return build_manifest(
        recipe, ready, {}, Path("model"), resolved=("vllm", "0.32.0"), model=model, planted=planted
    )


def made(root, recipe=RECIPE, steps=0):
    layout = new_run(root)
    write_manifest(layout.manifest, manifest(recipe))
    for step in range(steps):
        open_recorder(layout).step(step, step + 1, {"loss": 0.0})
    return layout


def test_an_interrupted_run_is_found_and_a_finished_or_other_one_is_not(tmp_path):
    assert unfinished_run(RECIPE, tmp_path) is None
    layout = made(tmp_path / "a", steps=1)
    assert unfinished_run(RECIPE, tmp_path) == layout
    assert read_recipe(layout.manifest) == RECIPE
    other = msgspec.structs.replace(RECIPE, training=msgspec.structs.replace(RECIPE.training, seed=9))
    assert unfinished_run(other, tmp_path) is None
    open_recorder(layout).step(1, 2, {"loss": 0.0})
    assert unfinished_run(RECIPE, tmp_path) == layout  # its last step is trained, and not saved yet
    last = layout.checkpoint(2)
    for part in (checkpoints.MODEL, checkpoints.OPTIMIZER, "config.json"):
        (last / part).parent.mkdir(parents=True, exist_ok=True)
        (last / part).write_bytes(b"0")
        assert unfinished_run(RECIPE, tmp_path) == layout, "a checkpoint is whole or it is none"
    checkpoints.seal(last, 2)
    assert unfinished_run(RECIPE, tmp_path) is None
    (last / checkpoints.MODEL).write_bytes(b"1")
    assert unfinished_run(RECIPE, tmp_path) == layout, "its last checkpoint is not what was written"
    checkpoints.seal(last, 2)


def test_the_newest_run_is_the_one_that_began_last_whatever_the_files_times_say(tmp_path):
    """A run that was copied, or whose manifest was touched, has the newer file and is the older run."""
    began_first = made(tmp_path / "z")
    began_last = made(tmp_path / "a")
    os.utime(began_first.manifest, (2e9, 2e9))
    os.utime(began_last.manifest, (1e9, 1e9))
    assert unfinished_run(RECIPE, tmp_path) == began_last
    (tmp_path / "a" / "manifest.json").write_bytes(b"{")
    assert unfinished_run(RECIPE, tmp_path) == began_first, "a manifest that cannot be read is no run"


def test_runs_of_before_a_start_was_written_down_come_before_those_that_say_it(tmp_path):
    for number, name in enumerate("ba"):
        layout = made(tmp_path / name)
        text = layout.manifest.read_text()
        layout.manifest.write_text(re.sub(r'"started": "[^"]*",', "", text))
        os.utime(layout.manifest, (2e9 + number, 2e9 + number))
    assert unfinished_run(RECIPE, tmp_path) == layout
    assert unfinished_run(RECIPE, tmp_path).root.name == "a"
    assert unfinished_run(RECIPE, made(tmp_path / "c").root.parent).root.name == "c"


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


AUTO = msgspec.structs.replace(RECIPE, engine=msgspec.structs.replace(RECIPE.engine, name="auto", version=""))


def test_auto_is_resolved_once_and_an_edited_recipe_is_refused(tmp_path):
    layout = made(tmp_path / "a", AUTO)
    resumed = read_recipe(layout.manifest)
    assert (resumed.engine.name, resumed.engine.version) == ("vllm", "0.32.0")
    assert unfinished_run(AUTO, tmp_path) == layout
    text = layout.manifest.read_text()
    layout.manifest.write_text(text.replace('"steps": 2', '"steps": 3'))
    with pytest.raises(RunError, match="a recipe that was edited"):
        read_recipe(layout.manifest)
    assert unfinished_run(AUTO, tmp_path) is None


def test_a_run_from_before_a_key_was_there_is_read_with_the_keys_default(tmp_path):
    layout = made(tmp_path / "a", AUTO)
    table = json.loads(layout.manifest.read_text())
    del table["recipe"]["optimizer"]["schedule_options"]
    older = msgspec.json.encode(table["recipe"], order="sorted")
    table["recipe_sha256"] = hashlib.sha256(older).hexdigest()
    layout.manifest.write_text(json.dumps(table))
    assert read_recipe(layout.manifest).optimizer == AUTO.optimizer
    table["recipe"]["optimizer"]["lr"] = 0.5
    layout.manifest.write_text(json.dumps(table))
    with pytest.raises(RunError, match="a recipe that was edited"):
        read_recipe(layout.manifest)


@pytest.mark.parametrize(
    ("now", "needle"),
    [
        (
            {"ready": msgspec.structs.replace(READY, version="0.18.1")},
            "engine: vllm 0.32.0 (V1) → vllm 0.18.1 (V1)",
        ),
        (
            {"ready": msgspec.structs.replace(READY, resolved={"model_config.seed": 1})},
            "engine.model_config.seed: 0 → 1",
        ),
        ({"model": {"weights_sha256": "b" * 64}}, "model.weights_sha256: aaaaaaaaaaaa → bbbbbbbbbbbb"),
        ({"planted": ("stale_head",)}, "planted faults: none → stale_head"),
    ],
)
def test_a_run_does_not_go_on_with_other_parts(tmp_path, now, needle):
    layout = made(tmp_path / "a")
    refuse_other_run(
        layout.manifest,
        manifest(ready=msgspec.structs.replace(READY, resolved=READY.resolved | {"worker.pid": 9})),
    )
    with pytest.raises(RunError) as raised:
        refuse_other_run(layout.manifest, manifest(**now))
    assert needle in str(raised.value)


def test_a_run_does_not_go_on_under_another_torch(tmp_path):
    layout = made(tmp_path / "a")
    now = manifest()
    with pytest.raises(RunError, match=r"version of torch: .* → 1\.0"):
        refuse_other_run(
            layout.manifest, msgspec.structs.replace(now, versions=now.versions | {"torch": "1.0"})
        )


SCORE = "def score(completion, item):\n    return 1.0\n"


@pytest.mark.parametrize(
    "is_imported", [True, False], ids=["imported here", "computed in processes of its own"]
)
def test_a_run_does_not_go_on_with_another_reward_file(tmp_path, monkeypatch, is_imported):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "a_reward_of_mine.py"
    file.write_text(SCORE)
    # Put back afterwards, whatever is imported here.
    monkeypatch.setitem(sys.modules, "a_reward_of_mine", None)
    del sys.modules["a_reward_of_mine"]
    if is_imported:
        imported("a_reward_of_mine:score", "task.reward")
    recipe = with_sets(RECIPE, ["task.reward=a_reward_of_mine:score"])
    layout = made(tmp_path / "a", recipe)
    assert read_manifest(layout.manifest).code == {"task.reward": hashlib.sha256(SCORE.encode()).hexdigest()}
    refuse_other_run(layout.manifest, manifest(recipe))
    file.write_text(SCORE.replace("1.0", "0.5"))
    with pytest.raises(RunError, match=r"source file of task\.reward: \w{12} → \w{12}, expected .* and code"):
        refuse_other_run(layout.manifest, manifest(recipe))
    assert ("a_reward_of_mine" in sys.modules) is is_imported


def test_the_source_of_a_function_is_where_it_is_defined(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "defines_it.py").write_text(SCORE)
    (tmp_path / "names_it.py").write_text(
        "import functools, math\nfrom defines_it import score\n"
        "partial = functools.partial(score)\nroot = math.sqrt\n"
        "@functools.wraps(score)\ndef wrapped(*args):\n    return score(*args)\n"
    )
    defines, names = (
        hashlib.sha256((tmp_path / f"{name}.py").read_bytes()).hexdigest()
        for name in ("defines_it", "names_it")
    )
    for module in ("defines_it", "names_it"):
        monkeypatch.setitem(sys.modules, module, None)
        del sys.modules[module]
    imported("names_it:score", "task.reward")
    found = [source_digest(f"names_it:{name}") for name in ("score", "wrapped", "partial", "root")]
    assert found == [defines, defines, names, names]
    assert source_digest("sys:exit") == source_digest("nowhere_at_all:f") == "none"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"schema": "lockstep.manifest/1"}', b'{"schema": "lockstep.manifest/2"}']
)
def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path, content):
    layout = made(tmp_path / "a")
    layout.manifest.write_bytes(content)
    with pytest.raises(RunError, match=r"manifest\.json"):
        read_manifest(layout.manifest)
