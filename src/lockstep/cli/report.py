"""``lockstep report PATH``: one page of HTML, and the report.json that it is made of."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lockstep.cli.console import Console, emit, show
from lockstep.cli.flags import Json
from lockstep.errors import UsageError


def report(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run, a check's --out, a report.json, or what check, diagnose, faults, compare or upgrade "
            "--json said."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where report.json and report.html go; beside what they are of.")
    ] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="Follow a run in the browser: show the page's address, write nothing."),
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --live: of 127.0.0.1; 0 takes a free one.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Write what there is to know of it on one page: words first, no request leaves it, no torch is needed.

    With --live the page is served to this machine alone, under an address with a token that nobody guesses,
    and follows the run until Ctrl-C.

    Exit code: 0 when it is written, whatever the verdict on it; 2 usage, 3 when something cannot be read;
    130 after Ctrl-C.
    """
    if live:
        if out is not None or as_json:
            got = "--out" if out is not None else "--json"
            expected = "neither: it writes no file, and its one line on stdout is the address"
            hint = f"lockstep report --live {path}"
            raise UsageError("flag --live", got=got, expected=expected, hint=hint)
        _follow(path, port)
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


def _follow(path: Path, port: int) -> NoReturn:
    from lockstep.report.live import Followed, serving

    followed = Followed(path)
    with serving(followed, port) as address:
        show(address)
        # A pipe is buffered, and who reads the address from it waits for it before anything else is said.
        sys.stdout.flush()
        followed.follow(Console().say)
