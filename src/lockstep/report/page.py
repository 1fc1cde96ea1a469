"""One HTML file from a :class:`Report`, and from nothing else: no clock, no file of the run, no request.

Of a run that is followed (``live.py``) it is the same page, and asks its own server whether there is a newer.

What the browser may do is said in the page itself: scripts and styles by their SHA-256, nothing else at all.
All text is escaped here, whoever wrote it; plots come twice, drawn by uPlot where scripts run, and as SVG for
print and where they do not.
"""

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from math import isfinite, nan

import msgspec
from msgspec import Struct

from lockstep.records.printable import OBEYED, escaped, printable
from lockstep.report.document import Line, Plot, Report, Section, ShownRollout, Table, Token
from lockstep.report.svg import svg
from lockstep.runs.strict import plain

MARKS = {"PASS": "✓", "FAIL": "✗", "NOT_RUN": "–"}
MEND = " Mend: "
"""What follows it in a sentence is to be copied."""
WORST_SHOWN = 8
"""Tokens of a completion in its table."""
NUMBER = re.compile(r"[+\-−]?[\d.,]+(e[+-]?\d+)?%?|nan|-?inf|·")
NO_NUMBER = ("", "–", "not measured")
"""What may stand in a column of numbers."""
SHORT = 24
"""Characters: up to these a cell is not broken over lines; a column of longer ones is given room."""
SHOWN_AS_MARK = re.compile(f"{OBEYED.pattern}|[\\t\\n\\u00ad\\u200b-\\u200d\\u2060\\ufeff]")
"""On a page also what is invisible: tab, line end, soft hyphen, spaces and joiners without width."""


class Live(Struct, frozen=True, kw_only=True):
    """What a page that follows a run says of it; as ``state.json`` what it asks for."""

    version: int
    """Another one: another page."""
    words: str
    """How the run stands."""


def page(report: Report, live: Live | None = None) -> str:
    """The whole page; with ``live``, one that follows its run."""
    style = _asset("vendor/uPlot.min.css") + _asset("assets/page.css")
    script = _script(live is not None)
    plots = [plot for section in report.sections for plot in section.plots]
    numbers = iter(range(len(plots)))  # over all sections: a plot is found by its number among all data
    sections = "".join(_section(at, section, numbers) for at, section in enumerate(report.sections))
    links = "".join(f'<a href="#s{at}">{text(s.title)}</a> ' for at, s in enumerate(report.sections))
    # A page that is kept asks nobody for anything; one that follows a run asks where it came from.
    asks = "" if live is None else "connect-src 'self'; "
    csp = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        f"{asks}base-uri 'none'; form-action 'none'"
    )
    words = "".join(_sentence(sentence, first=at == 0) for at, sentence in enumerate(report.words))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{csp}">
<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer"
content="no-referrer"> <title>{text(report.title)}: {report.status}</title><link rel="icon" href="data:,">
<style>{style}</style></head><body>
<a class="skip" href="#main">Skip to the report</a>
<header><h1>{text(report.title)} {_status(report.status)}</h1>
<nav aria-label="Sections">{links}</nav></header>
<main id="main" tabindex="-1">{_stands(live)}<section aria-label="In words">{words}</section>
{sections}{_downloads(report)}</main>
<footer><p class="dim">Lockstep {text(report.lockstep_version)}, {text(report.schema)}. Plots: uPlot 1.6.32,
MIT.</p></footer> <script type="application/json" id="plots">{
        _json([_plot_data(plot) for plot in plots])
    }</script> <script>{script}</script></body></html>
"""


def _sentence(sentence: str, *, first: bool) -> str:
    """A paragraph; what mends it on a line of its own."""
    said, mend, how = sentence.partition(MEND)
    way = f'<span class="mend">Mend: <code>{text(how)}</code></span>' if mend else ""
    lead = ' class="lead"' if first else ""
    return f"<p{lead}>{text(said)}{way}</p>"


def _stands(live: Live | None) -> str:
    return f'<p id="live" role="status" data-version="{live.version}">{text(live.words)}</p>' if live else ""


def text(value: str) -> str:
    """Anyone's text as HTML: escaped, and what a reader would obey instead of seeing as a marked escape."""
    parts = []
    end = 0
    for found in SHOWN_AS_MARK.finditer(value):
        parts += [html.escape(value[end : found.start()]), f'<i class="ctl">{_mark(found[0])}</i>']
        end = found.end()
    return "".join([*parts, html.escape(value[end:])])


