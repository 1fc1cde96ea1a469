"""Nothing outside of its owner reaches into the trainer's model.

The import contract keeps its types away; this, its tensors.
"""

import ast
from pathlib import Path

import lockstep

SOURCE = Path(lockstep.__file__).parent
OWNERS = ("policy", "training", "weights", "engines")
"""``weights`` is handed the model by the trainer; an engine has a model of its own."""
OF_A_MODEL = {
    *(
        "_policy",
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
MODEL = {"model", "head", "head_bias"}
RECORDS = {"recipe", "loaded", "manifest", "good", "given"}
"""Of these ``model`` is a section or path: of a recipe, a manifest, a diagnosed pair, the command line."""


def reaches(tree: ast.AST) -> list[str]:
    """Attributes of a model that the code touches."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder = (
                node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            )
            if node.attr in OF_A_MODEL or (node.attr in MODEL and holder not in RECORDS):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_outside_of_its_owner_reaches_into_the_model():
    files = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in OWNERS]
    assert len(files) > 60
    found = {str(path.relative_to(SOURCE)): reaches(ast.parse(path.read_text())) for path in files}
    assert {path: where for path, where in found.items() if where and path not in OF_AN_ENGINE} == {}


def test_a_reach_is_seen():
    own = "recipe.model.path; self.recipe.model"
    code = f"pair.trainer._policy; pair.policy.model.dtype; policy.head.shape; loss.backward(); {own}"
    assert len(reaches(ast.parse(code))) == 4
