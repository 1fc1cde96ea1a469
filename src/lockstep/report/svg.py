"""A plot as static SVG: for print, and where no script runs."""

import html
from itertools import pairwise
from math import floor, isfinite, log10

from lockstep.records.printable import printable
from lockstep.report.document import Line, Plot

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 220, 58, 8, 8, 34
DASHES = ("", "8 4", "2 3", "10 3 2 3", "5 5", "1 4")
"""Lines are told apart without colour."""
Ends = tuple[float, float]


def svg(plot: Plot, said: str) -> str:
    """The plot, with ``said`` as what it shows."""
    ys = [y for line in plot.lines for y in (*line.ys, *line.low, *line.high) if isfinite(y)]
    xs = [_x(plot, x) for x in plot.xs]
    label = html.escape(printable(f"{plot.title}: {said}"), quote=True)
    if not ys or not xs:
        words = '<text x="8" y="20">no value</text>'
        return f'<svg viewBox="0 0 {WIDTH} 30" role="img" aria-label="{label}">{words}</svg>'
    x_ends, y_ends = _ends(xs), _ends(ys)
    parts = [_frame(plot, x_ends, y_ends)]
    if plot.log_x:
        parts += [_bars(line, xs, x_ends, y_ends) for line in plot.lines]
    else:
        parts += [_drawn(line, xs, at, x_ends, y_ends) for at, line in enumerate(plot.lines)]
    body = "".join(parts)
    height = HEIGHT + (0 if plot.log_x else 16 * len(plot.lines))
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{body}</svg>'


def _x(plot: Plot, x: float) -> float:
    return log10(x) if plot.log_x else x


def _ends(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = abs(high) * 0.05  # about a line that is level, which would be drawn over no width
    return (low, high) if low < high else (low - room, high + room) if room else (0.0, 1.0)


def _at(value: float, ends: tuple[float, float], first: float, last: float) -> str:
    return f"{first + (value - ends[0]) / (ends[1] - ends[0]) * (last - first):.1f}"


def _ticks(ends: tuple[float, float]) -> dict[float, str]:
    """At most seven round values within, and how they are written: no two alike."""
    width = ends[1] - ends[0]
    decade = 10.0 ** floor(log10(width))
    step = next(decade * part for part in (0.2, 0.5, 1.0, 2.0) if width <= 6.0 * decade * part)
    first = floor(ends[0] / step) + 1
    ticks = [first * step + k * step for k in range(8) if first * step + k * step <= ends[1]]
    largest = max(map(abs, ticks), default=0.0)
    power = floor(log10(largest)) if largest and not 1e-3 <= largest < 1e5 else 0
    digits = max(0, power - floor(log10(step) + 1e-9))
    tail = f"e{power}" if power else ""
    return {tick: f"{tick / 10.0**power:.{digits}f}{tail}" if abs(tick) > step / 2 else "0" for tick in ticks}


def _frame(plot: Plot, x_ends: Ends, y_ends: Ends) -> str:
    right = WIDTH - RIGHT
    bottom = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>']
    for tick, named in _ticks(y_ends).items():
        y = _at(tick, y_ends, bottom, TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{right}"/>')
        where = f'x="{LEFT - 4}" y="{y}" text-anchor="end" dominant-baseline="middle"'
        parts.append(f"<text {where}>{named}</text>")
    for tick, plain in _ticks(x_ends).items():
        x = _at(tick, x_ends, LEFT, right)
        named = f"{10.0**tick:.1g}" if plot.log_x else plain
        parts.append(f'<text x="{x}" y="{bottom + 14}" text-anchor="middle">{named}</text>')
    label = html.escape(printable(plot.x_label))
    parts.append(f'<text x="{right}" y="{bottom + 28}" text-anchor="end">{label}</text>')
    return "".join(parts)


def _bars(line: Line, xs: list[float], x_ends: Ends, y_ends: Ends) -> str:
    """A share by class: classes are as wide as each other, and the least share is 0."""
    width = (WIDTH - RIGHT - LEFT) / max(1, len(xs) - 1)
    bottom = HEIGHT - BOTTOM
    parts = []
    for x, y in zip(xs, line.ys, strict=True):
        left = max(LEFT, float(_at(x, x_ends, LEFT, WIDTH - RIGHT)) - width / 2)
        top = float(_at(y, y_ends, bottom, TOP))
        size = f'width="{width:.1f}" height="{bottom - top:.1f}"'
        parts.append(f'<rect class="bar f0" x="{left:.1f}" y="{top:.1f}" {size}/>')
    return "".join(parts)


def _drawn(line: Line, xs: list[float], at: int, x_ends: Ends, y_ends: Ends) -> str:
    right = WIDTH - RIGHT
    bottom = HEIGHT - BOTTOM
    own = at % 6

    def point(x: float, y: float) -> str:
        return f"{_at(x, x_ends, LEFT, right)} {_at(y, y_ends, bottom, TOP)}"

    parts = []
    if line.low:
        kept = [k for k in range(len(xs)) if isfinite(line.low[k]) and isfinite(line.high[k])]
        above = [point(xs[k], line.high[k]) for k in kept]
        around = "L".join(above + [point(xs[k], line.low[k]) for k in reversed(kept)])
        parts.append(f'<path class="b f{own}" d="M{around}Z"/>' if around else "")
    whole = [k for k, y in enumerate(line.ys) if isfinite(y)]
    path = f"M{point(xs[whole[0]], line.ys[whole[0]])}" if whole else ""
    for before, k in pairwise(whole):
        # A step without a value parts the line, which would otherwise claim one for it.
        path += f"{'L' if k == before + 1 else 'M'}{point(xs[k], line.ys[k])}"
    dash = f' stroke-dasharray="{DASHES[own]}"' if DASHES[own] else ""
    y = HEIGHT + 16 * at + 4
    parts += [f'<path class="l l{own}" d="{d}"{dash}/>' for d in (path, f"M{LEFT} {y}h28")]
    name = html.escape(printable(line.name))
    parts.append(f'<text x="{LEFT + 34}" y="{y}" dominant-baseline="middle">{name}</text>')
    return "".join(parts)
