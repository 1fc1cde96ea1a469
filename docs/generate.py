"""Write docs/reference/ from the code: ``python docs/generate.py``; ``--check``: say whether it is fresh."""

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import typer

from lockstep.cli.main import app
from lockstep.config.imported import imported
from lockstep.faults.catalogue import FAULTS
from lockstep.metrics.aliases import ALIASES
from lockstep.metrics.catalog import METRICS
from lockstep.objectives import advantages, aggregation, corrections
from lockstep.objectives.catalogue import OBJECTIVES
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


def metrics() -> str:
    """Every figure of the catalog, and what other systems call it."""
    lines = [
        "# Figures",
        "",
        "What stands in `metrics.jsonl`, and what `lockstep metrics` prints. ℓ is the log-probability of a "
        "sampled token, n how many there are; ratios are taken before anything bounds them, unless it says "
        "*after*. *Reduction* is how many numbers become one. Made by `docs/generate.py`.",
        "",
        "| figure | unit | formula | estimator | reduction | over | bounds | denominator | non-finite |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in METRICS:
        of = (m.reduction, m.mask, m.clipping, m.denominator, m.nan_rule)
        cells = (m.unit, f"`{m.formula}`", m.estimator, *of)
        lines.append(f"| `{m.name}` | {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    lines += ["", "## Other systems' names", ""]
    lines += ["| system | its name | ours | |", "|---|---|---|---|"]
    lines += [f"| {a.system} | `{a.name}` | {f'`{a.ours}`' if a.ours else ''} | {a.told} |" for a in ALIASES]
    return "\n".join(lines) + "\n"


def objectives() -> str:
    """Every objective that comes with Lockstep, its options, and what several share."""
    parts = [
        "# Objectives",
        "`objective.name`, and the options of each: `[objective.options]`. What is said of each stands at "
        "the head of its file in `src/lockstep/objectives/`. Made by `docs/generate.py`.",
    ]
    told: dict[str, str] = {}
    for name, known in OBJECTIVES.items():
        function = imported(known.function, "objective.name")
        module = known.function.partition(":")[0].rpartition(".")[2]
        head = inspect.cleandoc(inspect.getmodule(function).__doc__).replace("``", "`")
        head = f"More of it under [{told[module]}](#{told[module]})." if module in told else head
        told.setdefault(module, name)
        said = inspect.cleandoc(function.__doc__).partition("\n\nArgs:")[0].replace("``", "`")
        rows = [f"| `{key}` | of `[objective]` | the range that ratios are held in |" for key in known.keys]
        for field in msgspec.structs.fields(known.options):
            default = field.default if isinstance(field.default, str) else f"{field.default:g}"
            rows.append(f"| `options.{field.name}` | {default} | {_said_of(known.options, field.name)} |")
        table = "\n".join(["| | default | |", "|---|---|---|", *rows])
        own = f"Advantages: `{known.advantage}`. `objectives/{module}.py`."
        parts.append(f"## {name}\n\n{said}\n\n{head}\n\n{own}\n\n{table}")
    for title, module in (
        ("Advantages", advantages),
        ("Aggregations", aggregation),
        ("Corrections", corrections),
    ):
        text = inspect.cleandoc(module.__doc__).replace("``", "`")
        parts.append(f"## {title}: `objective.{title.lower().removesuffix('s')}`\n\n{text}")
    return "\n\n".join(parts) + "\n"


def _said_of(options: type, field: str) -> str:
    """What stands under a field in the source; under the field before where that is said of both."""
    body = ast.parse(inspect.getsource(options)).body[0].body
    said, name = {}, ""
    for line in body:
        if isinstance(line, ast.AnnAssign):
            name = line.target.id
        elif name:
            said[name] = " ".join(line.value.value.split()).replace("``", "`")
    return said.get(field, "")


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


PAGES = {
    "causes.md": causes,
    "commands.md": commands,
    "faults.md": faults,
    "metrics.md": metrics,
    "objectives.md": objectives,
}


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
