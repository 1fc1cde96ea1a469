"""What no linter of ours holds. Run by ``make check``.

Functions of at most 60 lines, modules of at most 400, no exceptions.

One assignment a line: several at once only where the values are one expression but for one name or constant
(``low, high = min(values), max(values)``), or where one after the other would be another thing (a swap).
Values that are nothing but a name are no expression; constants are of one type; two attributes of one thing
have a word in common (``clip.clip_low, clip.clip_high``). Unpackings of one value are not meant.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_FUNCTION, MAX_MODULE = 60, 400
FOLDERS = ("src", "tests", "benchmarks", "examples")


def too_long(path: Path) -> list[str]:
    """One line for each function of the file that is too long, and for the file itself."""
    source = path.read_text(encoding="utf-8")
    n_lines = source.count("\n")
    found = [f"{path}:1: module of {n_lines} lines, at most {MAX_MODULE}"] if n_lines > MAX_MODULE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
    return found


def unrelated(path: Path) -> list[str]:
    """One line for each assignment of the file that is several."""
    return [
        f"{path}:{node.lineno}: one assignment a line: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
        and len(node.targets[0].elts) == len(node.value.elts)
        and not swaps(node.targets[0].elts, node.value.elts)
        and (texts(node.targets[0].elts, node.value.elts) or not alike(node.value.elts))
    ]


def swaps(targets: Sequence[ast.expr], values: Sequence[ast.expr]) -> bool:
    """True where a later value reads an earlier target, which would have changed by then."""
    return any(
        ast.unparse(node) == ast.unparse(target)
        for place, target in enumerate(targets)
        for value in values[place + 1 :]
        for node in ast.walk(value)
        if isinstance(node, ast.Name | ast.Attribute | ast.Subscript)
    )


def texts(targets: Sequence[ast.expr], values: Sequence[ast.expr]) -> bool:
    """Sentences are never of one form, whatever the tree says; constants that are texts may be."""
    local = all(isinstance(target, ast.Name) and target.id.islower() for target in targets)
    return local and all(place(value) == "text" for value in values)


def alike(values: Sequence[ast.expr]) -> bool:
    """True where they are the same expression but for one place, of the same kind there."""
    if all(isinstance(value, ast.Name) for value in values) or len(set(map(types, values))) > 1:
        return False
    first, *others = ([*places(value)] for value in values)
    return all(
        len(first) == len(other)
        and all(ours[0] == theirs[0] for ours, theirs in zip(first, other, strict=True))
        and sum(ours != theirs for ours, theirs in zip(first, other, strict=True)) <= 1
        and all(related(ours, theirs) for ours, theirs in zip(first, other, strict=True) if ours != theirs)
        for other in others
    )


def types(value: ast.expr) -> frozenset[type]:
    """Of the constants that a constant is made of; of anything else none."""
    if not place(value):
        return frozenset()
    return frozenset(type(node.value) for node in ast.walk(value) if isinstance(node, ast.Constant))


def related(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Attributes have a word in common; what else may differ is of one kind already."""
    if one[0] != "attribute":
        return True
    return bool(set(one[1].strip("_").split("_")) & set(other[1].strip("_").split("_")))


def places(tree: object) -> Iterator[tuple[str, str]]:
    """(kind, content) of each node, in order; constants, and sums of them, have no parts."""
    if isinstance(tree, ast.AST):
        kind = place(tree)
        if kind:
            yield kind, ast.dump(tree)
            return
        if isinstance(tree, ast.operator):  # another one is another content, and no other form
            kind = "operator"
        yield kind or type(tree).__name__, type(tree).__name__
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Attribute):  # of one thing, in two ways
            yield from places(tree.func.value)
            yield "method", tree.func.attr
            yield from places([tree.args, tree.keywords])
            return
        if isinstance(tree, ast.Attribute):
            yield from places(tree.value)
            yield "attribute", tree.attr
            return
        for name, part in ast.iter_fields(tree):
            if name != "ctx":
                yield from places(part)
    elif isinstance(tree, list):
        yield "list", str(len(tree))
        for part in tree:
            yield from places(part)
    else:
        yield "name", repr(tree)


def place(tree: ast.AST) -> str:
    """Of what kind a constant is; empty for anything else."""
    if isinstance(tree, ast.JoinedStr) or (isinstance(tree, ast.Constant) and isinstance(tree.value, str)):
        return "text"
    if isinstance(tree, ast.Constant):
        return "bytes" if isinstance(tree.value, bytes) else "constant"
    parts = ast.BinOp | ast.UnaryOp | ast.Constant | ast.operator | ast.unaryop
    sums = isinstance(tree, ast.BinOp | ast.UnaryOp)
    return "constant" if sums and all(isinstance(node, parts) for node in ast.walk(tree)) else ""


def main() -> int:
    """Exit code 1 if anything is too long, or assigned with something else."""
    files = sorted(path for folder in FOLDERS for path in Path(folder).rglob("*.py"))
    found = [line for path in files for line in too_long(path)]
    several = [line for path in files for line in unrelated(path)]
    print("\n".join([*found, *several, f"sizes: {len(files)} files, {len(found)} too long"]))
    return bool(found or several)


if __name__ == "__main__":
    sys.exit(main())
