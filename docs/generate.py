"""Write docs/reference/ from the code: ``python docs/generate.py``; ``--check``: say whether it is fresh."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from lockstep.cli.main import app
from lockstep.faults.catalogue import FAULTS
from lockstep.parity.causes import CAUSES
from lockstep.records.verdicts import LAYERS

REFERENCE = Path(__file__).parent / "reference"


def causes() -> str:
    """Every cause that the ladder can name."""
    parts = [
        "# Causes",
        "Every cause that `lockstep check` can name, in the order of the layers. "
        "A fix that an engine's adapter knows for its own version is shown by the check itself. "
        "Made by `docs/generate.py`.",
    ]
    for layer in LAYERS:
        parts.append(f"## {layer}")
        for name, cause in CAUSES.items():
            if cause.layer == layer:
                planted = [f"`{fault.name}`" for fault in FAULTS.values() if fault.cause == name]
                parts.append(
                    f"### {name}\n\n{cause.means}\n\n*Found by:* {cause.found_by}\n\n*Mend:* {cause.mend}"
                    + (f"\n\n*Planted as:* {', '.join(planted)}" if planted else "")
                )
    return "\n\n".join(parts) + "\n"


def faults() -> str:
    """Every fault that can be planted."""
    lines = [
        "# Planted faults",
        "",
        "What `lockstep faults` plants in a real engine and a real trainer, and what must be named for it. "
        "Made by `docs/generate.py`.",
        "",
        "| fault | layer | cause | how | engine generations |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {f.name} | {f.layer} | {f.cause} | {f.how} | {', '.join(f.generations)} |"
        for f in FAULTS.values()
    ]
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Every command with its arguments and options, as ``--help`` has them; hidden flags are left out."""
    parts = [
        "# Commands",
        "Exit codes: 0 PASS, 1 FAIL, 2 usage or configuration, 3 could not run or NOT_RUN. "
        'With `--json` one document is on stdout, `"schema": "lockstep.<verb>/1"`; '
        "what goes on is told on stderr. Made by `docs/generate.py`.",
    ]
    parts += [part for verb in _verbs(typer.main.get_command(app), "lockstep") for part in verb]
    return "\n\n".join(parts) + "\n"


def _verbs(command, name: str) -> Iterator[list[str]]:
    below = getattr(command, "commands", {})
    for verb in sorted(below):
        yield from _verbs(below[verb], f"{name} {verb}")
    if not below:
        rows = [_row(parameter) for parameter in command.params if not parameter.hidden]
        yield [f"## {name}", inspect.cleandoc(command.help), "\n".join(["| | |", "|---|---|", *rows])]


def _row(parameter) -> str:
    name = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
    takes = f" {parameter.metavar}" if parameter.metavar else ""
    other = "".join(f", `{flag}`" for flag in parameter.secondary_opts)
    default = (
        parameter.default if isinstance(parameter.default, str | Path) and parameter.default != "" else None
    )
    said = parameter.help + (f" Default: `{default}`." if default is not None else "")
    return f"| `{name}{takes}`{other} | {said.replace('|', chr(92) + '|')} |"


PAGES = {"causes.md": causes, "commands.md": commands, "faults.md": faults}


def main() -> int:
    """Write, or compare."""
    stale = [name for name, page in PAGES.items() if not _same(REFERENCE / name, page())]
    if "--check" in sys.argv:
        print(
            f"out of date: {', '.join(stale)}; run python docs/generate.py"
            if stale
            else "docs/reference is up to date"
        )
        return 1 if stale else 0
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
