"""The long form of the recipes' fuzz (the short one is tests/unit/test_recipe.py)."""

import pytest

from tests.unit.mutated_recipes import read_mutations


@pytest.mark.chaos
def test_mutated_recipes_are_taken_exactly_or_refused_by_name(tmp_path):
    found = read_mutations(seed=2, count=20_000, scratch=tmp_path)
    print(found)
    assert found["nameless"] == 0
    assert min(found["taken"], found["refused"]) > 1000
