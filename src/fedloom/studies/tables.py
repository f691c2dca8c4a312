"""The table of a comparison, as text: a line for each method and control."""

from __future__ import annotations

from typing import Any

from fedloom.studies.study import CONTROLS, UNTUNED
from fedloom.studies.summary import Line, Summary
from fedloom.studies.verdict import number

COLUMNS = (
    "method",
    "score",
    "95 % interval",
    "draws",
    "round",
    "up",
    "down",
    "up + down to target",
    "seconds",
    "joules",
)
NAMES = {UNTUNED: "untuned base"} | CONTROLS


def size(n: float) -> str:
    """Bytes for people, in decimal units.

    >>> size(0), size(123_456), size(7_654_321)
    ('0 B', '123 kB', '7.65 MB')
    """
    value = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def cells_of(s: Summary, line: Line) -> list[str]:
    """The line's cells, one for each of COLUMNS."""
    control = line.role != "method"
    rounds = sorted({scored.round for scored in line.scored})
    return [
        NAMES.get(line.label, line.label) + (" (clients' own models)" if line.of_clients and not control else ""),
        number(line.score.mean),
        f"{number(line.score.low)} to {number(line.score.high)}" if line.score.n > 1 else "-",
        str(line.score.n),
        str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}",
        "-" if control else size(line.up),
        "-" if control else size(line.down),
        "-" if control else to_target(s, line),
        "-" if line.label == UNTUNED else f"{line.seconds:.3g}",
        "-" if line.joules is None or control else f"{line.joules:.3g}",
    ]


def text(s: Summary) -> list[str]:
    """The table as lines of a terminal, columns in which nothing is known left out."""
    rows = [[s.score if c == "score" else c for c in COLUMNS], *(cells_of(s, line) for line in s.lines)]
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
    padded = [
        [cell.rjust(max(map(len, column))) if i else cell.ljust(max(map(len, column))) for cell in column]
        for i, column in enumerate(columns)
    ]
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def to_target(s: Summary, line: Line) -> str:
    """Mean bytes up and down to reach the target, and how many runs did."""
    if s.target is None:
        return "-"
    n, of = len(line.reached), len(line.traces)
    if n == 0:
        return "not reached"
    up, down = (sum(pair[i] for pair in line.reached) / n for i in (0, 1))
    return f"{size(up)} + {size(down)}" + ("" if n == of else f" ({n} of {of})")


def data_of(s: Summary) -> dict[str, Any]:
    """The numbers of a summary as plain values, for programs that read a report."""
    return {
        "name": s.name,
        "score": s.score,
        "higher_is_better": s.higher_is_better,
        "budget": None if s.budget is None else {s.budget.kind: s.budget.amount},
        "target": s.target,
        "lines": [_line(line) for line in s.lines],
        "pairs": [
            {
                "first": pair.first,
                "second": pair.second,
                "gain": pair.gain.mean,
                "low": pair.gain.low,
                "high": pair.gain.high,
                "p": pair.p,
                "p_holm": pair.p_holm,
                "wins": pair.wins,
                "draws": pair.gain.n,
                "improvement": pair.improvement,
                "draws_needed": pair.draws_needed,
            }
            for pair in s.pairs
        ],
    }


def _line(line: Line) -> dict[str, Any]:
    return {
        "label": line.label,
        "role": line.role,
        "by_draw": {str(draw): float(f"{score:.6g}") for draw, score in line.by_draw.items()},
        "bytes_up": line.up,
        "bytes_down": line.down,
        "seconds": float(f"{line.seconds:.5g}"),
        "joules": line.joules,
        "runs": [
            {
                "draw": trace.draw,
                "seed": trace.seed,
                "hashes": trace.manifest.get("hashes", {}),
                "score": [None if x is None else float(f"{x:.5g}") for x in trace.scores],
                "train_loss": [None if (x := r["train_loss"]) is None else float(f"{x:.4g}") for r in trace.records],
                "up": [sum(r["bytes_up"].values()) for r in trace.records],
                "down": [sum(r["bytes_down"].values()) for r in trace.records],
                "seconds": [float(f"{r['seconds']['total']:.4g}") for r in trace.records],
            }
            for trace in line.traces
            if line.label != UNTUNED
        ],
    }
