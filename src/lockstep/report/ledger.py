"""The ledger of a run in flight: where every sample and token that was asked for ended."""

from collections.abc import Mapping
from typing import Any

from lockstep.report.document import Section, Table
from lockstep.runs.layout import RunLayout
from lockstep.runs.strict import read_lines


def ledger_section(layout: RunLayout) -> Section | None:
    """The last step's ledger; None of a synchronous run, which keeps none.

    Raises:
        RunError: for a damaged file.
    """
    rows = read_lines(layout.ledger)
    if not rows:
        return None
    last = rows[-1]
    dropped, dropped_tokens = (sum(last[name].values()) for name in ("dropped", "dropped_tokens"))
    open_samples = last["issued"] - last["trained"] - dropped
    held_tokens = last["drawn_tokens"] - last["trained_tokens"] - dropped_tokens
    accounts = (
        ("asked for, or drawn", last["issued"], last["drawn_tokens"]),
        ("trained on", last["trained"], last["trained_tokens"]),
        *(
            (f"dropped: {reason}", n, last["dropped_tokens"].get(reason, 0))
            for reason, n in sorted(last["dropped"].items())
        ),
        ("still open, or held", open_samples, held_tokens),
    )
    ended = Table(
        title="Where every sample and token ended",
        columns=("what", "samples", "tokens"),
        rows=tuple((what, f"{samples:,}", f"{tokens:,}") for what, samples, tokens in accounts),
        note=f"{last['reissued']:,} samples were asked for again: an engine or the trainer had ended",
    )
    text = f"After step {last['step'] + 1}: every line but the first adds up to the first."
    tables = (ended, *((_lengths(last),) if dropped else ()))
    return Section(title="Ledger", text=(text,), tables=tables)


def _lengths(last: Mapping[str, Any]) -> Table:
    """Samples by their length, trained beside dropped: dropping what is old may drop what is long."""
    kept, gone = last["kept_lengths"], last["dropped_lengths"]
    # JSON's keys are text, by which 16 would stand before 8.
    bounds = sorted({*kept, *gone}, key=int)
    rows = tuple((f"≤ {bound}", str(kept.get(bound, 0)), str(gone.get(bound, 0))) for bound in bounds)
    return Table(title="Samples by length, tokens", columns=("length", "trained", "dropped"), rows=rows)
