"""Reports of what verbs print with ``--json``, and of a report.json itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lockstep.errors import RunError, UsageError
from lockstep.records.verdicts import LAYERS, Verdict
from lockstep.report.build import ladder_sections, ladder_words, of_check, of_run, planted_words, shown
from lockstep.report.compare import Comparison
from lockstep.report.document import SCHEMA, Report, Section, Table
from lockstep.report.of_comparison import of_comparison
from lockstep.report.of_upgrade import of_upgrade
from lockstep.runs.read import open_run
from lockstep.runs.strict import exact, read_document


def of_path(path: Path) -> Report:
    """The report of a run, of a check's directory, or of a document that a verb wrote or printed.

    Raises:
        UsageError: for a path that is none of them.
        RunError: for a damaged one.
    """
    if path.is_dir():
        return of_run(open_run(path)) if (path / "manifest.json").is_file() else of_check(path)
    if not path.is_file():
        expected = "a run, a check's --out, or a file of a verb's --json"
        raise UsageError(f"path {path}", got="nothing there", expected=expected, hint="ls runs/")
    return of_document(read_document(path, "lockstep VERB … --json > FILE"), path.name)


def of_document(table: Mapping[str, Any], name: str) -> Report:
    """The report of one JSON document.

    Raises:
        UsageError: for a schema that has none.
        RunError: for a document that is not what its schema says.
    """
    schema = str(table.get("schema"))
    build = DOCUMENTS.get(schema)
    if build is None:
        expected = f"one of {', '.join(DOCUMENTS)}"
        hint = "lockstep report RUN"
        raise UsageError(f"file {name}", got=f"schema {schema!r}", expected=expected, hint=hint)
    try:
        return build(exact(dict(table)), name)
    except (ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise RunError(f"file {name}", got=got, expected=schema, hint="make the document anew") from error


def _of_ladder(table: Mapping[str, Any], name: str) -> Report:
    # What --json adds to a verdict for its readers is no field of one.
    rows = [{key: value for key, value in row.items() if key != "verdict"} for row in table["layers"]]
    verdicts = [msgspec.convert(row, Verdict) for row in rows]
    words = ladder_words(verdicts)
    if table.get("planted"):
        words.insert(0, planted_words(table["planted"]))
    if table.get("note"):
        words.append(str(table["note"]))
    return Report(
        kind="check",
        title=f"Check, {name}",
        status=table["verdict"],
        words=tuple(words),
        sections=ladder_sections(verdicts),
    )


def _of_diagnosis(table: Mapping[str, Any], name: str) -> Report:
    ablation = table["ablation"]
    low, high = ablation["ci95"]
    names = (
        [key for key in ablation["factors"][0] if key not in ("name", "flag")] if ablation["factors"] else []
    )
    rows = tuple((f["name"], *(shown(f[key]) for key in names), f["flag"]) for f in ablation["factors"])
    columns = ("factor", *(key.replace("_nats", ", nats").replace("_", " ") for key in names), "mend")
    factors = Table(title="Setting by setting", columns=columns, rows=rows)
    left = "what arithmetic brings" if table["explained"] else "unexplained; lockstep check names the layer"
    words = [
        f"The gap is {ablation['total_nats']:.5f} nats per token in the mean (95 % {low:.5f} to {high:.5f}).",
        f"With every factor mended {ablation['unexplained_nats']:.5f} nats are left: {left}.",
    ]
    words += [
        f"{one} and {other} cancel: mended together they take off {nats:.5f} nats more than each alone."
        for one, other, nats in ablation.get("cancel", ())
    ]
    return Report(
        kind="diagnose",
        title=f"Diagnosis, {name}",
        status="PASS" if table["explained"] else "FAIL",
        words=tuple(words),
        sections=(Section(title="Factors", tables=(factors,)),),
    )


def _of_campaign(table: Mapping[str, Any], name: str) -> Report:
    outcomes = table["outcomes"]
    named = [key for row in table["matrix"].values() for key in row]
    columns = tuple(dict.fromkeys([*LAYERS, "none", *named]))
    matrix = tuple(
        (row, *(str(cells.get(c, "·")) for c in columns)) for row, cells in table["matrix"].items()
    )
    tables = (
        Table(title="Planted (rows) and named (columns)", columns=("planted", *columns), rows=matrix),
        Table(
            title="Each fault",
            columns=("fault", "planted in", "verdict", "named", "evidence"),
            rows=tuple(map(_outcome, outcomes)),
        ),
    )
    not_run = sum(bool(o["not_run"]) for o in outcomes)
    words = (
        f"{table['hits']} of {len(outcomes) - not_run} were named as planted, {table['missed']} were not; "
        f"{not_run} could not be planted here.",
    )
    status = "FAIL" if table["missed"] else "PASS" if table["hits"] else "NOT_RUN"
    return Report(
        kind="faults",
        title=f"Planted faults, {name}",
        status=status,
        words=words,
        sections=(Section(title="Confusion matrix", tables=tables),),
    )


def _outcome(o: Mapping[str, Any]) -> tuple[str, ...]:
    verdict = "NOT_RUN" if o["not_run"] else "PASS" if o["hit"] else "FAIL"
    named = ", ".join(filter(None, (o["found_layer"], o["found_cause"].replace("_", " ")))) or "nothing"
    return o["name"], o["planted_layer"] or "nothing", verdict, named, o["not_run"] or o["evidence"]


def _of_comparison(table: Mapping[str, Any], name: str) -> Report:
    return of_comparison(msgspec.convert(table["comparison"], Comparison))


def _itself(table: Mapping[str, Any], name: str) -> Report:
    """A ``report.json``, whose page may be made anew where what it was of is not at hand."""
    return msgspec.convert(table, Report)


DOCUMENTS: dict[str, Callable[[Mapping[str, Any], str], Report]] = {
    "lockstep.check/1": _of_ladder,
    "lockstep.check-log/1": _of_ladder,
    "lockstep.diagnose/1": _of_diagnosis,
    "lockstep.faults/1": _of_campaign,
    "lockstep.compare/1": _of_comparison,
    "lockstep.upgrade/1": of_upgrade,
    SCHEMA: _itself,
}
"""Schema of a document → what makes its report."""
