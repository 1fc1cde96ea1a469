"""Same word, same thing: no two classes of the package share a name, and none is an alias elsewhere.

And a docstring is read alone: none begins with *Of*, which leaves the thing itself to the name above it.
"""

import ast
from collections import defaultdict
from pathlib import Path

import lockstep

ROOT = Path(lockstep.__file__).parent


def test_no_class_has_the_name_of_another_thing():
    classes = defaultdict(list)
    aliases = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(where)
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                aliases[node.targets[0].id].append(where)
    twice = {
        name: files + aliases[name] for name, files in classes.items() if len(files) + len(aliases[name]) > 1
    }
    assert not twice, "rename one of each to what it is"


def test_no_docstring_begins_in_the_middle_of_a_sentence():
    fragments = [
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno}: {node.value.value[:60]}"
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and str(node.value.value).startswith("Of ")
    ]
    assert not fragments, "say what it is, not of what"