def _mark(character: str) -> str:
    named = {"\n": "\\n", "\t": "\\t"}
    return named.get(character) or html.escape(escaped(character, "\\x{:02x}"))


def _section(at: int, section: Section, numbers: Iterator[int]) -> str:
    words = "".join(f"<p>{text(sentence)}</p>" for sentence in section.text)
    tables = "".join(_table(table) for table in section.tables)
    plots = "".join(_plot(plot, next(numbers)) for plot in section.plots)
    plots = f'<div class="plots">{plots}</div>' if plots else ""
    rollouts = "".join((TINTS if section.rollouts else "", *map(_rollout, section.rollouts)))
    head = f'<h2 id="s{at}">{text(section.title)}</h2>'
    return f'<section aria-labelledby="s{at}">{head}{words}{plots}{tables}{rollouts}</section>\n'


def _status(status: str) -> str:
    return f'<span class="status {status}"><span aria-hidden="true">{MARKS[status]} </span>{status}</span>'


def _table(table: Table) -> str:
    kinds = [_kind([row[at] for row in table.rows]) for at in range(len(table.columns))]
    columns = zip(kinds, table.columns, strict=True)
    head = "".join(f'<th scope="col"{kind}>{text(name)}</th>' for kind, name in columns)
    rows = "".join("<tr>" + "".join(map(_cell, kinds, row)) + "</tr>" for row in table.rows)
    body = rows or f'<tr><td colspan="{len(table.columns)}">none</td></tr>'
    note = f'<p class="dim">{text(table.note)}</p>' if table.note else ""
    label = html.escape(printable(table.title), quote=True)
    inner = (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )
    if table.folded:
        return f"<details><summary>{text(table.title)}</summary>{inner}</details>"
    return f"<h3>{text(table.title)}</h3>{inner}"


def _kind(cells: Sequence[str]) -> str:
    """The class of a column: numbers, short words, or sentences."""
    if any(map(NUMBER.fullmatch, cells)) and all(NUMBER.fullmatch(c) or c in NO_NUMBER for c in cells):
        return ' class="n"'
    return ' class="s"' if max(map(len, cells), default=0) <= SHORT else ' class="t"'


def _cell(kind: str, value: str) -> str:
    return f"<td{kind}>{_status(value) if value in MARKS else text(value)}</td>"


def _plot(plot: Plot, number: int) -> str:
    unit = f", {plot.unit}" if plot.unit not in ("", "1") else ""
    return (
        f"<figure><figcaption>{text(plot.title)}{text(unit)}</figcaption>"
        f'<div class="live" data-plot="{number}" aria-hidden="true"></div>'
        f'<div class="static">{svg(plot, _said(plot))}</div>'
        f'<p class="dim">{text(_said(plot))}</p></figure>'
    )


def _said(plot: Plot) -> str:
    """The plot in words: first, last, least and largest of each line; of bars the highest."""
    return "; ".join(f"{line.name}: {_said_of(line, plot)}" for line in plot.lines)


def _said_of(line: Line, plot: Plot) -> str:
    values = [value for value in line.ys if isfinite(value)]
    if not values:
        return "no value"
    least, most = min(values), max(values)
    if plot.log_x:
        return f"most, {most:.3g}, at {plot.xs[line.ys.index(most)]:.2g}"
    said = f"{values[0]:.4g} → {values[-1]:.4g}, between {least:.4g} and {most:.4g}"
    if least == most:
        said = f"{most:.4g}" if len(values) == 1 else f"{most:.4g} throughout"
    lost = len(line.ys) - len(values)
    return f"{said}, {lost} without a value" if lost else said


