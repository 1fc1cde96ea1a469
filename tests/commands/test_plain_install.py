"""A plain install: nothing heavy is imported, and what is missing is said with the line that installs it."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lockstep as lockstep_rl
from lockstep.cli.main import EXTRA
from tests.conftest import EXTRAS

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
HEAVY = ("torch", "transformers", "pyarrow", "rich", "vllm", *EXTRAS)
VERBS = [
    [],
    ["init"],
    ["train"],
    ["check"],
    ["check-log"],
    ["certificate"],
    ["certificate", "verify"],
    ["diagnose"],
    ["faults"],
    ["engines"],
    ["models"],
    ["compare"],
    ["upgrade"],
    ["report"],
    ["engines", "install"],
    ["engines", "audit"],
]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))


def run_without(modules, *args):
    """The command where importing one of ``modules`` fails as it does where it is not installed."""
    code = (
        f"import sys; sys.argv = ['lockstep', *{[str(arg) for arg in args]!r}]\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {tuple(modules)!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from lockstep.cli.main import main\n"
        "main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_heavy(verb):
    code = (
        f"import sys; sys.argv = ['lockstep', *{verb!r}, '--help']\n"
        "from lockstep.cli.main import main\n"
        "try: main()\n"
        f"finally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("args", [["--version"], ["faults", "--list", "--json"]])
def test_versions_and_faults_are_told_without_torch(args):
    done = run_without([*HEAVY, "safetensors"], *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stale_head" in done.stdout or done.stdout == f"lockstep {lockstep_rl.__version__}\n"


@pytest.mark.parametrize("verb", [["check", QUICKSTART], ["train", QUICKSTART]])
def test_a_fault_that_is_not_known_is_refused_without_torch(verb):
    done = run_without(HEAVY, *verb, "--plant", "stale_heat")
    assert done.returncode == 2
    assert done.stderr.startswith("error: flag --plant: got 'stale_heat', expected one of ")
    assert "stale_head" in done.stderr


def test_the_catalogue_names_only_ways_to_break_the_trainer_that_there_are():
    from lockstep.faults.catalogue import FAULTS

    # To import it takes torch.
    code = ast.parse((ROOT / "src" / "lockstep" / "faults" / "trainer.py").read_text())
    written = {node.name for node in code.body if isinstance(node, ast.FunctionDef)}
    named = {fault.trainer.__closure__[0].cell_contents for fault in FAULTS.values() if fault.trainer}
    assert len(named) >= 9
    assert named <= written


@pytest.mark.parametrize(
    ("missing", "args"),
    [
        ("torch", ["check", QUICKSTART, "--engine", "transformers", "--set", "model.path=MODEL"]),
        ("torch", ["check-log", "ROLLOUTS", "--model", "MODEL"]),
        ("gguf", ["models", "install", "smollm2-135m-instruct"]),
        ("reasoning_gym", ["train", QUICKSTART, "--engine", "transformers", "--set", "model.path=MODEL"]),
        (
            "huggingface_hub",
            ["check", QUICKSTART, "--engine", "transformers", "--set", "model.path=org/name"],
        ),
    ],
)
def test_without_the_extra_one_sentence_has_the_line_that_installs_it(missing, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rollouts.jsonl").write_text(
        '{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [-0.5]}\n'
    )
    args = [
        str(arg).replace("MODEL", str(tmp_path)).replace("ROLLOUTS", str(tmp_path / "rollouts.jsonl"))
        for arg in args
    ]
    done = run_without([missing], *args)
    assert done.returncode == 2, done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert error == (
        f"error: this Python: got no {missing}, expected the trainer's packages beside it\n\n"
        'hint: pip install "lockstep-rl[trainer]"\n'
    )


def test_without_the_extra_programs_are_told_so_too(tmp_path):
    done = run_without(["torch"], "models", "install", "smollm2-135m-instruct", "--json")
    error = json.loads(done.stdout)["error"]
    assert (error["type"], error["exit_code"], error["got"]) == ("NotInstalledError", 2, "no torch")


def test_what_the_users_own_reward_lacks_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "mine.py").write_text("import torch_geometric_of_mine\n")
    sets = ["--set", f"model.path={tmp_path}", "--set", "task.reward=mine:reward"]
    done = run_without([], "train", QUICKSTART, "--engine", "transformers", *sets, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert (
        "recipe, key task.reward: got 'mine:reward' (ModuleNotFoundError: No module named 'torch_geometric"
        in done.stderr
    )
    assert "trainer]" not in done.stderr


def test_the_extras_packages_are_those_that_the_command_knows():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {
        line.partition(">")[0].replace("-", "_")
        for line in table["project"]["optional-dependencies"]["trainer"]
    }
    assert declared | {"huggingface_hub"} == set(EXTRA)


def test_every_extra_is_one_that_nothing_may_bring():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = [lines for name, lines in table.items() if name not in ("trainer", "dev", "bench")]
    packages = {re.split(r"[\[<>=]", line)[0].replace("-", "_") for lines in extras for line in lines}
    assert packages <= {*HEAVY}


def test_runs_are_compared_and_reported_without_torch(tmp_path):
    from tests.report import made

    run = made.run(tmp_path / "run", steps=3).root
    without = [module for module in HEAVY if module != "pyarrow"]
    compared = run_without(without, "compare", f"a={run}", f"b={run}", "--json")
    assert compared.returncode == 0, compared.stderr
    assert json.loads(compared.stdout)["verdict"] == "PASS"
    told = run_without(without, "report", run, "--out", tmp_path / "out")
    assert (told.returncode, told.stderr) == (0, "")
    assert "p99.9" in (tmp_path / "out" / "report.html").read_text()
    # Without pyarrow the rollouts alone are missing, and the page says so.
    assert run_without(HEAVY, "report", run, "--out", tmp_path / "bare").returncode == 0
    assert "lockstep-rl[report]" in (tmp_path / "bare" / "report.html").read_text()
