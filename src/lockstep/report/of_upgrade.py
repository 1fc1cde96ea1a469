"""The report of an upgrade: the verdict, each difference by topic, the way to parity flag by flag."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from lockstep.report.document import Report, Section, Table

COLUMNS = ("what", "before", "after", "effect", "cause", "flag", "note")


def of_upgrade(table: Mapping[str, Any], name: str) -> Report:
    """The report of the document that ``lockstep upgrade --json`` prints."""
    upgrade = table["upgrade"]
    before, after = upgrade["before"], upgrade["after"]
    words = [f"{before['engine']} → {after['engine']}: {upgrade['summary']}."]
    largest = [one for one in upgrade["differences"] if isfinite(one["effect_nats"]) and one["cause"]]
    words += [
        f"{one['what']}: {one['effect_nats']:+.4f} nats ({one['unit']}). Mend: {one['flag']}"
        for one in sorted(largest, key=lambda one: -abs(one["effect_nats"]))[:4]
    ]
    if upgrade["recipe"]:
        words.append(f"The recipe that passed the check: {upgrade['recipe']}.")
    topics = dict.fromkeys(one["topic"] for one in upgrade["differences"])
    tables = [
        Table(
            title=topic.capitalize(),
            columns=COLUMNS,
            rows=tuple(_row(one) for one in upgrade["differences"] if one["topic"] == topic),
        )
        for topic in topics
    ]
    steps = tuple(
        (
            step["status"],
            ", ".join(step["flags"]) or "its own defaults",
            step["layer"] or "–",
            step["cause"].replace("_", " ") or "–",
            f"{step['effect_nats']:.4f}" if isfinite(step["effect_nats"]) else "–",
        )
        for step in upgrade["steps"]
    )
    columns = ("verdict", "flags", "layer that failed", "cause", "nats")
    others = tuple((key, old, new) for key, (old, new) in sorted(upgrade["resolved"].items()))
    settings = Table(title="All of them", columns=("setting", "before", "after"), rows=others, folded=True)
    return Report(
        kind="upgrade",
        title=f"Upgrade, {before['engine']} → {after['engine']}",
        status=upgrade["verdict"],
        words=tuple(words),
        sections=(
            Section(title="What changed", tables=tuple(tables)),
            Section(title="Flag by flag", tables=(Table(title="Checks", columns=columns, rows=steps),)),
            Section(title="Settings that resolved otherwise", tables=(settings,)),
        ),
    )


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = one["ci95"]
    effect = ""
    if isfinite(one["effect_nats"]):
        interval = f" ({low:.3g} to {high:.3g})" if isfinite(low) else ""
        effect = f"{one['effect_nats']:+.3g}{interval}, {one['unit']}"
    cells = (one["what"], one["before"], one["after"], effect, one["cause"], one["flag"], one["note"])
    return tuple(cell or "–" for cell in cells)
