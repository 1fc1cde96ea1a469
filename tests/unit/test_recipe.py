"""A recipe is strict: every section refuses a misspelt key and names the nearest one."""

from pathlib import Path

import msgspec
import pytest

from lockstep.config.recipe import Recipe, TaskConfig, load_recipe, with_sets
from lockstep.errors import RecipeError
from tests.unit.mutated_recipes import read_mutations

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SECTIONS = {field.name: field.type for field in msgspec.structs.fields(Recipe)}


def test_the_bf16_quick_start_is_the_quick_start_in_bf16_with_steps_that_bf16_weights_feel():
    half = load_recipe(QUICKSTART.with_name("quickstart-bf16.toml"))
    plain = load_recipe(QUICKSTART)
    assert (half.model.dtype, half.model.head_dtype, half.engine.dtype) == ("bfloat16", "float32", None)
    assert half.optimizer.lr > plain.optimizer.lr
    for section in ("engine", "task", "sampling", "objective", "parity"):
        assert getattr(half, section) == getattr(plain, section), section


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_a_misspelt_key_is_refused_in_every_section(section):
    key = msgspec.structs.fields(SECTIONS[section])[0].name
    with pytest.raises(RecipeError) as raised:
        load_recipe(QUICKSTART, [f"{section}.{key}x=1"])
    assert f"{section}.{key}x" in raised.value.boundary
    assert f"{section}.{key}" in raised.value.expected
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "homes"),
    [("lr", "'optimizer.lr' or 'value_head.lr' perhaps"), ("seed", "'training.seed' or 'parity.seed'")],
)
def test_a_key_without_its_section_is_found_in_every_section_that_has_it(key, homes):
    with pytest.raises(RecipeError, match=homes):
        load_recipe(QUICKSTART, [f"{key}=1"])


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("sampling.temperature=0", "positive temperature"),
        ("training.steps=0", ">= 1"),
        ("training.group_size=1", ">= 2"),
        ("sampling.top_p=1.5", "<= 1"),
        ("optimizer.lr=fast", "float"),
        ("training.minibatches=3", "divisor"),
        ("sampling.n=4", "group_size"),
        ("training", "section.key=value"),
        ("model.path.x=1", "section"),
        ("training.seed=-1", "training.seed: got -1, expected `int` >= 0"),
        ("parity.seed=-7", "parity.seed"),
        ("training.seed=4294967296", "<= 4294967295"),
        ("objective.clip_high=nan", "a finite number"),
        ("optimizer.lr=inf", "a finite number"),
        ("sampling.temperature=inf", "a finite number"),
        ("task.options.x=inf", "task.options.x: got inf"),
        ("task.options.x=1979-05-27", "in quotes"),
        ("task.options.x=99999999999999999999", "64 bits"),
        ('sampling.logit_bias={"the" = 1.0}', "sampling.logit_bias: .*keys that are `int`"),
        ('sampling.logit_bias={"-1" = 1.0}', "keys that are `int` >= 0"),
        ("sampling.logit_bias.17=up", "float"),
        ("sampling.stop_token_ids=[-1]", ">= 0"),
        ("model.path=\udcff", "UTF-8"),
        (f"optimizer.lr={'9' * 5000}", "float"),
        ("optimizer.lr=1\ntraining.steps=1", "float"),
    ],
)
def test_bad_values_are_refused_with_one_sentence(override, needle):
    with pytest.raises(RecipeError, match=needle):
        load_recipe(QUICKSTART, [override])


def test_overrides_are_toml_and_fall_back_to_text():
    recipe = load_recipe(
        QUICKSTART,
        ["engine.options.logprobs_mode=raw_logprobs", "optimizer.lr=3e-6", "engine.options.block_size=64"],
    )
    assert recipe.engine.options == {"logprobs_mode": "raw_logprobs", "block_size": 64}
    assert recipe.optimizer.lr == 3e-6


def test_a_missing_file_and_a_broken_one(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="directory"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="too long"):
        load_recipe(Path("n" * 5000))
    for content in (b"[model\n", b"\xff\xfe", b"a = " + b"[" * 50_000, b"a = " + b"9" * 5000):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(RecipeError, match="valid TOML"):
            load_recipe(tmp_path / "bad.toml")


