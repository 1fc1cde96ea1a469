"""Who knows what: engines by name in their adapters alone, planted faults in the floor that plants them."""

import ast
import configparser
import io
import re
import tokenize
from pathlib import Path

import pytest

import lockstep
from lockstep.engines import registry

SOURCE = Path(lockstep.__file__).parent
NAMED = {
    "a mend for an engine that nobody knows has a flag of the best known as its example": """
        parity/causes.py parity/causes_semantics.py
    """,
    "it is about versions of that engine, which it installs and starts by name": """
        diagnose/ablation.py diagnose/atlas.py diagnose/sides.py diagnose/upgrade.py cli/upgrade.py
    """,
    "what may be typed is told by its example": """
        cli/check.py cli/diagnose.py cli/engines.py cli/flags.py
    """,
    "it is where engines are named": "engines/registry.py",
}
"""Why an engine's name may stand in code that is not its own → in which."""
GENERIC = (
    "process.py",
    "worker_engine.py",
    "channel.py",
    "base.py",
    "streaming.py",
    "turns.py",
    "audit.py",
    "replies.py",
    "worker/server.py",
    "worker/group.py",
)


def without_docstrings(path: Path) -> str:
    """The code, less comments and docstrings, which cite where a fact was measured."""
    tree = ast.parse(path.read_text())
    said = {
        node.value.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return " ".join(
        t.string
        for t in tokens
        if t.type != tokenize.COMMENT and not (t.type == tokenize.STRING and t.start[0] in said)
    )


@pytest.mark.parametrize("name", GENERIC)
def test_what_serves_every_engine_names_none(name):
    assert "vllm" not in (SOURCE / "engines" / name).read_text().lower()


FLOORS = (
    *("parity", "deep", "logged", "loop", "rollout", "training", "policy", "objectives", "weights"),
    *("diagnose", "cli", "report", "runs", "metrics", "config", "records", "cluster"),
    *("engines/*.py", "rendering.py", "summary.py", "api.py"),
)


def test_code_that_is_not_an_engines_own_names_none():
    files = [path for floor in FLOORS for path in SOURCE.glob(floor if "." in floor else f"{floor}/**/*.py")]
    assert len(files) > 200
    naming = {str(path.relative_to(SOURCE)) for path in files if "vllm" in without_docstrings(path).lower()}
    assert naming == {name for names in NAMED.values() for name in names.split()}


def test_an_engines_name_is_seen_in_code_and_not_in_what_is_said_of_it(tmp_path):
    path = tmp_path / "m.py"
    path.write_text('"""Of vLLM."""\nA = 1  # vLLM\n"""vLLM\'s."""\ndef f():\n    """vLLM."""\n')
    assert "vllm" not in without_docstrings(path).lower()
    path.write_text('A = "--flag of vLLM"\n')
    assert "vllm" in without_docstrings(path).lower()


@pytest.mark.parametrize(
    "place",
    [
        "engines/worker",
        "engines/transformers.py",
        "engines/vllm",
        "engines/process.py",
        "records/messages.py",
    ],
)
def test_what_runs_in_production_knows_no_planted_fault(place):
    from lockstep.faults.catalogue import AT_LOAD

    root = SOURCE / place
    words = ("plant", "lockstep.faults", "not_delivered", "keep_cache")
    assert {"not_delivered", "keep_cache"} <= set(AT_LOAD)
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        assert [word for word in words if word in path.read_text().lower()] == [], path


def test_what_the_registry_says_of_an_engine_is_of_one_that_can_be_named():
    assert {registry.PREFERRED, *registry.KEYED, *registry.REFUSALS, *registry.CHECKLISTS} <= set(
        registry.NAMES
    ) - {"auto"}


def test_every_shape_that_a_signature_names_is_checked_in_tests(pytestconfig):
    """And no function without one: the check of each call costs more than many of the calls."""
    *checked, _ = pytestconfig.getoption("--jaxtyping-packages").split(",")
    paths = [path for room in ("policy", "objectives") for path in (SOURCE / room).glob("*.py")]
    naming = {f"lockstep.{p.parent.name}.{p.stem}" for p in paths if "from jaxtyping" in p.read_text()}
    missed = {name for name in naming if not any(f"{name}.".startswith(f"{each}.") for each in checked)}
    assert not missed, "add them to --jaxtyping-packages in pyproject.toml"
    assert all(any(f"{name}.".startswith(f"{each}.") for name in naming) for each in checked)


ROOT = Path(__file__).parents[2]


def contract(name):
    """A contract of .importlinter: key → the modules that it names."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    return {key: value.split() for key, value in parser[f"importlinter:contract:{name}"].items()}


def modules(folder):
    """The modules and packages of a folder of the source, by dotted name."""
    files = (p for p in folder.glob("*.py") if not p.stem.startswith("__"))
    packages = (p.parent for p in folder.glob("*/__init__.py"))
    return {".".join(p.relative_to(SOURCE.parent).with_suffix("").parts) for p in (*files, *packages)}


def test_every_module_that_owns_no_model_is_held_off_it():
    owners = {f"lockstep.{name}" for name in ("policy", "training", "weights", "engines")}
    assert set(contract("owner")["source_modules"]) == modules(SOURCE) - owners


def test_every_module_of_the_engines_is_an_adapter_or_serves_all():
    folder = SOURCE / "engines"
    every = modules(folder) | modules(folder / "worker")
    serves = contract("generic")
    adapters = set(contract("adapters")["modules"])
    placed = {*serves["source_modules"], *serves["forbidden_modules"]}
    assert placed == every - {"lockstep.engines.worker"}
    assert adapters == {name for name in serves["forbidden_modules"] if ".worker." not in name}


def test_what_the_architecture_sends_people_to_is_there():
    """Its table of where to change what; the next one names files that a change would make."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = text[text.index("## I want to change X") : text.index("## What a change of each kind touches")]
    named = {name for name in re.findall(r"`([\w./]+\.(?:py|toml))`", table) if "NAME" not in name}
    assert len(named) > 60
    known = [
        *ROOT.glob("*.*"),
        *(p for at in ("src", "docs", "tests", "examples", "benchmarks") for p in (ROOT / at).rglob("*")),
    ]
    there = {str(path.relative_to(ROOT)) for path in known}
    assert [name for name in sorted(named) if not any(f"/{p}".endswith(f"/{name}") for p in there)] == []
