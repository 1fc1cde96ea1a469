"""The keys of every document that a verb prints with ``--json``, from the verbs themselves on the tiny model.

Where keys are names of the thing's own (figures, an engine's facts), ``*`` stands for them. What a rare
document alone has, an error's or a failing layer's, is brought about on purpose. ``LOCKSTEP_GOLDEN=write``
writes the file anew.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from lockstep.cli.main import main
from lockstep.engines.environments import install, locate, recipes
from lockstep.policy import pretrained
from lockstep.runs.strict import append
from tests.faults import conftest
from tests.golden.surface import golden, write

pair, recipe, session, log = (getattr(conftest, name) for name in ("pair", "recipe", "session", "log"))

OPEN = {
    *("figures", "matrix", "matrix.*", "mends", "capabilities"),
    *("env", "facts", "left_out", "system_needs", "installed"),
}
"""Tables whose keys are not ours to promise."""
SMALL = [
    "training.prompts_per_step=2",
    "training.group_size=2",
    "parity.probe_prompts=4",
    "parity.probe_tokens=4",
]
TOML = """\
model.path = "{model}"
engine = {{ name = "transformers", max_model_len = 128 }}
task.name = "reasoning_gym:basic_arithmetic"
task.options = {{ min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }}
sampling.max_tokens = 5
training.steps = 1
parity.draw_tokens = 128
parity.draws_see = 1.0
"""


@pytest.fixture
def verb(capsys, monkeypatch):
    """``verb(*args)``: the exit code and the document of a command."""

    def run(*args: Any) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["lockstep", *map(str, args), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def file(recipe, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TOML.format(model=recipe.model.path))
    return path


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Every path in a document; ``[]`` stands for a list's items, ``*`` for the keys of an open table."""
    if isinstance(value, list):
        yield f"{path}[]"
        yield from (line for item in value for line in keys(item, f"{path}[]"))
    elif not isinstance(value, dict) or value.keys() == {"nonfinite"}:
        yield path
    elif any(path == table or path.endswith(f".{table}") for table in OPEN):
        yield f"{path}.*"
        if path.endswith("figures"):  # which of them are tables themselves, and how deep, is each layer's
            return
        yield from (line for item in value.values() for line in keys(item, f"{path}.*"))
    else:
        yield from (line for name, item in value.items() for line in keys(item, f"{path}.{name}".lstrip(".")))


def hold(documents: list[dict[str, Any]]) -> None:
    """Compare the documents' keys with those that were promised for their schemas."""
    found = {f"{d['schema']}  {key}" for d in documents for key in keys(d) if key != "schema"}
    schemas = {d["schema"] for d in documents}
    promised = {line for line in golden("json_documents") if line.partition("  ")[0] in schemas}
    if os.environ.get("LOCKSTEP_GOLDEN") == "write":
        write("json_documents", sorted((set(golden("json_documents")) - promised) | found))
        promised = found
    assert (sorted(promised - found), sorted(found - promised)) == ([], [])


def test_of_the_verbs_that_only_look(verb, tmp_path, monkeypatch, recipe):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    environment = locate.Environment(
        name="vllm",
        version="0.32.0",
        generation="V1",
        flavour="cpu",
        digest="",
        smoke="",
        built="",
        size_bytes=0,
        path="/x",
    )
    monkeypatch.setattr(recipes, "refuse_machine", lambda recipe: None)
    monkeypatch.setattr(install, "install", lambda spec, say, lock_file: environment)
    monkeypatch.setattr(install, "remove", lambda spec, say: None)
    monkeypatch.setattr(pretrained, "install_model", lambda name, say: tmp_path)
    monkeypatch.setattr(locate, "installed", lambda: [environment])
    orders = [
        ["init", tmp_path],
        ["engines", "install", "vllm"],
        ["engines", "install", "vllm", "--check"],
        ["engines", "remove", "vllm"],
        ["engines", "list"],
        ["engines", "describe", "vllm==0.18.1"],
        ["models", "install", "smollm2-135m-instruct"],
        ["models", "list"],
        ["faults", "--list"],
        ["metrics"],
    ]
    found = [verb(*order) for order in orders]
    assert [code for code, _ in found] == [0] * len(orders)
    code, error = verb("train", "absent.toml")
    assert code == 2
    hold([error, *(document for _, document in found)])


def test_of_a_check_and_its_certificate(verb, file, tmp_path):
    sets = ["--set", "parity.probe_prompts=8"]
    passed = verb("check", file, *sets, "--out", tmp_path / "out")
    verified = verb("certificate", "verify", tmp_path / "out" / "certificate.json", file, *sets)
    changed = verb(
        "certificate", "verify", tmp_path / "out" / "certificate.json", file, "--set", "sampling.top_k=3"
    )
    alone = verb("certificate", "verify", tmp_path / "out" / "certificate.json")
    failed = verb("check", file, *sets, "--set", "sampling.top_k=3")
    assert [code for code, _ in (passed, verified, changed, alone, failed)] == [0, 0, 1, 3, 1]
    hold([document for _, document in (passed, verified, changed, alone, failed)])


def test_of_a_log(verb, log, recipe, tmp_path):
    for row in log():
        append(tmp_path / "log.jsonl", row)
        append(tmp_path / "shifted.jsonl", row | {"logprobs": [value - 0.5 for value in row["logprobs"]]})
    sets = ["--model", recipe.model.path, "--set", conftest.T, "--search-s", 2]
    clean = verb("check-log", tmp_path / "log.jsonl", *sets)
    failed = verb("check-log", tmp_path / "shifted.jsonl", *sets)
    old = verb("check", "--rollouts", tmp_path / "shifted.jsonl", *sets)
    assert [code for code, _ in (clean, failed, old)] == [3, 1, 1]
    assert old[1].pop("schema") == "lockstep.check/1"
    assert failed[1]["schema"] == "lockstep.check-log/1"
    assert failed[1] == {"schema": "lockstep.check-log/1", **old[1]}, "the old flag does as the command does"
    hold([clean[1], failed[1]])


def test_of_an_audit_a_diagnosis_and_a_campaign(verb, file):
    sets = [flag for override in SMALL for flag in ("--set", override)]
    audited = verb("engines", "audit", file)
    diagnosed = verb("diagnose", file, *sets, "--set", "engine.dtype=bfloat16")
    planted = verb("faults", file, *sets, "--only", "rows_swapped", "--no-clean")
    assert [document["schema"] for _, document in (audited, diagnosed, planted)] == [
        "lockstep.engines.audit/1",
        "lockstep.diagnose/1",
        "lockstep.faults/1",
    ]
    assert planted[0] == 0
    hold([document for _, document in (audited, diagnosed, planted)])


def test_of_a_training_run(verb, file, tmp_path):
    sets = [flag for override in SMALL for flag in ("--set", override)]
    code, document = verb("train", file, *sets, "--out", tmp_path / "run")
    assert code == 0
    hold([document])


def test_of_a_comparison_and_a_report(verb, tmp_path):
    from tests.report import made

    runs = [made.run(tmp_path / name / "run", steps=6, seed=seed).root for seed, name in enumerate("ab")]
    compared = verb("compare", *(f"{run.parent.name}={run}" for run in runs), "--figure", "reward_mean")
    told = verb("report", runs[0], "--out", tmp_path / "page")
    assert (compared[0], told[0]) == (3, 0), "one seed each"
    hold([compared[1], told[1]])
