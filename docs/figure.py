"""The README's picture: held-out accuracy against bytes of all methods of finished studies.

fedloom compare benchmarks/studies/methods.toml --out STUDY, the same for methods_tuned.toml, then
python docs/figure.py STUDY TUNED: a line of a later study stands for one of its name in an earlier one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from fedloom.studies import summary

NAMED = {
    "fedit": (-6, 5, "right"),
    "ffa_lora": (6, -10, "left"),
    "fed_sb": (7, -3, "left"),
    "flasc": (7, 3, "left"),
    "fslora": (-6, 5, "right"),
    "flora": (-6, -10, "right"),
    "fedex_lora": (-7, 8, "right"),
    "ravan rank 64 lr 5e-2": (-14, -32, "left"),
}
"""Methods whose names are written: by how many points the name is off, and its alignment."""


LIMITS = (0.79, 0.93)
"""Of the accuracy: methods that the quickstart's learning rate does not suit lie below, and are left out."""


def draw(studies: list[Path], file: Path) -> None:
    """One point a method, the mean over draws, with the 95 % interval of those that are named."""
    lines = {line.label: line for study in studies for line in summary.read([study]).methods}
    plt.rcParams |= {"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "fedloom"}
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for line in lines.values():
        if line.score.mean < LIMITS[0]:
            continue
        x, y = (line.up + line.down) / 1e6, line.score.mean
        if line.label in NAMED:
            axes.errorbar(x, y, [[y - line.score.low], [line.score.high - y]], fmt="o", ms=6, lw=1, color="#00897b")
            dx, dy, side = NAMED[line.label]
            axes.annotate(
                line.label.partition(" lr")[0], (x, y), (dx, dy), textcoords="offset points", ha=side, color="#00695c"
            )
        else:
            axes.plot(x, y, "o", ms=4, color="#9e9e9e")
    axes.set(xscale="log", xlabel="megabytes up and down, 6 rounds, 4 clients", ylabel="held-out accuracy", ylim=LIMITS)
    axes.set_xticks(ticks := [2, 5, 10, 20, 50, 100], [f"{x}" for x in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    draw([Path(name) for name in sys.argv[1:]], Path(__file__).with_name("methods.svg"))
