"""The wheel in an environment of its own, from an empty folder, where there is no clone.

The plain install is real: pip fetches what the wheel requires. The extra's packages are this environment's,
found through a path file and not fetched again (torch alone is 200 MB); pip itself resolves
``lockstep-rl[trainer]`` against them with no index, so that an extra that lacks a package fails here.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("src", "pyproject.toml", "README.md", "LICENSE")
LEAKS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def run(folder, *command, **env):
    kept = {name: value for name, value in os.environ.items() if name not in LEAKS}
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=kept | env, capture_output=True, text=True, timeout=300
    )


def pip(environment, *args, **env):
    done = run(environment, environment / "bin" / "python", "-m", "pip", "-q", "install", *args, **env)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    root = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    for left in root.glob("src/*.egg-info"):
        shutil.rmtree(left)
    done = run(
        root,
        sys.executable,
        "-m",
        "pip",
        "-q",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "dist",
        ".",
    )
    assert done.returncode == 0, done.stderr
    return next((root / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    path = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    pip(path, "--no-compile", wheel)
    # An old one that comes with some Pythons would stand before the one that torch requires.
    run(path, path / "bin" / "python", "-m", "pip", "-q", "uninstall", "-y", "setuptools")
    return path


def test_out_of_the_wheel_without_and_with_the_extra(wheel, environment, tiny_checkpoint, tmp_path):
    command = environment / "bin" / "lockstep"
    cache = {"LOCKSTEP_CACHE": str(tmp_path / "cache")}
    folder = tmp_path / "empty"
    folder.mkdir()
    done = run(folder, command, "init", **cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "recipes" / "quickstart.toml").read_bytes() == (
        ROOT / "recipes" / "quickstart.toml"
    ).read_bytes()
    small = ["--engine", "transformers", "--set", f"model.path={tiny_checkpoint}", "--depth", "quick"]
    check = ["check", "recipes/quickstart.toml", *small]
    for args in (check, ["models", "install", "smollm2-135m-instruct"]):
        done = run(folder, command, *args, **cache)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.endswith('hint: pip install "lockstep-rl[trainer]"\n')

    (own,) = environment.glob("lib/python*/site-packages")
    (own / "extra.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip(
        environment,
        f"lockstep-rl[trainer] @ {wheel.as_uri()}",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
        PIP_CONFIG_FILE=os.devnull,
    )
    where = run(folder, environment / "bin" / "python", "-c", "import lockstep; print(lockstep.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(own)
    done = run(folder, command, *check, "--json", **cache)
    assert done.returncode == 0, done.stderr
    assert [layer["verdict"] for layer in json.loads(done.stdout)["layers"]] == ["PASS"] * 5
    assert sorted(path.name for path in folder.iterdir()) == ["recipes"]
