"""Functions of at most 60 lines, modules of at most 400, no exceptions. Run by ``make check``."""

import ast
import sys
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


def main() -> int:
    """Exit code 1 if anything is too long."""
    files = sorted(path for folder in FOLDERS for path in Path(folder).rglob("*.py"))
    found = [line for path in files for line in too_long(path)]
    print("\n".join([*found, f"sizes: {len(files)} files, {len(found)} too long"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
