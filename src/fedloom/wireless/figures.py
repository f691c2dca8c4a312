"""A sweep as a picture (matplotlib, no display needed)."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedloom.wireless.sweep import Row, Sweep

_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#555555",
)  # told apart by the colour-blind
_MARKERS = "os^Dvx+"


def draw(sweep: Sweep, path: Path) -> Path:
    """One picture, 1280 x 800 pixels."""
    figure, axes = plt.subplots(figsize=(8.0, 5.0), dpi=160)
    second = axes.twinx() if sweep.name.startswith("E8") else None
    style = cycle(zip(_COLOURS, _MARKERS, strict=True))
    for curve in dict.fromkeys(row.curve for row in sweep.rows):
        rows = [row for row in sweep.rows if row.curve == curve]
        if curve == "minimum":
            axes.plot([r.x for r in rows], [r.value for r in rows], "k*", markersize=11, label=curve, zorder=5)
            continue
        colour, marker = next(style)
        if second is not None and curve.startswith("largest"):
            second.semilogy(
                [r.x for r in rows], [r.value for r in rows], "--", color="#555555", marker=".", label=curve
            )
            second.set_ylabel(curve)
            continue
        _curve(axes, rows, curve, colour, marker)
    axes.set_title(sweep.title, loc="left")
    axes.set_xlabel(sweep.x_label)
    axes.set_ylabel("penalised objective" if second is not None else sweep.y_label)
    if sweep.log_x:
        axes.set_xscale("log")
    if sweep.log_y:
        axes.set_yscale("log")
    if sweep.x_ticks is not None:
        axes.set_xticks(sweep.x_ticks, [f"{tick:g}" for tick in sweep.x_ticks])
    axes.grid(alpha=0.3)
    axes.spines[["top"]].set_visible(False)
    if second is None:
        axes.spines[["right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if second is not None:
        more = second.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.legend(handles, labels, frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def _curve(axes: Any, rows: list[Row], label: str, colour: str, marker: str) -> None:
    x, y = [r.x for r in rows], [r.value for r in rows]
    many = len(rows) > 40
    axes.plot(x, y, "-", color=colour, marker="" if many else marker, markersize=5, linewidth=1.8, label=label)
    if any(row.high > row.low for row in rows):
        axes.fill_between(x, [r.low for r in rows], [r.high for r in rows], color=colour, alpha=0.10, linewidth=0)
