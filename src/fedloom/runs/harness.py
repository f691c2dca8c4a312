"""Score a finished run by lm-evaluation-harness, under its task names or from task files of one's own.

Gao et al., "The Language Model Evaluation Harness", zenodo 10.5281/zenodo.12608602: an optional package, `fedloom[harness]`.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError, nearest
from fedloom.runs.experiment import device_of
from fedloom.runs.finished import export_saved
from fedloom.runs.run_directory import RunDirectory


def evaluate_tasks(
    path: Path, tasks: Sequence[str], client: str | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value of a saved adapter, merged. A task is one of the harness's names, or a task file (.yaml).

    `limit`: so many rows of each task. Raises ConfigError for a run of another kind than causal-lm, an unknown task, or without
    the package; the data of most tasks comes from a hub.
    """
    config = RunDirectory.open(path).config()
    if config.task.kind != "causal-lm":
        raise ConfigError(
            f"{path} is a {config.task.kind}, expected a run of task.kind = 'causal-lm': tasks score what it writes"
        )
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "lm-evaluation-harness is not installed, expected it for --tasks: pip install 'fedloom[harness]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    named = [_name_in(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(
        include_path=[str(folder) for folder in sorted({file.parent.resolve() for file in files})] or None
    )
    for name in named:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"the harness has no task {name!r}{nearest(name, manager.all_tasks)}: `lm_eval ls tasks` lists them"
            )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        export_saved(path, model, client, merge=True)
        lm = HFLM(pretrained=str(model), batch_size=config.train.batch_size, device=str(device_of(config)))
        try:
            found: Any = lm_eval.simple_evaluate(
                lm,
                tasks=named,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                verbosity="ERROR",
            )
        except (OSError, ValueError) as error:  # of a task's data, which most often comes from a hub
            raise ConfigError(f"--tasks {','.join(tasks)}: {error}") from error
    return {task: _values(scores) for task, scores in found["results"].items()}


def _name_in(file: Path) -> str:
    """The task's name in a task file, without running what the file may name."""
    try:
        found = re.search(r"^task:\s*[\"']?([^\s\"']+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError as error:
        raise ConfigError(f"the task file {file} cannot be read: {error.strerror}") from None
    if found is None:
        raise ConfigError(f"{file} names no task, expected a line `task: NAME`")
    return found[1]


def _values(scores: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results: `acc,none` is `acc`."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in scores.items()
        if isinstance(value, int | float) and "stderr" not in key and key not in ("sample_len",)
    }
