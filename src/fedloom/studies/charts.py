"""The curves of a comparison: the mean over draws with its interval, over rounds and over what was spent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedloom.studies.results import Trace
from fedloom.studies.statistics import interval
from fedloom.studies.summary import Line, Summary
from fedloom.studies.svg import Series

AXES = {"rounds": "rounds", "bytes": "bytes up and down", "seconds": "seconds", "joules": "joules"}


def label_of(kind: str, traces: Sequence[Trace]) -> str:
    """What an axis says, honest about what was simulated."""
    simulated = any(trace.simulated for trace in traces)
    return f"{'simulated' if simulated else 'measured'} seconds" if kind == "seconds" else AXES[kind]


def over(s: Summary, kind: str) -> list[Series]:
    """A curve for each method: its mean score at each evaluated round, against the mean of what was spent by then."""
    return [_series(i, line, kind) for i, line in enumerate(s.methods) if all(kind in t.spent for t in line.traces)]


def _series(index: int, line: Line, kind: str) -> Series:
    common = sorted(set.intersection(*(set(trace.evaluated) for trace in line.traces)))
    x, y, low, high = [], [], [], []
    for i in common:
        draws = sorted({trace.draw for trace in line.traces})
        scores = [
            float(np.mean([score for t in line.traces if t.draw == d and (score := t.scores[i]) is not None]))
            for d in draws
        ]
        found = interval(scores)
        x.append(float(np.mean([trace.spent[kind][i] for trace in line.traces])))
        y.append(found.mean)
        low.append(found.low)
        high.append(found.high)
    return Series(line.label, index, x, y, low, high)


def losses(line: Line) -> list[Series]:
    """Held-out and training loss of one run."""
    trace = line.traces[0]
    found = []
    held_out = [(r["round"], r["eval"].get("loss")) for r in trace.records if "eval" in r]
    training = [(r["round"], r["train_loss"]) for r in trace.records]
    for index, (label, points) in enumerate((("held-out loss", held_out), ("training loss", training))):
        known = [(float(t), float(loss)) for t, loss in points if loss is not None]
        nothing = [math.nan] * len(known)
        found.append(Series(label, index, [t for t, _ in known], [loss for _, loss in known], nothing, nothing))
    return found
