"""The command line as a program: exit codes, which stream says what, and how quickly it answers."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.cli.console import Console
from lockstep.cli.faults import faults
from lockstep.config.cache import cache_root, locked
from lockstep.errors import UsageError

LOCKSTEP = [sys.executable, "-m", "lockstep.cli.main"]
ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
HELP_LIMIT_S = 0.5


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))


def lockstep(*args):
    return subprocess.run([*LOCKSTEP, *map(str, args)], capture_output=True, text=True, timeout=60)


def test_the_command_alone_says_what_to_do_first():
    done = lockstep()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, verb in zip(lines, ("init", "check", "train"), strict=False):
        assert line.startswith(f"lockstep {verb}")
    assert "lockstep --help" in lines[3]
    assert (ROOT / lines[3].partition("Guides: ")[2].partition(" ")[0]).is_file()


def test_init_writes_the_quick_start_and_overwrites_nothing(tmp_path):
    done = lockstep("init", tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / "new" / "recipes" / "quickstart.toml"
    assert path.read_bytes() == QUICKSTART.read_bytes()
    assert f"  lockstep check {path}\n" in done.stdout
    assert "  lockstep engines install vllm==0.32.0\n" in done.stdout
    path.write_text("mine")
    again = lockstep("init", tmp_path / "new")
    assert (again.returncode, again.stdout) == (2, "")
    assert "nothing is overwritten" in again.stderr
    assert path.read_text() == "mine"
    document = json.loads(lockstep("init", tmp_path / "other", "--json").stdout)
    assert document["schema"] == "lockstep.init/1"
    assert document["next"][-1] == f"lockstep train {tmp_path / 'other' / 'recipes' / 'quickstart.toml'}"
    assert lockstep("init", path).returncode == 2  # under a file


def test_the_clones_recipe_is_the_packages():
    assert QUICKSTART.samefile(ROOT / "src" / "lockstep" / "recipes" / "quickstart.toml")


def test_describe_tells_the_facts_of_an_engine_that_is_not_installed():
    done = lockstep("engines", "describe", "vllm==0.18.1")
    assert done.returncode == 0
    for needle in (
        "V1 engine",
        "not installed",
        "lockstep engines install vllm==0.18.1",
        "stale_head",
        "g++",
    ):
        assert needle in done.stdout
    report = json.loads(lockstep("engines", "describe", "vllm==0.8.5", "--json").stdout)
    assert report["schema"] == "lockstep.engines.describe/1"
    assert (report["recipe"]["generation"], report["environment"]) == ("V0", None)


def test_help_answers_at_once():
    def processor_s():  # not the clock's, which is other processes' too
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    spent = []
    for _ in range(3):
        began = processor_s()
        lockstep("--help")
        spent.append(processor_s() - began)
    assert min(spent) < HELP_LIMIT_S


@pytest.mark.parametrize(
    "args", [["nonsense"], ["engines", "install"], ["train", "--nonsense"], ["models", "list", "x"]]
)
def test_wrong_usage_is_exit_code_2(args):
    done = lockstep(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error" in done.stderr
    as_json = lockstep(*args, "--json")
    assert as_json.returncode == 2
    assert json.loads(as_json.stdout)["schema"] == "lockstep.error/1"


@pytest.mark.parametrize(
    ("args", "boundary", "hint"),
    [
        (
            ["models", "install", "smolm-135m"],
            "model smolm-135m",
            "lockstep models install smollm2-135m-instruct",
        ),
        (["engines", "install", "vlm"], "engine vlm", "lockstep engines install vllm==0.32.0"),
        (
            ["engines", "install", "vllm==0.0.1"],
            "engine vllm==0.0.1",
            "lockstep engines install vllm==0.32.0",
        ),
        (["train", "absent.toml"], "recipe absent.toml", "recipes/"),
        (["engines", "describe", "vllm==0.9"], "engine vllm==0.9", "lockstep engines install vllm==0.32.0"),
        (["engines", "audit"], "engines audit", "lockstep engines audit recipes/quickstart.toml"),
        (["engines", "audit", "--url", "http://127.0.0.1:9", "--from", "0.7"], "flag --from", "--from 0.8.5"),
        (["check"], "check", "lockstep check --help"),
        (["check", QUICKSTART, "--engine", "vlm"], "flag --engine", "--engine transformers"),
        (
            ["check", QUICKSTART, "--set", "engine.name=vlm"],
            "recipe, key engine.name",
            "--set engine.name=vllm",
        ),
        (
            ["train", QUICKSTART, "--set", "engine.name=zzz"],
            "recipe, key engine.name",
            "--set engine.name=auto",
        ),
        (["check-log", "absent.parquet"], "check-log", "--model PATH"),
        (["check-log", "a.parquet", "--model", "m", "--power", ".01"], "check-log", "--depth full"),
        (["check-log", "a.parquet", "--model", "m", "--depth", "deep"], "flag --depth", "--depth full"),
        (
            ["certificate", "verify", "c.json", "--model", "m"],
            "certificate verify",
            "lockstep certificate verify --help",
        ),
    ],
)
def test_an_error_names_the_boundary_and_the_next_command_for_people_and_for_programs(args, boundary, hint):
    plain = lockstep(*args)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith(f"error: {boundary}: got ")
    assert "\n\nhint: " in plain.stderr
    assert hint in plain.stderr
    document = json.loads(lockstep(*args, "--json").stdout)
    assert document["schema"] == "lockstep.error/1"
    assert document["error"].keys() >= {"boundary", "got", "expected", "hint", "exit_code"}
    assert (document["error"]["boundary"], document["error"]["exit_code"]) == (boundary, 2)


def test_lists_are_data_on_stdout():
    engines = lockstep("engines", "list", "--json")
    assert (engines.returncode, engines.stderr) == (0, "")
    document = json.loads(engines.stdout)
    assert (document["schema"], document["installed"]) == ("lockstep.engines.list/1", [])
    (vllm,) = (engine for engine in document["available"] if engine["spec"] == "vllm==0.32.0")
    assert vllm == {"spec": "vllm==0.32.0", "generation": "V1", "flavour": "cpu", "state": "not installed"}
    models = json.loads(lockstep("models", "list", "--json").stdout)
    assert models["schema"] == "lockstep.models.list/1"
    assert (models["installed"], models["available"]) == ({}, ["smollm2-135m-instruct"])
    assert "lockstep engines install vllm==0.32.0" in lockstep("engines", "list").stdout


def test_an_unfinished_environment_is_listed_as_such():
    (cache_root() / "engines" / "vllm-0.32.0-cpu" / "lib").mkdir(parents=True)
    document = json.loads(lockstep("engines", "list", "--json").stdout)
    assert document["installed"] == []
    assert document["available"][-1]["state"] == "incomplete"


def test_control_c_is_exit_code_130():
    with locked(cache_root() / "models" / "smollm2-135m-instruct.lock", print):
        command = [*LOCKSTEP, "models", "install", "smollm2-135m-instruct"]
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # Where the tests run in the background of a shell, the interrupt is ignored from the start.
        process = subprocess.Popen(
            command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes
        )
        assert process.stderr is not None
        assert "another process is building smollm2-135m-instruct" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_the_cache_is_private_and_where_it_is_said_to_be(tmp_path, monkeypatch):
    assert cache_root() == (tmp_path / "cache").resolve()
    assert cache_root().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("LOCKSTEP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == (tmp_path / "xdg" / "lockstep").resolve()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == (tmp_path / ".cache" / "lockstep").resolve()


def test_a_terminal_shows_one_line_a_step_and_a_pipe_plain_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(stream, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stderr", stream)
        with Console() as console:
            console.say("first")
            console.say("first: half of it")
            console.say("second")
        return stream.getvalue()

    assert shown(Terminal(), TERM="xterm").count("\n") == 2
    for plain in (shown(io.StringIO(), TERM="xterm"), shown(Terminal(), TERM="dumb")):
        assert plain.count("\n") == 3
        assert "\x1b" not in plain
    assert os.environ["TERM"] == "dumb"


def test_a_check_needs_both_sides():
    done = lockstep("check")
    assert done.returncode == 2
    assert "--engine-url URL --model PATH" in done.stderr
    assert lockstep("check", "--engine-url", "http://127.0.0.1:9").returncode == 2
    done = lockstep("check", "recipes/quickstart.toml", "--depth", "deep")
    assert done.returncode == 2
    assert "quick, standard, full" in done.stderr


def test_a_check_of_a_server_and_a_model_takes_both():
    from lockstep.cli.sides import recipe_of_sides

    recipe = recipe_of_sides(None, "a-model", "http://127.0.0.1:9", ["sampling.temperature=0.7"], None)
    assert (recipe.model.path, recipe.engine.name, recipe.sampling.temperature) == ("a-model", "openai", 0.7)
    assert recipe.engine.options == {"base_url": "http://127.0.0.1:9"}


def test_the_faults_are_listed_and_an_unknown_one_is_refused():
    done = lockstep("faults", "--list")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) >= 24
    assert "stale_head" in done.stdout
    with pytest.raises(UsageError, match=r"stale_heat.*stale_head"):
        faults(only=["stale_heat"])


def test_the_confusion_matrix_counts_every_outcome():
    from lockstep.cli.faults import confusion, show_matrix
    from lockstep.faults.campaign import Outcome

    def outcome(planted, found, *, cause="x", statuses=("PASS", "FAIL"), not_run=""):
        return Outcome(
            name="n",
            planted_layer=planted,
            planted_cause="x" if planted else "",
            found_layer=found,
            found_cause=cause if found else "",
            effect_nats=0.0,
            statuses=statuses,
            seconds=0.0,
            evidence="",
            not_run=not_run,
        )

    outcomes = [
        outcome("path", "path"),
        outcome("path", "path", cause="y"),
        outcome("path", "semantics", statuses=("FAIL",)),
        outcome("path", "", statuses=("PASS",) * 5),
        outcome("weights", "", statuses=(), not_run="no such engine"),
        outcome("", "", statuses=("PASS",) * 5),
        outcome("", "numerics"),
    ]
    assert [o.hit for o in outcomes] == [True, False, False, False, False, True, False]
    matrix = confusion(outcomes)
    assert matrix["path"] == {"path": 1, "other cause": 1, "semantics": 1, "none": 1}
    assert matrix["weights"] == {"not run": 1}
    assert matrix["none"] == {"none": 1, "numerics": 1}
    assert len(show_matrix(matrix).splitlines()) == 4
