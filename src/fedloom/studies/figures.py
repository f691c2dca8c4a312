"""The charts of a report as files for a paper, by matplotlib (no display needed)."""

from __future__ import annotations

from pathlib import Path

from fedloom import disk
from fedloom.errors import ConfigError
from fedloom.studies import charts
from fedloom.studies.summary import Summary

try:
    from matplotlib.figure import Figure
except ImportError as error:  # pragma: no cover
    raise ConfigError(f"figures need matplotlib ({error}): pip install 'fedloom[wireless]'") from error

COLOURS = ["#0b6bcb", "#d1540a", "#00825a", "#b5367f", "#7a5bd0", "#8f6b00", "#00889c", "#c0302f", "#5f6b7a", "#7d5a35"]
"""As in the report."""


def draw(s: Summary, stem: Path, kind: str = "pdf") -> list[Path]:
    """A file for each chart, `STEM-rounds.pdf` and so on: 84 mm wide, a column of two."""
    made = []
    for axis in charts.AXES:
        series = charts.over(s, axis)
        if not series or not any(x > 0 for one in series for x in one.x):
            continue
        figure = Figure(figsize=(3.3, 2.4), layout="constrained")
        axes = figure.subplots()
        for one in series:
            colour = COLOURS[one.index % len(COLOURS)]
            axes.plot(one.x, one.y, color=colour, linewidth=1.2, label=one.label)
            axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(charts.label_of(axis, [t for line in s.methods for t in line.traces]), fontsize=8)
        axes.set_ylabel(s.score, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=6)
        path = stem.with_name(f"{stem.name}-{axis}.{kind}")
        with disk.disk_errors(path):
            figure.savefig(path, dpi=200)
        made.append(path)
    return made
