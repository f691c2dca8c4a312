"""A sweep as a picture (matplotlib, no display needed) and a table.

A curve far above all others ("no dropout", mostly) gets a panel of its own on top, so that the others can be told apart.
Run times have a band from the 10th to the 90th percentile.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError
from fedloom.wireless.show.curves import LABELS, Row, Sweep

try:
    from matplotlib.figure import Figure
except ImportError as error:  # pragma: no cover
    raise ConfigError(f"pictures need matplotlib ({error}): pip install 'fedloom[wireless]'") from error

_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#333333",
)  # told apart by the colour-blind
_MARKERS = "os^Dvx+"
_FAR = 1.5  # times the largest of the other curves


def draw(sweep: Sweep, path: Path) -> Path:
    """One picture, 1440 x 800 pixels."""
    curves = {
        curve: [row for row in sweep.rows if row.curve == curve] for curve in dict.fromkeys(r.curve for r in sweep.rows)
    }
    above = [curve for curve in curves if curve in sweep.upper_panel or _far(curve, curves)]
    figure = Figure(figsize=(9.0, 5.0), dpi=160, layout="constrained")
    heights = [1, 2] if above else [1]
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    main = panels[-1][0]
    for index, (curve, rows) in enumerate(curves.items()):
        axes = panels[0][0] if curve in above else main
        _curve(axes, rows, curve, index, timed=sweep.log_y)
    for axes in panels[:, 0]:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if sweep.log_y:
            axes.set_yscale("log")
    if above:
        panels[0][0].set_ylabel(sweep.upper_label or sweep.y_label)
    panels[0][0].set_title(sweep.title, loc="left")
    main.set_xlabel(sweep.x_label)
    main.set_ylabel(sweep.y_label)
    if sweep.x_ticks is not None:
        main.set_xticks(sweep.x_ticks, [f"{tick:g}" for tick in sweep.x_ticks])
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path)
    return path


def write(sweep: Sweep, out: Path) -> Path:
    """`NAME.csv` and `NAME.png` in the folder `out`; the picture's path."""
    with (out / f"{sweep.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(sweep.rows)
    return draw(sweep, out / f"{sweep.name}.png")


def _far(curve: str, curves: dict[str, list[Row]]) -> bool:
    others = [row.value for name, rows in curves.items() if name != curve for row in rows]
    return curve == LABELS["no_dropout"] and min(row.value for row in curves[curve]) > _FAR * max(others, default=0.0)


def _curve(axes: Any, rows: list[Row], label: str, index: int, *, timed: bool) -> None:
    x, y = [r.x for r in rows], [r.value for r in rows]
    if label == "minimum":
        axes.plot(x, y, "k*", markersize=11, label=label, zorder=5)
        return
    # Colours follow strategies, not the order in a figure: a strategy that serves nobody must not shift the others'.
    known = list(LABELS.values())
    place = known.index(label) if label in known else index
    colour = _COLOURS[place % len(_COLOURS)]
    marker = "" if len(rows) > 40 else _MARKERS[place % len(_MARKERS)]
    optimum = label == LABELS["bnb"]
    style, width = ("--", 1.4) if label == LABELS["psca"] else ("-", 4.0 if optimum else 1.6)
    axes.plot(
        x, y, style, color=colour, marker=marker, markersize=7 if optimum else 5, linewidth=width, label=label,
        alpha=0.55 if optimum else 1.0,
    )  # fmt: skip
    if timed and any(row.high > row.low for row in rows):
        band = [row.low for row in rows], [row.high for row in rows]
        axes.fill_between(x, *band, color=colour, alpha=0.12, linewidth=0)
