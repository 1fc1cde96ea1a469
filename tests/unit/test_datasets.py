"""Questions from files: columns mapped, order by seed, and what is wrong named by file, line and column."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lockstep.config.recipe import parse_recipe
from lockstep.errors import RecipeError
from lockstep.rollout.datasets import read_items
from lockstep.rollout.tasks import Task
from lockstep.runs.manifest import _code
from tests.conftest import need_extra

ROWS = [{"problem": f"{n} + 1", "solution": str(n + 1), "level": n} for n in range(8)]
COLUMNS = {"question": "problem", "answer": "solution"}


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    return path


def test_jsonl_and_parquet_give_the_same_items_and_keep_other_columns(jsonl, tmp_path):
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    kinds = ("jsonl", "parquet")
    asked = {"columns": COLUMNS}
    read = [read_items(kind, str(tmp_path / f"a.{kind}"), asked, 0) for kind in kinds]
    assert read[0] == read[1]
    assert read[0][3] == {"question": "3 + 1", "answer": "4", **ROWS[3]}


def test_shuffling_is_the_seeds_and_loses_no_row(jsonl):
    asked = {"columns": COLUMNS, "shuffle": True}
    first, again, other = (read_items("jsonl", str(jsonl), asked, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(item["level"] for item in first) == list(range(8))


def test_a_task_from_a_file_asks_and_rewards(jsonl):
    recipe = parse_recipe(
        {
            "model": {"path": "m"},
            "task": {"name": f"jsonl:{jsonl}", "options": {"columns": COLUMNS}},
            "sampling": {"max_tokens": 1},
            "training": {"steps": 1},
        },
        "test",
    )
    task = Task(recipe.task, 0)
    assert task.messages(task.item(9)) == [{"role": "user", "content": "1 + 1"}], "it starts over"
    assert list(task.rewards(["2", " 3"], [task.item(1), task.item(1)])) == [1.0, 0.0]
    before = _code(recipe)["task.name"]
    jsonl.write_text(json.dumps(ROWS[0]))
    assert _code(recipe)["task.name"] != before, "a run does not go on with other questions"


def test_a_run_does_not_go_on_with_other_code_of_the_users():
    own = f"{__name__}:ROWS"
    task = {"name": own, "tool_calls": own, "rewards": [{"function": "exact_match"}, {"function": own}]}
    objective = {"name": own}
    recipe = parse_recipe(
        {
            "model": {"path": "m"},
            "task": task,
            "sampling": {"max_tokens": 1},
            "training": {"steps": 1},
            "objective": objective,
        },
        "test",
    )
    digested = _code(recipe)
    assert set(digested) == {"task.name", "task.tool_calls", "task.rewards.1", "objective.name"}
    assert set(digested.values()) == {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


@pytest.mark.parametrize(
    ("content", "options", "needle"),
    [
        (None, {}, "No such file or directory"),
        ('{"problem": 1}\n{"prob', {}, "line 2"),
        ("[1]\n", {}, "line 1"),
        (
            '{"problem": "x"}\n',
            {"columns": {"question": "prompt"}},
            "row 0: got no column 'prompt', but problem",
        ),
        ('{"problem": "x"}\n', {"colums": {}}, "expected columns, shuffle, split, config"),
        ("\n", {}, "an empty dataset"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, options, needle):
    path = tmp_path / "b.jsonl"
    if content is not None:
        path.write_text(content)
    recipe = parse_recipe(
        {
            "model": {"path": "m"},
            "task": {"name": f"jsonl:{path}", "options": options},
            "sampling": {"max_tokens": 1},
            "training": {"steps": 1},
        },
        "test",
    )
    with pytest.raises(RecipeError, match=needle.replace("(", r"\(")):
        Task(recipe.task, 0)


def test_the_hubs_library_is_an_extra_and_its_absence_gives_the_line_that_installs_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError) as raised:
        read_items("hub", "org/name", {}, 0)
    assert raised.value.hint == 'pip install "lockstep-rl[datasets]"'


CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main.jsonl}, {split: test, path: other.jsonl}]
- config_name: other
  data_files: other.jsonl
---
"""


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
    """A data set of two configurations, as the hub's are laid out, read with the hub's own library."""
    datasets = need_extra("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "gsm8k"
    root.mkdir()
    (root / "README.md").write_text(CARD)
    for name, rows in (("main", ROWS), ("other", [row | {"level": -1} for row in ROWS[:2]])):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(root)


def test_a_data_set_of_several_configurations_is_read_by_its_name(gsm8k):
    main = read_items("hub", gsm8k, {"config": "main", "columns": COLUMNS}, 0)
    assert [item["level"] for item in main] == list(range(8))
    assert main[3]["question"] == "3 + 1"
    other = read_items("hub", gsm8k, {"config": "other"}, 0)
    assert [item["level"] for item in other] == [-1, -1]
    assert read_items("hub", gsm8k, {"config": "main", "split": "test"}, 0) == other


def test_without_its_name_the_configurations_that_there_are_are_told(gsm8k):
    with pytest.raises(RecipeError, match=r"main.*other") as raised:
        read_items("hub", gsm8k, {}, 0)
    assert 'config = "…"' in raised.value.hint
    with pytest.raises(RecipeError, match="no_such"):
        read_items("hub", gsm8k, {"config": "no_such"}, 0)
