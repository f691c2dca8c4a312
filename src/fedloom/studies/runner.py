"""Run a study's cells: those that are missing, one after the other or several at once; a killed study goes on."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom import disk
from fedloom.errors import ConfigError, FedloomError, RoundError, RunError
from fedloom.runs import run as runs
from fedloom.runs.run import Observer
from fedloom.runs.run_directory import RunDirectory
from fedloom.studies import cells as planned
from fedloom.studies import results
from fedloom.studies.cells import Cell
from fedloom.studies.clock import Clock
from fedloom.studies.study import Study
from fedloom.studies.tuning import choose

FORMAT = 1
INDEX = "study.json"


class Progress(Observer):
    """What is told while a study goes on, beside what its runs tell; this one ignores it."""

    def cell(self, cell: Cell, left: str) -> None:
        """A cell begins; `left` is what is known of the time that remains."""

    def ended(self, cell: Cell, trouble: str) -> None:
        """A cell ended; `trouble` is empty if it ended well."""


def compare(study: Study, out: Path, jobs: int = 1, progress: Progress | None = None) -> dict[str, str]:
    """Run what is missing of a study below `out`, and write `study.json` there. Returns cell -> why, of cells that failed.

    Raises ConfigError if no method reaches the budget, as soon as one draw shows it.
    """
    progress = progress or Progress()
    with held(out):
        return _compare(study, out, jobs, progress)


def _compare(study: Study, out: Path, jobs: int, progress: Progress) -> dict[str, str]:
    clock, failed = Clock(jobs), dict[str, str]()
    # As many cells are scored whichever points of the grids are chosen.
    scored = planned.cells(study, {label: points[0] for label, points in planned.grids(study).items()})
    _run(planned.tuning_cells(study), out, clock, [cell.label for cell in scored], failed, progress)
    chosen, tried = choose(study, out)
    every = planned.cells(study, chosen)
    index(study, out, every, tried, failed)  # so that a report can be had while the study goes on
    # The first draw alone: a budget out of reach is told before the others are run.
    first, others = [c for c in every if c.draw == 0], [c for c in every if c.draw > 0]
    _run(first, out, clock, [cell.label for cell in others], failed, progress)
    check_budget(study, out, first)
    _run(others, out, clock, [], failed, progress)
    index(study, out, every, tried, failed)
    return failed


def _run(
    todo: Sequence[Cell], out: Path, clock: Clock, later: list[str], failed: dict[str, str], progress: Progress
) -> None:
    missing = []
    for cell in todo:
        if results.finished(out / cell.key):
            records = RunDirectory(out / cell.key).rounds()
            clock.add(cell.label, sum(record["seconds"]["total"] for record in records))
        else:
            missing.append(cell)
    work = _one_by_one if clock.jobs == 1 or len(missing) < 2 else _at_once
    for cell, seconds, trouble in work(missing, out, clock, later, progress):
        if trouble:
            failed[cell.key] = trouble
        else:
            clock.add(cell.label, seconds)
        progress.ended(cell, trouble)


Ended = tuple[Cell, float, str]


def _one_by_one(todo: Sequence[Cell], out: Path, clock: Clock, later: list[str], progress: Progress) -> Iterator[Ended]:
    for i, cell in enumerate(todo):
        progress.cell(cell, clock.words([c.label for c in todo[i:]] + later))
        seconds, trouble = _train(cell, out, progress)
        yield cell, seconds, trouble


def _at_once(todo: Sequence[Cell], out: Path, clock: Clock, later: list[str], progress: Progress) -> Iterator[Ended]:
    threads = max(1, (os.cpu_count() or 1) // clock.jobs)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        clock.jobs, multiprocessing.get_context("spawn"), initializer=_worker, initargs=(os.getpid(), threads)
    )
    waiting, running = list(todo), dict[Future[tuple[float, str]], Cell]()
    try:
        while waiting or running:
            while waiting and len(running) < clock.jobs:
                cell = waiting.pop(0)
                labels = [c.label for c in (cell, *running.values(), *waiting)] + later
                progress.cell(cell, clock.words(labels))
                with _uninterrupted():
                    running[pool.submit(_train, cell, out)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), *future.result()
    except BaseException:
        # A cell may be killed at any instant: it is gone on with.
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Workers that start in here inherit that Ctrl-C is not for them: it ends their parent, and so them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worker(parent: int, threads: int) -> None:
    """A worker of its own, which ends with its parent, however that ends."""
    import torch

    from fedloom.data import hub

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    hub.quiet()
    torch.set_num_threads(threads)


def _train(cell: Cell, out: Path, observer: Observer | None = None) -> tuple[float, str]:
    """(seconds, what went wrong) of one cell, from the start or from where it was killed."""
    start, path = time.perf_counter(), out / cell.key
    try:
        if (path / "run.toml").is_file():
            runs.resume(path, observer)
        else:
            runs.start(cell.config(), path, observer)
    except RoundError as error:  # of this cell alone: the others can still be compared
        return time.perf_counter() - start, str(error)
    except FedloomError as error:
        error.add_note(f"in {path}")
        raise
    return time.perf_counter() - start, ""


def check_budget(study: Study, out: Path, group: Sequence[Cell]) -> None:
    """Raise ConfigError if no method spends the budget."""
    budget = study.file.budget
    if budget is None:
        return
    spent: dict[str, float] = {}
    for cell in group:
        if cell.role != "method" or not results.finished(out / cell.key):
            continue
        trace = results.read(out / cell.key, study.score)
        scored = results.at_budget(trace, budget)
        if scored is None or scored.whole:
            return
        spent[cell.label] = trace.spent[budget.kind][-1]
    told = ", ".join(f"{label} {amount:.4g}" for label, amount in spent.items())
    if spent:
        raise ConfigError(
            f"no method reaches the budget of {budget.amount:.4g} {budget.kind}; spent in all their rounds: {told}. "
            "Raise train.rounds, or lower the budget"
        )


def index(
    study: Study, out: Path, every: Sequence[Cell], tried: list[dict[str, Any]], failed: Mapping[str, str]
) -> None:
    """Write what a report needs to find and name the cells."""
    disk.write_json(
        out / INDEX,
        {
            "format": FORMAT,
            "name": study.name,
            "score": study.score,
            "study": study.file.model_dump(exclude_none=True),
            "tuning": tried,
            "failed": dict(failed),
            "cells": [
                {"key": c.key, "label": c.label, "role": c.role, "draw": c.draw, "seed": c.seed, "point": c.point}
                for c in every
            ],
        },
    )


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes from running the same study. Raises RunError if one does."""
    with disk.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is running the study in {out}: wait for it, or stop it") from None
        yield
    finally:
        os.close(handle)
