"""``lockstep report PATH``: one page of HTML, and the report.json that it is made of."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.cli.console import emit, show
from lockstep.cli.flags import Json


def report(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run, a check's --out, or what check, diagnose, faults, compare or upgrade --json said."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where report.json and report.html go; beside what they are of.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what there is to know of it on one page: words first, no request leaves it, no torch is needed.

    Exit code: 0 when it is written, whatever the verdict on it; 2 usage, 3 when something cannot be read.
    """
    from lockstep.report.document import write_report
    from lockstep.report.of_documents import of_path
    from lockstep.report.page import page
    from lockstep.runs.durable import make_directory, write_atomically

    made = of_path(path)
    directory = out or (path if path.is_dir() else path.parent)
    make_directory(directory)
    data, html = directory / "report.json", directory / "report.html"
    write_report(data, made)
    write_atomically(html, page(made).encode())
    if as_json:
        emit("report", {"verdict": made.status, "kind": made.kind, "data": str(data), "page": str(html)})
    else:
        for sentence in made.words:
            show(sentence)
        show(f"page: {html}")
