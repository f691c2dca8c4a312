"""Charts as inline SVG: colours come from the page's style sheet, text stays text, and every mark has a title."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 40
MARKED = 30
"""Most points of a curve that are marked one by one."""
DASHES = ("", "6 3", "2 2", "8 3 2 3")
COLOURS = 10


@dataclass(frozen=True)
class Series:
    """One curve with its band."""

    label: str
    index: int
    """Of its colour and dash."""
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    """NaN where there is no band."""
    high: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """Data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (v - a) / (b - a) * (self.end - self.start)

    def ticks(self, whole: bool = False) -> list[float]:
        """Round numbers between the ends."""
        found = _decades(self.low, self.high) if self.log else steps(self.low, self.high)
        return [x for x in found if x == int(x)] if whole else found


def steps(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten.

    >>> steps(0, 1), steps(0.83, 0.91)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.84, 0.86, 0.88, 0.9])
    """
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = (1,) if math.log10(high / low) > 3 else (1, 2, 5) if math.log10(high / low) > 0.7 else range(1, 10)
    return [m * 10.0**k for k in powers for m in marks if low <= m * 10.0**k <= high]


def style(index: int) -> str:
    """Attributes of a curve: its colour class and its dash."""
    dash = DASHES[index // 3 % len(DASHES)]
    return f'class="line c{index % COLOURS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def swatch(index: int) -> str:
    """A short piece of a curve, for legends."""
    return f'<svg class="swatch" width="26" height="10" aria-hidden="true"><path {style(index)} d="M0 5H26"/></svg>'


def curves(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    references: Sequence[tuple[str, float]] = (),
    unit: str = "",
) -> str:
    """Curves with bands over a common axis, which is logarithmic where x spans more than a factor of 30."""
    shown = [s for s in series if len(s.x) > 0]
    positive = [x for s in shown for x in s.x if x > 0]
    if not positive:
        return ""
    log = max(positive) > 30 * min(positive) and unit != "rounds"
    least = min(positive) if log else min(min(s.x) for s in shown)
    x = Axis(least, max(positive) if max(positive) > least else least + 1, LEFT, WIDTH - RIGHT, log)
    y = Axis(*_range(shown, references), HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, x_label, y_label, whole=unit == "rounds")]
    parts += _references(references, y)
    parts += [_band(s, x, y) for s in shown]
    parts += [_curve(s, x, y, x_label) for s in shown]
    return _svg(WIDTH, HEIGHT, f"{y_label} over {x_label}", "".join(parts))


def _range(series: Sequence[Series], references: Sequence[tuple[str, float]]) -> tuple[float, float]:
    values = [y for s in series for y in s.y] + [y for _, y in references]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) * 0.1 or 1.0
    # Bands of two or three draws are wider than any chart: they are cut.
    bands = [y for s in series for y in (*s.low, *s.high) if math.isfinite(y)]
    low = max(low - 0.5 * span, min([low, *bands])) - 0.04 * span
    return low, min(high + 0.5 * span, max([high, *bands])) + 0.06 * span


def _references(references: Sequence[tuple[str, float]], y: Axis) -> list[str]:
    """Dotted lines across, from the top down, with labels that do not cover each other."""
    parts, last = [], -math.inf
    for text, value in sorted(references, key=lambda each: -each[1]):
        last = max(y(value) - 3, last + 11)
        parts.append(f'<path class="reference" d="M{LEFT} {_px(y(value))}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="note" x="{WIDTH - RIGHT}" y="{_px(last)}" text-anchor="end">{escape(text)}</text>')
    return parts


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, whole: bool) -> str:
    parts = []
    for tick in y.ticks():
        at = _px(y(tick))
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{_px(y(tick) + 4)}" text-anchor="end">{short(tick)}</text>')
    for tick in x.ticks(whole):
        parts.append(f'<text x="{_px(x(tick))}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _points(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis) -> str:
    inside = [(a, min(max(b, y.low), y.high)) for a, b in zip(xs, ys, strict=True) if a >= x.low]
    return "L".join(f"{_px(x(a))} {_px(y(b))}" for a, b in inside)


def _band(s: Series, x: Axis, y: Axis) -> str:
    known = [i for i in range(len(s.x)) if math.isfinite(s.low[i]) and s.x[i] >= x.low]
    if len(known) < 2:
        return ""
    up = _points([s.x[i] for i in known], [s.high[i] for i in known], x, y)
    back = _points([s.x[i] for i in reversed(known)], [s.low[i] for i in reversed(known)], x, y)
    return f'<path class="band c{s.index % COLOURS}" d="M{up}L{back}Z"/>'


def _curve(s: Series, x: Axis, y: Axis, x_label: str) -> str:
    line = f'<path {style(s.index)} d="M{_points(s.x, s.y, x, y)}"><title>{escape(s.label)}</title></path>'
    if len(s.x) > MARKED:
        return line
    dots = "".join(
        f'<circle class="dot c{s.index % COLOURS}" cx="{_px(x(a))}" cy="{_px(y(b))}" r="2.5">'
        f"<title>{escape(s.label)}: {b:.4g} at {short(a)} {escape(x_label)}</title></circle>"
        for a, b in zip(s.x, s.y, strict=True)
        if a >= x.low
    )
    return line + dots


def bar(low: float, middle: float, high: float, ends: tuple[float, float], told: str, clear: bool) -> str:
    """An interval against zero, for a cell of a table; grey unless it is clear."""
    axis = Axis(*ends, 4, 196)
    zero = f'<path class="axis" d="M{_px(axis(0))} 0V18"/>' if ends[0] <= 0 <= ends[1] else ""
    kind = "line c0" if clear else "line unclear"
    inside = [min(max(v, ends[0]), ends[1]) for v in (low, middle, high)]
    a, m, b = (_px(axis(v)) for v in inside)
    mark = f'<path class="{kind}" d="M{a} 9H{b}"/><circle class="dot {kind[5:]}" cx="{m}" cy="9" r="3.5"/>'
    return _svg(200, 18, told, zero + mark)


def strip(values: Sequence[tuple[str, float]], ends: tuple[float, float], index: int, told: str) -> str:
    """One dot for each client, for a cell of a table."""
    axis = Axis(*ends, 6, 294)
    dots = "".join(
        f'<circle class="dot c{index % COLOURS}" cx="{_px(axis(v))}" cy="9" r="4" fill-opacity=".6">'
        f"<title>{escape(name)}: {v:.4g}</title></circle>"
        for name, v in values
    )
    return _svg(300, 18, told, f'<path class="grid" d="M6 9H294"/>{dots}')


def shares(parts: Sequence[tuple[str, float]]) -> str:
    """Parts of a whole as one bar."""
    total, at, made = sum(value for _, value in parts) or 1.0, 0.0, []
    for i, (label, value) in enumerate(parts):
        wide = 400 * value / total
        title = f"{label}: {100 * value / total:.0f} %"
        made.append(
            f'<rect class="fill c{i}" x="{_px(at)}" y="0" width="{_px(wide)}" height="22"><title>{escape(title)}</title></rect>'
        )
        at += wide
    return _svg(400, 22, "variance split", "".join(made))


def short(x: float) -> str:
    """A tick's number.

    >>> short(0.84), short(2000), short(5e6)
    ('0.84', '2000', '5M')
    """
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= power:
            scale = 1e3 if letter == "k" else power
            return f"{x / scale:.4g}{letter}"
    return f"{x:.4g}"


def _px(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")


def _svg(width: int, height: int, told: str, inside: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}"><title>{escape(told)}</title>'
        f"{inside}</svg>"
    )
