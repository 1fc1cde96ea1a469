"""The power study's JSON as a table and a picture: ``python benchmarks/score_power_report.py FILE.json``.

Writes FILE.svg beside it and prints the tables of docs/concepts/seeing-through-noise.md.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

COLOURS = {"1024": "#9ecae1", "4096": "#4292c6", "16384": "#08306b"}
GATES = "#d94801"
WIDTH, HEIGHT, LEFT, BELOW = 640, 300, 56, 46


def main() -> int:
    """Print the tables, write the picture."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 0
    path = Path(sys.argv[1])
    found = json.loads(path.read_text())
    print("\n".join(clean_table(found)), "\n")
    print("\n".join(fault_table(found)), "\n")
    print("\n".join(totals(found)))
    path.with_suffix(".svg").write_text("\n".join(picture(found)) + "\n")
    return 0


def clean_table(found: dict) -> Iterator[str]:
    """False alarms by budget, with the binomial interval that 1 % allows."""
    yield "| tokens | clean repetitions | called at first (at most, of 1 %) | and again | quantile gates |"
    yield "|---|---|---|---|---|"
    for tokens, kept in found["clean"].items():
        most = _binomial_most(kept["n"], 0.01)
        cells = (tokens, kept["n"], f"{kept['seen']} ({most})", kept["proven"], kept["gates"])
        yield f"| {' | '.join(map(str, cells))} |"


def _binomial_most(n: int, p: float) -> int:
    """The largest count that a binomial reaches in more than 2.5 % of all studies."""
    total = 0.0
    k = -1
    while total < 0.975:
        k += 1
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
    return k


def fault_table(found: dict) -> Iterator[str]:
    """One row a fault and size: how far it moves a token; seen, in the right group, and by the gates.

    In bf16 any change has other roundings, which are in what it moves.
    """
    budgets = list(found["clean"])
    columns = " | ".join(f"{tokens} tokens: seen, in group, gates" for tokens in budgets)
    yield f"| fault | moves (nats, rms) | {columns} | told otherwise |"
    yield f"|---|---|{'---|' * len(budgets)}---|"
    for name, kept in found["faults"].items():
        cells = [name, f"{kept['moves_rms_nats']:.4f}"]
        for tokens in budgets:
            at = kept[tokens]
            cells.append(f"{at['seen']}/{at['n']}, {at['in_group']}/{at['seen']}, {at['gates']}/{at['n']}")
        yield f"| {' | '.join([*cells, kept[budgets[-1]]['told']])} |"


def totals(found: dict) -> Iterator[str]:
    """Over faults that move a token by .01 nats or more, and over the others."""
    for above in (True, False):
        chosen = [kept for kept in found["faults"].values() if (kept["moves_rms_nats"] >= 0.01) == above]
        for tokens in found["clean"]:
            n, seen, named, gates = (
                sum(kept[tokens][what] for kept in chosen) for what in ("n", "seen", "in_group", "gates")
            )
            side = "at least" if above else "less than"
            shares = (seen / max(n, 1), named / max(seen, 1), gates / max(n, 1))
            told = "seen {:.1%}, of these in the right group {:.1%}; quantile gates {:.1%}".format(*shares)
            yield f"{tokens} tokens, {len(chosen)} faults of {side} .01 nats: {told}"


def picture(found: dict) -> Iterator[str]:
    """Detection against how far a fault moves a token."""
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    for exponent in (-4, -3, -2, -1, 0):
        x = _x(10.0**exponent)
        yield f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{HEIGHT - BELOW}" stroke="#ddd"/>'
        yield f'<text x="{x:.1f}" y="{HEIGHT - BELOW + 14}" text-anchor="middle">{10.0**exponent:g}</text>'
    for share in (0.0, 0.5, 1.0):
        y = _y(share)
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - 10}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>'
    colours = {tokens: COLOURS[tokens] for tokens in found["clean"]}
    for tokens, colour in colours.items():
        for kept in found["faults"].values():
            at = kept[tokens]
            yield _dot(kept["moves_rms_nats"], at["seen"] / at["n"], colour)
    for kept in found["faults"].values():
        at = kept[list(colours)[-1]]
        yield _dot(kept["moves_rms_nats"], at["gates"] / at["n"], GATES)
    middle = (LEFT + WIDTH) / 2
    axis = "what a fault moves a token by, nats (rms)"
    yield f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{axis}</text>'
    labels = [
        *((f"{tokens} tokens", colour) for tokens, colour in colours.items()),
        ("quantile gates", GATES),
    ]
    for number, (label, colour) in enumerate(labels):
        yield f'<circle cx="{LEFT + 10 + 130 * number}" cy="10" r="4" fill="{colour}"/>'
        yield f'<text x="{LEFT + 18 + 130 * number}" y="14">{label}</text>'
    yield "</svg>"


def _dot(moved: float, share: float, colour: str) -> str:
    at = f'cx="{_x(max(moved, 1e-4)):.1f}" cy="{_y(share):.1f}" r="3.5"'
    return f'<circle {at} fill="{colour}" fill-opacity=".75"/>'


def _x(nats: float) -> float:
    return LEFT + (math.log10(nats) + 4) / 4 * (WIDTH - LEFT - 14)


def _y(share: float) -> float:
    return HEIGHT - BELOW - share * (HEIGHT - BELOW - 24)


if __name__ == "__main__":
    sys.exit(main())
