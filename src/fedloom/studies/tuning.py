"""Choose the values of a grid: by the mean score on draws that no result is taken from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError
from fedloom.studies import cells as planned
from fedloom.studies import results
from fedloom.studies.study import CONTROLS, LOWER_IS_BETTER, Study


def choose(study: Study, out: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Label -> the grid point with the best mean tuning score, and what every point scored.

    Raises ConfigError if all points of a grid failed.
    """
    lower = study.file.tuning.score in LOWER_IS_BETTER
    found: dict[str, list[tuple[dict[str, Any], list[float]]]] = {}
    for cell in planned.tuning_cells(study):
        points = found.setdefault(cell.label, [])
        if cell.point not in [point for point, _ in points]:
            points.append((cell.point, []))
        if results.finished(out / cell.key):
            budget = study.file.budget
            if budget is not None and cell.label in CONTROLS:
                budget = budget.of_control
            scored = results.at_budget(results.read(out / cell.key, study.file.tuning.score), budget)
            if scored is not None:
                next(scores for point, scores in points if point == cell.point).append(scored.score)
    chosen = {label: points[0] for label, points in planned.grids(study).items()}
    for label, points in found.items():
        whole = [
            (sum(scores) / len(scores), point) for point, scores in points if len(scores) == study.file.tuning.draws
        ]
        if not whole:
            raise ConfigError(f"{label}: training failed at every point of its grid, expected one that trains")
        best = (min if lower else max)(score for score, _ in whole)
        chosen[label] = next(point for score, point in whole if score == best)
    tried = [
        {"label": label, "point": point, "scores": scores, "chosen": point == chosen[label]}
        for label, points in found.items()
        for point, scores in points
    ]
    return chosen, tried
