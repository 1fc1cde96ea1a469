"""Nothing outside of its owner reaches into the trainer's model.

The import contract keeps its types away; this, its tensors, by whatever way: an attribute, ``getattr``, what
the owner keeps to itself, a function that is handed the model.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import lockstep

SOURCE = Path(lockstep.__file__).parent
OWNERS = ("policy", "training", "weights", "engines")
"""``weights`` is handed the model by the trainer; an engine has a model of its own."""
OF_A_MODEL = {
    *(
        "parameters",
        "named_parameters",
        "state_dict",
        "load_state_dict",
        "named_modules",
        "get_submodule",
    ),
    *(
        "register_forward_hook",
        "get_input_embeddings",
        "get_output_embeddings",
        "zero_grad",
        "backward",
        "requires_grad_",
    ),
}
OF_AN_ENGINE = {"faults/at_load.py"}
"""Holds the model of an engine in this process at its old weights: that one is no trainer's."""
PASSED_ON = {"faults/trainer.py"}
"""Stands between two functions of the owner's and hands the model from one to the other."""
MODEL = {"model", "head", "head_bias"}
RECORDS = {"recipe", "loaded", "manifest", "good", "given"}
"""Of these ``model`` is a section or path: of a recipe, a manifest, a diagnosed pair, the command line."""
HANDED = {"model", "policy"}
TYPES = {"Policy", "Module", "PreTrainedModel"}
UNTOLD = {"Any", "object"}
"""A parameter of that type, or of none, is what its name says."""
BY_NAME = {"getattr", "setattr", "delattr", "hasattr", "attrgetter", "methodcaller", "__getattribute__"}
WHOLE = {"__dict__", "__getstate__"}


@cache
def private() -> frozenset[str]:
    """Attributes of a model, and what the trainer keeps to itself."""
    tree = ast.parse((SOURCE / "training" / "trainer.py").read_text())
    (trainer,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Trainer"]
    own = {
        node.attr for node in ast.walk(trainer) if isinstance(node, ast.Attribute) and "self" in dump(node)
    }
    methods = {node.name for node in trainer.body if isinstance(node, ast.FunctionDef)}
    return frozenset(OF_A_MODEL | {name for name in own | methods if re.match("_[^_]", name)})


@cache
def takers() -> dict[str, frozenset[str]]:
    """Module of an owner → its functions that are handed the model."""
    found = {}
    for path in (path for room in ("policy", "training") for path in (SOURCE / room).glob("*.py")):
        functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        taking = frozenset(node.name for node in functions if handed(node.args))
        found[f"lockstep.{path.parent.name}.{path.stem}"] = taking
    return found


def dump(node: ast.AST | None) -> str:
    return "" if node is None else ast.unparse(node)


def handed(arguments: ast.arguments) -> bool:
    """True where one of the parameters is a model, by its name or its type."""
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        words = set(re.findall(r"\w+", dump(argument.annotation)))
        if words & TYPES or (argument.arg in HANDED and words <= UNTOLD):
            return True
    return False


def reaches(tree: ast.AST) -> list[str]:
    """Where the code touches a model, takes one, or takes what the owner keeps to itself."""
    return [f"{node.lineno}: {dump(node)[:80]}" for node in ast.walk(tree) if _reach(node)]


def _reach(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        of = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        own = of == "self" and node.attr not in OF_A_MODEL  # a name that another class has for its own
        return (node.attr in private() and not own) or (
            (node.attr in MODEL and of not in RECORDS) or (node.attr in WHOLE and of in ("trainer", "policy"))
        )
    if isinstance(node, ast.Call):
        name = dump(node.func).rpartition(".")[2]
        words = {a.value for a in node.args if isinstance(a, ast.Constant)}
        about = {dump(a).rpartition(".")[2] for a in node.args}
        if name in BY_NAME:
            return bool(words & private()) or (not words and "trainer" in about)
        return name == "vars" and "trainer" in about
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        return handed(node.args)
    if isinstance(node, ast.ImportFrom):
        return any(alias.name in takers().get(node.module or "", ()) for alias in node.names)
    return False


def test_nothing_outside_of_its_owner_reaches_into_the_model():
    files = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in OWNERS]
    assert len(files) > 60
    found = {str(path.relative_to(SOURCE)): reaches(ast.parse(path.read_text())) for path in files}
    found = {path: where for path, where in found.items() if where}
    assert {path: where for path, where in found.items() if path not in OF_AN_ENGINE | PASSED_ON} == {}
    assert all("policy, temperature" in where for path in PASSED_ON for where in found[path]), (
        "no other reach"
    )


@pytest.mark.parametrize(
    "code",
    [
        "pair.trainer._policy",
        "pair.trainer._optimizer.masters",
        "pair.trainer._publisher",
        "pair.policy.model.dtype",
        "policy.head.shape",
        "loss.backward()",
        "getattr(pair.trainer, '_policy')",
        "getattr(pair.trainer, name)",
        "setattr(trainer, '_optimizer', None)",
        "operator.attrgetter('_policy')(pair.trainer)",
        "object.__getattribute__(trainer, '_policy')",
        "vars(pair.trainer)",
        "pair.trainer.__dict__",
        "lambda model: model",
        "def f(policy): pass",
        "def f(model: Any): pass",
        "def f(x: 'Policy'): pass",
        "def f(x: nn.Module): pass",
        "from lockstep.policy.parameters import parameters_of",
        "from lockstep.policy.fingerprint import weights_digest",
        "from lockstep.training.rehearsal import rehearse",
    ],
)
def test_a_reach_is_seen(code):
    assert len(reaches(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "recipe.model.path",
        "self.recipe.model",
        "self._recipe",
        "getattr(sampling, name)",
        "def f(model: str): pass",
        "from lockstep.policy.parameters import Snapshot",
        "from lockstep.policy.fingerprint import tokenizer_digest",
        "pair.trainer.score(groups, 1.0)",
    ],
)
def test_what_is_no_reach_is_left_alone(code):
    assert reaches(ast.parse(code)) == []