def _plot_data(plot: Plot) -> dict:
    def finite(values: tuple[float, ...]) -> list[float | None]:
        return [value if isfinite(value) else None for value in values]

    lines = [
        {
            "name": printable(line.name),
            "ys": finite(line.ys),
            "low": finite(line.low),
            "high": finite(line.high),
        }
        for line in plot.lines
    ]
    return {"xs": list(plot.xs), "x": plot.x_label, "log": plot.log_x, "lines": lines}


def _tints() -> str:
    """The grades of :func:`_token`, each on its own tint."""
    grades = "".join(f'<span class="g{grade}">from {grade}/6</span>' for grade in range(1, 6))
    missing = '<span class="gx">a number is missing</span>'
    return f'<p class="tokens key">|gap| over the largest of its completion: {grades}{missing}</p>'


TINTS = _tints()


def _rollout(rollout: ShownRollout) -> str:
    gaps = [abs(token.trainer - token.engine) for token in rollout.tokens]
    largest = max((gap for gap in gaps if isfinite(gap)), default=nan)
    spans = "".join(_token(token.text, gap, largest) for token, gap in zip(rollout.tokens, gaps, strict=True))
    left = f"{rollout.left_out:,} tokens after these are left out."
    more = f'<p class="dim">{left}</p>' if rollout.left_out else ""
    facts = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rollout.facts
    )
    order = sorted((at for at, gap in enumerate(gaps) if isfinite(gap)), key=lambda at: -gaps[at])
    rows = tuple(_token_row(at, rollout.tokens[at]) for at in order[:WORST_SHOWN])
    columns = ("place", "token", "engine", "trainer", "gap, nats")
    title = f"Tokens with the largest gaps: {rollout.title}"
    worst = _table(Table(title=title, columns=columns, rows=rows, folded=True))
    return (
        f'<article><h3>{text(rollout.title)}</h3><dl class="facts">{facts}</dl>'
        f'<div class="tokens">{spans}</div>{more}{worst}</article>'
    )


def _token_row(at: int, token: Token) -> tuple[str, ...]:
    gap = token.trainer - token.engine
    return str(at), token.text, f"{token.engine:.6f}", f"{token.trainer:.6f}", f"{gap:+.2e}"


def _token(shown: str, gap: float, largest: float) -> str:
    marked = text(shown).replace("\\n</i>", "\\n</i>\n")  # a line end is seen, and ends the line
    if not isfinite(largest):
        return f"<span>{marked}</span>"  # none has a number, and its facts say so
    if not isfinite(gap):
        return f'<span class="gx">{marked}</span>'
    grade = min(5, int(6.0 * gap / largest)) if largest > 0.0 else 0
    return f'<span class="g{grade}">{marked}</span>' if grade else f"<span>{marked}</span>"


def _downloads(report: Report) -> str:
    own = msgspec.json.format(msgspec.json.encode(plain(report)), indent=1).decode()
    files = [("report.json", "application/json", own), *((d.name, d.mime, d.text) for d in report.downloads)]
    links = "".join(f"<li>{_download(*file)}</li>" for file in files)
    return f'<section aria-labelledby="dl"><h2 id="dl">Downloads</h2><ul>{links}</ul></section>'


def _download(name: str, mime: str, content: str) -> str:
    quoted = html.escape(name, quote=True)
    data = base64.b64encode(content.encode()).decode()
    return (
        f'<a download="{quoted}" href="data:{html.escape(mime, quote=True)};base64,{data}">{text(name)}</a>'
    )


def _json(value: object) -> str:
    """JSON that ends no script element: ``<`` as its escape."""
    return msgspec.json.encode(value).decode().replace("<", "\\u003c")


@cache
def _asset(name: str) -> str:
    return resources.files("lockstep.report").joinpath(name).read_text(encoding="utf-8")


def _script(live: bool) -> str:
    # Before the plots are drawn, for it holds a section against the same section as the server sent it.
    names = ("vendor/uPlot.iife.min.js", *(["assets/live.js"] if live else []), "assets/page.js")
    return "\n".join(map(_asset, names))


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
