"""What a comparison lets one say, in sentences; and what it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fedloom.studies import statistics
from fedloom.studies.statistics import Difference, Interval
from fedloom.studies.study import CONTROLS, UNTUNED
from fedloom.studies.summary import Line, Summary, common_draws


def verdict(s: Summary) -> list[str]:
    """What can be said, sentence by sentence, and what cannot."""
    if not s.methods:
        return ["No method has a score yet."]
    best = _best(s)
    said = [_leader(s, best), *_controls(s, best)]
    if s.methods[0].error is not None:
        rows = s.methods[0].traces[0].manifest["rows"]["eval"]
        said.append(
            f"With {rows} held-out rows a score has a standard error of {s.methods[0].error:.3f} from the test set alone, "
            "which no further training seed can lower."
        )
    if s.budget is not None and (short := [line.label for line in s.methods if not line.whole]):
        said.append(f"{_and(short)} ended before the budget was spent: the comparison is not at equal budgets.")
    return said


def _best(s: Summary) -> Line:
    return (max if s.higher_is_better else min)(s.methods, key=lambda line: line.score.mean)


def winner(s: Summary) -> str | None:
    """The method that is told apart from all others, and better; None if there is none."""
    best = _best(s)
    _, unclear = _rivals(s, best)
    return None if unclear or len(s.methods) < 2 else best.label


def _rivals(s: Summary, best: Line) -> tuple[dict[str, Difference | None], list[str]]:
    """Other label -> its pair with the best one, and the labels that it cannot be told apart from."""
    pairs = {line.label: against(s.pairs, best.label, line.label) for line in s.methods if line is not best}
    return pairs, [label for label, pair in pairs.items() if not (pair and pair.separate and pair.gain.mean > 0)]


def _leader(s: Summary, best: Line) -> str:
    n, value = s.draws, number(best.score.mean)
    if len(s.methods) == 1:
        return f"{best.label} ends at {s.score} {value}" + (f", {_bounds(best.score)}." if n > 1 else ".")
    if n < 2:
        return (
            f"With {n} draw there is no telling methods apart: {best.label} has the best {s.score}, {value}, "
            "which another draw may reverse."
        )
    if not s.pairs:
        return f"{best.label} has the best mean {s.score}, {value}; no statistics were asked for."
    rivals, unclear = _rivals(s, best)
    beaten = [label for label in rivals if label not in unclear]
    if not unclear:
        closest = min((pair for pair in rivals.values() if pair), key=lambda pair: pair.gain.mean)
        return (
            f"{best.label} is better than {_and(beaten)} over {n} draws: {s.score} {value}, "
            f"ahead of {closest.second} by {number(closest.gain.mean)}, {_bounds(closest.gain)}."
        )
    needed = [pair.draws_needed for label in unclear if (pair := rivals[label]) and pair.draws_needed]
    text = f"No winner can be named: {_and([best.label, *unclear])} cannot be told apart with {n} draws"
    text += f" (a gap like the one seen needs about {max(needed)})." if needed else "."
    return text + (f" {best.label} is better than {_and(beaten)}." if beaten else "")


def against(pairs: Sequence[Difference], first: str, second: str) -> Difference | None:
    """The pair, seen from the first of the two."""
    for pair in pairs:
        if (pair.first, pair.second) == (first, second):
            return pair
        if (pair.first, pair.second) == (second, first):
            return reversed_(pair)
    return None


def reversed_(pair: Difference) -> Difference:
    """The same pair, second minus first."""
    g = pair.gain
    return replace(
        pair,
        first=pair.second,
        second=pair.first,
        gain=Interval(-g.mean, -g.high, -g.low, g.n, g.sd),
        wins=g.n - pair.wins - pair.ties,
        improvement=1 - pair.improvement,
    )


def _controls(s: Summary, best: Line) -> list[str]:
    known = {line.label: line for line in s.lines if line.role == "control"}
    names = {UNTUNED: "the untuned model"} | CONTROLS
    if not known:
        return []
    said = ", ".join(f"{names[label]} {number(line.score.mean)}" for label, line in known.items())
    text = f"For comparison: {said}."
    for label in (UNTUNED, "alone"):
        if (line := known.get(label)) is None or len(draws := common_draws([best, line])) < 2:
            continue
        x, y = ([each.by_draw[draw] for draw in draws] for each in (best, line))
        gain = statistics.difference((best.label, x), (label, y), s.higher_is_better).gain
        if not gain.low > 0:
            text += f" {best.label} cannot be told apart from {names[label]}, or is worse."
    pooled = known.get("pooled")
    if pooled is not None and (pooled.score.mean - best.score.mean) * (1 if s.higher_is_better else -1) < 0:
        text += (
            " Pooled data is below it, so it is no upper bound here: try other learning rates for it ([controls] grid)."
        )
    return [text]


def number(x: float) -> str:
    """Four significant figures at most.

    >>> number(0.84321), number(12.3456), number(float("nan"))
    ('0.843', '12.35', '-')
    """
    if not math.isfinite(x):
        return "-"
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.4g}"


def _bounds(x: Interval) -> str:
    return f"95 % interval {number(x.low)} to {number(x.high)}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
