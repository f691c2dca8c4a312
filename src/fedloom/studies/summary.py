"""Runs put side by side: a line for each method and control, all pairs of methods, and what can be said of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedloom import toml
from fedloom.data import choices
from fedloom.data.metrics import default_metrics
from fedloom.errors import ConfigError, RunError
from fedloom.studies import results, statistics
from fedloom.studies.results import Scored, Trace
from fedloom.studies.runner import FORMAT, INDEX
from fedloom.studies.statistics import Difference, Interval, VarianceSplit
from fedloom.studies.study import LOWER_IS_BETTER, UNTUNED, Budget, flat

SHARES = frozenset({"accuracy", "exact_match", *choices.METRICS})
"""Scores that are shares of right answers: the test set's own error is binomial."""


@dataclass(frozen=True)
class Line:
    """One method, or a control."""

    label: str
    role: str
    traces: list[Trace]
    scored: list[Scored]
    """By trace."""
    by_draw: dict[int, float]
    """Draw -> score, mean over its training seeds."""
    score: Interval
    up: float
    """Bytes up by the round that is scored, mean over runs; so are down, seconds and joules."""
    down: float
    seconds: float
    joules: float | None
    reached: list[tuple[float, float]] = field(default_factory=list)
    """Bytes (up, down) to reach the target, of the runs that did."""
    personal: Interval | None = None
    """After the personal phase: mean over the clients' own models."""
    error: float | None = None
    """The test set's own standard error."""

    @property
    def whole(self) -> bool:
        """Whether every run spent the budget."""
        return all(s.whole for s in self.scored)

    @property
    def of_clients(self) -> bool:
        """Whether scores are means over the clients' own models."""
        return any(r.get("eval_of") == "clients" for t in self.traces for r in t.records)


@dataclass(frozen=True)
class Summary:
    """All that a report shows."""

    name: str
    score: str
    higher_is_better: bool
    budget: Budget | None
    target: float | None
    lines: list[Line]
    """Methods in their order, then controls."""
    pairs: list[Difference]
    split: VarianceSplit | None
    tuning: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[Line]:
        """The lines that are compared."""
        return [line for line in self.lines if line.role == "method"]

    @property
    def draws(self) -> int:
        """Draws that all methods have."""
        return len(common_draws(self.methods)) if self.methods else 0


def read(paths: Sequence[Path], score: str | None = None) -> Summary:
    """The summary of a study's directory, or of run directories, by the study's or task's score or another one.

    Raises RunError if a path is neither, ConfigError if no run has that score.
    """
    study = len(paths) == 1 and (paths[0] / INDEX).is_file()
    found = _of_study(paths[0], score) if study else _of_runs(paths, score)
    if score is not None and not found.lines:
        raise ConfigError(f'no run has a score named {score!r}: see the keys of "eval" in its rounds.jsonl')
    return found


def _of_study(path: Path, asked: str | None) -> Summary:
    try:
        index = json.loads((path / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path / INDEX} cannot be read ({error}): run `fedloom compare` again, it keeps its runs"
        ) from None
    if index.get("format") != FORMAT:
        raise RunError(
            f"{path} has study format {index.get('format')!r}, expected {FORMAT}: run `fedloom compare` again"
        )
    budget, score = index["study"].get("budget"), asked or index["score"]
    # A target is a value of the study's own score.
    target = index["study"].get("target") if score == index["score"] else None
    traces: dict[str, list[Trace]] = {}
    roles: dict[str, str] = {}
    for cell in index["cells"]:
        if results.finished(path / cell["key"]):
            roles[cell["label"]] = cell["role"]
            trace = results.read(path / cell["key"], score, cell["label"], cell["draw"])
            traces.setdefault(cell["label"], []).append(trace)
    if not traces:
        raise RunError(f"no cell of the study in {path} has ended: go on with `fedloom compare`")
    return summarise(
        index["name"],
        score,
        traces,
        roles,
        toml.validate(Budget, budget) if budget else None,
        target,
        index["tuning"],
        index["failed"],
        tested=index["study"].get("statistics") is not False,
    )


def _of_runs(paths: Sequence[Path], asked: str | None) -> Summary:
    """Runs that differ in seeds alone are draws of one method."""
    first = results.read(paths[0], "loss").config
    task = first["task"]
    score = asked or (task.get("metrics") or default_metrics(task["kind"], task["data"]))[0]
    groups: dict[str, list[Trace]] = {}
    names: dict[str, str] = {}
    for path in paths:
        trace = results.read(path, score)
        key = json.dumps(_without_seeds(trace.config), sort_keys=True)
        name = str(trace.config["method"]["name"]).rpartition(":")[2]
        taken = {label for other, label in names.items() if other != key}
        label = names.setdefault(key, name if name not in taken else path.name if path.name not in taken else str(path))
        groups.setdefault(label, []).append(replace(trace, label=label, draw=_split_seed(trace.config)))
    title = paths[0].name if len(paths) == 1 else f"{len(paths)} runs"
    return summarise(title, score, groups, dict.fromkeys(groups, "method"))


def _split_seed(config: Mapping[str, Any]) -> int:
    return int(config["clients"].get("split_seed", config["seed"]))


def _without_seeds(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: x for key, x in flat(config).items() if key not in ("seed", "clients.split_seed")}


