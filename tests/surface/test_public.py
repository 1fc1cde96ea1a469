"""``import lockstep``: light, and what it offers is the library itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lockstep
from tests.conftest import EXTRAS
from tests.faults import conftest

recipe = conftest.recipe
HEAVY = (
    *("torch", "transformers", "typer", "rich", "pyarrow", "httpx2", "numpy", "msgspec", "vllm", "ray"),
    *EXTRAS,
)
"""What ``import lockstep`` must not bring."""


def modules_after(code):
    told = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def test_the_import_alone_brings_nothing():
    assert modules_after("import lockstep; dir(lockstep); lockstep.__version__") & {*HEAVY} == set()


@pytest.mark.parametrize("name", sorted(lockstep.PUBLIC.keys() - {"Trainer"}))  # it owns tensors
def test_a_name_brings_what_it_is_made_of_and_neither_torch_nor_the_command_line(name):
    brought = modules_after(f"import lockstep; lockstep.{name}")
    assert brought & {"torch", "transformers", "typer", "rich", "vllm", "pyarrow", *EXTRAS} == set()


def test_the_names_are_the_librarys_own():
    from lockstep import api
    from lockstep.engines.base import Engine
    from lockstep.records.samples import Sample
    from lockstep.records.verdicts import Verdict
    from lockstep.training.trainer import Trainer

    found = {name: getattr(lockstep, name) for name in lockstep.PUBLIC}
    classes = {of.__name__: of for of in (Engine, Sample, Trainer, Verdict)}
    assert found == {"check": api.check, "train": api.train, **classes}
    assert dir(lockstep) == sorted([*lockstep.PUBLIC, "__version__"]) == sorted(lockstep.__all__)
    with pytest.raises(AttributeError, match="chekc"):
        _ = lockstep.chekc


def test_check_and_train_do_what_the_commands_do(recipe, tmp_path, monkeypatch):
    from lockstep.config.recipe import with_sets
    from lockstep.runs.read import open_run

    monkeypatch.chdir(tmp_path)
    said = []
    result = lockstep.check(recipe, depth="quick", say=said.append)
    assert result.status == "PASS"
    assert "ladder: semantics" in said
    assert list(tmp_path.iterdir()) == [], "nothing is kept without out"
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (tmp_path / "sandbox.py").write_text(
        f"import os\ndef reward(completion, item):\n    os.chdir({str(elsewhere)!r})\n    return 0.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sets = ["training.prompts_per_step=2", "training.group_size=2", "parity.probe_prompts=4"]
    small = with_sets(recipe, [*sets, "task.reward=sandbox:reward"])
    summary = lockstep.train(small, out="run")
    assert Path.cwd() == elsewhere
    assert not list(elsewhere.iterdir()), "a reward may go where it likes: the run's files stay"
    monkeypatch.chdir(tmp_path)
    run = open_run(tmp_path / "run")
    assert (summary.steps, len(run.steps), summary.run) == (1, 1, "run")
    assert [record.verdict.status for record in run.verdicts[:5]] == ["PASS"] * 5
    assert run.certificate is not None
    assert run.certificate.void == ""
    assert lockstep.train(resume="run", say=said.append) == summary
    assert said[-1] == "its last step is trained and saved: nothing is left to do"


@pytest.mark.parametrize("arguments", [{}, {"resume": "a", "out": "b"}, {"recipe": "r.toml", "resume": "a"}])
def test_a_recipe_and_a_run_to_resume_exclude_each_other(arguments):
    from lockstep.errors import UsageError

    with pytest.raises(UsageError, match="lockstep train"):
        lockstep.train(**arguments)


def test_an_unknown_depth_fault_or_sink_is_refused_before_anything_starts(recipe, tmp_path):
    from lockstep.config.recipe import with_sets
    from lockstep.errors import UsageError

    for arguments in ({"depth": "deep"}, {"plant": ["stale_heat"]}):
        with pytest.raises(UsageError, match=r"deep|stale_heat"):
            lockstep.check(recipe, **arguments)
    with pytest.raises(UsageError, match=r"tensorbored.*csv, jsonl"):
        lockstep.train(with_sets(recipe, ['recording.sinks=["tensorbored"]']), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_type_checkers_are_told_the_same_names():
    stub = ast.parse(Path(lockstep.__file__).with_suffix(".pyi").read_text())
    told = {n.names[0].asname: n.module for n in stub.body if isinstance(n, ast.ImportFrom)}
    assert told == lockstep.PUBLIC
