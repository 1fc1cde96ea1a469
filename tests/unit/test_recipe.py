"""A recipe is strict: every section refuses a misspelt key and names the nearest one."""

from pathlib import Path

import msgspec
import pytest

from lockstep.config.recipe import Recipe, load_recipe
from lockstep.errors import RecipeError

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SECTIONS = {field.name: field.type for field in msgspec.structs.fields(Recipe)}


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_a_misspelt_key_is_refused_in_every_section(section):
    key = msgspec.structs.fields(SECTIONS[section])[0].name
    with pytest.raises(RecipeError) as raised:
        load_recipe(QUICKSTART, [f"{section}.{key}x=1"])
    assert f"{section}.{key}x" in raised.value.boundary
    assert f"{section}.{key}" in raised.value.expected
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(("key", "homes"), [("lr", "'optimizer.lr' perhaps"), ("seed", "'training.seed' or 'parity.seed'")])
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
    ],
)
def test_bad_values_are_refused_with_one_sentence(override, needle):
    with pytest.raises(RecipeError, match=needle):
        load_recipe(QUICKSTART, [override])


def test_overrides_are_toml_and_fall_back_to_text():
    recipe = load_recipe(
        QUICKSTART, ["engine.options.logprobs_mode=raw_logprobs", "optimizer.lr=3e-6", "engine.options.block_size=64"]
    )
    assert recipe.engine.options == {"logprobs_mode": "raw_logprobs", "block_size": 64}
    assert recipe.optimizer.lr == 3e-6


def test_a_missing_file_and_a_broken_one(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(RecipeError, match="valid TOML"):
        load_recipe(tmp_path / "bad.toml")