def summarise(
    name: str,
    score: str,
    traces: Mapping[str, list[Trace]],
    roles: Mapping[str, str],
    budget: Budget | None = None,
    target: float | None = None,
    tuning: list[dict[str, Any]] | None = None,
    failed: dict[str, str] | None = None,
    tested: bool = True,
) -> Summary:
    """Put runs side by side: label -> its runs, label -> `method` or `control`."""
    higher = score not in LOWER_IS_BETTER
    lines = [made for label, group in traces.items() if (made := _line(label, roles[label], group, budget)) is not None]
    ordered = sorted(lines, key=lambda line: line.role != "method")
    methods = [line for line in ordered if line.role == "method"]
    if target is None and len(methods) > 1:
        target = (min if higher else max)(line.score.mean for line in methods)
    if target is not None:
        ordered = [replace(line, reached=_reached(line.traces, target, higher)) for line in ordered]
        methods = [line for line in ordered if line.role == "method"]
    untuned = _untuned(ordered)
    return Summary(
        name,
        score,
        higher,
        budget,
        target,
        ordered + ([untuned] if untuned else []),
        _pairs(methods, higher) if tested else [],
        _split(methods) if tested else None,
        tuning or [],
        failed or {},
    )


def _line(label: str, role: str, traces: list[Trace], budget: Budget | None) -> Line | None:
    limit = budget if role == "method" or budget is None else budget.of_control
    found = [(trace, at) for trace in traces if (at := results.at_budget(trace, limit)) is not None]
    if not found:
        return None
    used, scored = [trace for trace, _ in found], [s for _, s in found]
    by_draw = _by_draw([(trace.draw, s.score) for trace, s in found])
    personal = [
        (trace.draw, trace.personal["eval"][trace.score])
        for trace in used
        if trace.personal and trace.personal.get("eval", {}).get(trace.score) is not None
    ]

    def spent(kind: str) -> float:
        return float(np.mean([trace.spent[kind][_index(trace, s.round)] for trace, s in found]))

    return Line(
        label,
        role,
        used,
        scored,
        by_draw,
        statistics.interval(list(by_draw.values())),
        spent("up"),
        spent("down"),
        spent("seconds"),
        spent("joules") if all(trace.simulated for trace in used) else None,
        personal=statistics.interval(list(_by_draw(personal).values())) if personal else None,
        error=_error(used, float(np.mean(list(by_draw.values())))),
    )


def _index(trace: Trace, round: int) -> int:
    return next(i for i, record in enumerate(trace.records) if record["round"] == round)


def _by_draw(scores: Sequence[tuple[int, float]]) -> dict[int, float]:
    return {draw: float(np.mean([x for d, x in scores if d == draw])) for draw in sorted({d for d, _ in scores})}


def _error(traces: list[Trace], mean: float) -> float | None:
    rows = traces[0].manifest.get("rows", {}).get("eval")
    return statistics.binomial_error(mean, rows) if rows and traces[0].score in SHARES else None


def _reached(traces: list[Trace], target: float, higher: bool) -> list[tuple[float, float]]:
    return [found for trace in traces if (found := results.reach(trace, target, higher)) is not None]


def _untuned(lines: Sequence[Line]) -> Line | None:
    """Round 0 of the pooled control, or else of the first line: what was there before any training."""
    source = next((line for line in lines if line.label == "pooled"), lines[0] if lines else None)
    if source is None:
        return None
    scored = [Scored(0, score, 0.0, True) for trace in source.traces if (score := trace.scores[0]) is not None]
    if len(scored) < len(source.traces):
        return None
    by_draw = _by_draw([(trace.draw, s.score) for trace, s in zip(source.traces, scored, strict=True)])
    mean = statistics.interval(list(by_draw.values()))
    error = _error(source.traces, mean.mean)
    return Line(UNTUNED, "control", source.traces, scored, by_draw, mean, 0.0, 0.0, 0.0, None, error=error)


def common_draws(lines: Sequence[Line]) -> list[int]:
    """Draws that all lines have."""
    return sorted(set.intersection(*(set(line.by_draw) for line in lines)))


def _pairs(methods: Sequence[Line], higher: bool) -> list[Difference]:
    found = []
    for i, first in enumerate(methods):
        for second in methods[i + 1 :]:
            draws = common_draws([first, second])
            if len(draws) >= 2:
                x, y = ([line.by_draw[draw] for draw in draws] for line in (first, second))
                found.append(statistics.difference((first.label, x), (second.label, y), higher))
    adjusted = statistics.holm([pair.p for pair in found])
    return [replace(pair, p_holm=p) for pair, p in zip(found, adjusted, strict=True)]


def _split(methods: Sequence[Line]) -> VarianceSplit | None:
    """Of a balanced table: draws that all methods have, with the same number of seeds."""
    if len(methods) < 2:
        return None
    draws = common_draws(methods)
    table = {
        line.label: [[s.score for t, s in zip(line.traces, line.scored, strict=True) if t.draw == d] for d in draws]
        for line in methods
    }
    if len({len(scores) for rows in table.values() for scores in rows}) != 1:
        return None
    return statistics.variance_split({label: np.asarray(rows) for label, rows in table.items()})


def differences(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Dotted key of the run file -> label -> value, of the keys in which methods differ."""
    configs = {line.label: flat(line.traces[0].config) for line in lines if line.role == "method"}
    keys = dict.fromkeys(key for values in configs.values() for key in values)
    found = {}
    for key in keys:
        values = {label: config.get(key) for label, config in configs.items()}
        if key not in ("seed", "clients.split_seed") and len({json.dumps(x) for x in values.values()}) > 1:
            found[key] = values
    return found