def test_a_logit_bias_is_set_by_token_ids_which_toml_writes_as_text(tmp_path):
    assert load_recipe(QUICKSTART, ['sampling.logit_bias={"17"=-1.0, "3"=2}']).sampling.logit_bias == {
        17: -1.0,
        3: 2.0,
    }
    assert load_recipe(QUICKSTART, ["sampling.logit_bias.17=-1.0"]).sampling.logit_bias == {17: -1.0}
    file = tmp_path / "recipe.toml"
    file.write_text(QUICKSTART.read_text() + "\n[sampling.logit_bias]\n17 = -1.0\n")
    recipe = load_recipe(file)
    assert recipe.sampling.logit_bias == {17: -1.0}
    assert with_sets(recipe, ["sampling.logit_bias.3=2.0"]).sampling.logit_bias == {17: -1.0, 3: 2.0}


@pytest.mark.parametrize(
    "key", ["objective.clip_high", "objective.correction_high", "optimizer.max_grad_norm"]
)
def test_no_bound_is_inf_and_is_resumed_as_inf(key, tmp_path):
    from lockstep.runs.manifest import read_recipe, write_manifest

    section, name = key.split(".")
    recipe = load_recipe(QUICKSTART, [f"{key}=inf", 'sampling.logit_bias={"17"=-0.1}'])
    assert getattr(getattr(recipe, section), name) == float("inf")
    write_manifest(tmp_path / "manifest.json", manifest_of(recipe))
    assert b"Infinity" not in (tmp_path / "manifest.json").read_bytes()
    assert msgspec.structs.replace(read_recipe(tmp_path / "manifest.json"), engine=recipe.engine) == recipe


def manifest_of(recipe):
    from lockstep.records.messages import Ready
    from lockstep.runs.manifest import build_manifest

    ready = Ready(
        engine="e",
        version="1",
        generation="V1",
        start_s=0.0,
        resolved={},
        capabilities={},
        distribution="sampler",
    )
    return build_manifest(recipe, ready, {}, Path("m"), resolved=("vllm", "0.32.0"), model={})


BAD_MODULES = {
    "a syntax error": ("def reward(:\n", "SyntaxError"),
    "an exception": ("raise RuntimeError('not today')\n", "not today"),
    "an exit": ("import sys; sys.exit(0)\n", "SystemExit"),
    "a module it lacks": ("import nothing_like_it\n", "nothing_like_it"),
    "no such function": ("x = 1\n", "reward"),
    "no function": ("reward = 3\n", "no function"),
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_a_module_that_cannot_be_imported_is_named(name, tmp_path, monkeypatch):
    from lockstep.rollout.tasks import Task as Questions

    content, needle = BAD_MODULES[name]
    module = f"bad_{name.replace(' ', '_')}"
    (tmp_path / f"{module}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    for key, task in (
        ("task.reward", TaskConfig(name="reasoning_gym:chain_sum", reward=f"{module}:reward")),
        ("task.name", TaskConfig(name=f"{module}:reward")),
    ):
        with pytest.raises(RecipeError, match=needle) as raised:
            Questions(task, 0)
        assert raised.value.boundary == f"recipe, key {key}"
        assert module in raised.value.got


DATASETS = {
    "empty": ("[]", "empty dataset"),
    "no_sequence": ("iter([])", "list_iterator"),
    "raises": ("1 / 0", "ZeroDivisionError"),
    "no_question": ("[{'prompt': 'x', 'answer': 'y'}]", "prompt, answer"),
    "no_mapping": ("['x']", "str"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_without_questions_is_named(name, tmp_path, monkeypatch):
    from lockstep.rollout.tasks import Task as Questions

    content, needle = DATASETS[name]
    module = f"dataset_{name}"
    (tmp_path / f"{module}.py").write_text(f"def items(seed):\n    return {content}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=needle) as raised:
        Questions(TaskConfig(name=f"{module}:items"), 0).item(3)
    assert f"task {module}:items" in raised.value.boundary
    with pytest.raises(RecipeError, match=r"empty dataset|size"):
        Questions(TaskConfig(name="reasoning_gym:chain_sum", options={"size": 0}), 0)


def test_mutated_recipes_are_taken_exactly_or_refused_by_name(tmp_path):
    found = read_mutations(seed=1, count=1500, scratch=tmp_path)
    assert found["nameless"] == 0
    assert found["taken"] > 100
    assert found["refused"] > 700
