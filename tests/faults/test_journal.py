"""A campaign that was killed goes on where it was.

It takes nothing over that another recipe or other code came to.
"""

import math

import pytest
from msgspec.structs import replace

from lockstep.config.recipe import with_sets
from lockstep.faults.campaign import run_campaign
from lockstep.faults.catalogue import FAULTS
from lockstep.faults.journal import Journal

TWO = [FAULTS["nan_values"], FAULTS["rows_swapped"]]


@pytest.fixture
def journal(recipe, tmp_path):
    return Journal(tmp_path / "outcomes.jsonl", recipe)


def climbed(recipe, tmp_path, journal):
    new = []
    outcomes = run_campaign(
        recipe,
        TWO,
        tmp_path / "log",
        print,
        clean=False,
        on_outcome=lambda o: (new.append(o), journal.add(o)),
        done=journal.outcomes(),
    )
    return outcomes, [outcome.name for outcome in new]


def test_what_a_killed_campaign_found_is_not_measured_again(recipe, tmp_path, journal):
    first, new = climbed(recipe, tmp_path, journal)
    assert new == ["nan_values", "rows_swapped"]
    assert all(outcome.hit for outcome in first)
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[:-20])  # killed within the second line
    kept = journal.outcomes()
    assert [(o.name, o.hit) for o in kept] == [("nan_values", True)]
    assert math.isnan(kept[0].effect_nats), "a figure that is not finite comes back as it was"
    second, new = climbed(recipe, tmp_path, journal)
    assert new == ["rows_swapped"]
    assert [replace(o, seconds=0.0, effect_nats=0.0) for o in second] == [
        replace(o, seconds=0.0, effect_nats=0.0) for o in first
    ]
    assert climbed(recipe, tmp_path, journal)[1] == []


def test_outcomes_of_another_recipe_or_other_code_stay_where_they_are(recipe, tmp_path, journal, monkeypatch):
    first, _ = climbed(recipe, tmp_path, journal)
    other = Journal(journal.path, with_sets(recipe, ["parity.seed=7"]))
    assert other.outcomes() == []
    journal.add(replace(first[0], not_run="no such engine"))
    assert len(journal.outcomes()) == 2, "what could not be planted is tried anew"
    copied = tmp_path / "lockstep" / "__init__.py"
    copied.parent.mkdir()
    copied.write_text("edited = True\n")
    monkeypatch.setattr("lockstep.__file__", str(copied))
    assert Journal(journal.path, recipe).outcomes() == []
