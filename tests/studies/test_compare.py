"""Studies that really train, on a tiny encoder: cells, resuming, budgets, failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.cli.main import call
from fedloom.errors import ConfigError, RunError
from fedloom.runs.config import RunConfig
from fedloom.studies import results, runner, study, summary
from fedloom.studies.cells import Cell
from fedloom.studies.clock import Clock
from fedloom.studies.runner import Progress
from fedloom.studies.study import Study

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def run_file(settings: Settings, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RunConfig.model_validate(settings(train={"rounds": 2}, task={"holdout": 0.3})).to_toml())
    return path


def parsed(run_file: Path, **values: Any) -> Study:
    """A study whose controls are not tuned, to save time."""
    defaults = {"base": run_file.name, "draws": 2, "controls": {"grid": {"train.lr": [3e-2]}}}
    return study.parse(defaults | values, "study.toml", run_file.parent)


class Seen(Progress):
    """Which cells were run."""

    def __init__(self) -> None:
        self.cells: list[str] = []

    def cell(self, cell: Cell, left: str) -> None:
        self.cells.append(f"{cell.label} {cell.draw}")


def test_only_what_is_missing_is_run(run_file: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", Seen()
    assert runner.compare(parsed(run_file, draws=1, methods={"fedit": {}}), out, progress=seen) == {}
    assert seen.cells == ["fedit 0", "alone 0", "pooled 0"]
    seen = Seen()
    both = {"fedit": {}, "fslora": {"set": {"clients.ranks": [2, 4]}}}
    runner.compare(parsed(run_file, draws=2, methods=both), out, progress=seen)
    assert seen.cells == ["fslora 0", "fedit 1", "fslora 1", "alone 1", "pooled 1"]
    seen = Seen()
    runner.compare(parsed(run_file, draws=2, methods=both), out, progress=seen)
    assert seen.cells == []

    found = summary.read([out])
    assert [(line.label, line.role) for line in found.lines] == [
        ("fedit", "method"), ("fslora", "method"), ("alone", "control"), ("pooled", "control"), ("untuned", "control"),
    ]  # fmt: skip
    for line in found.lines[:4]:
        for draw, trace in enumerate(line.traces):
            last = trace.records[-1]["eval"]["accuracy"]
            assert line.by_draw[draw] == last and trace.config["clients"]["split_seed"] == draw
    untuned = found.lines[-1]
    assert untuned.by_draw == {d: found.lines[3].traces[d].records[0]["eval"]["accuracy"] for d in (0, 1)}
    # The same draw is the same rows for every method, and another draw is not.
    hashes = {
        (line.label, t.draw): (t.manifest["hashes"]["data"], t.manifest["hashes"]["eval_data"])
        for line in found.lines[:4]
        for t in line.traces
    }
    for draw in (0, 1):
        assert len({rows for (_, d), rows in hashes.items() if d == draw}) == 1
    assert hashes["fedit", 0] != hashes["fedit", 1]
    partitions = {line.label: line.traces[0].manifest["hashes"]["partition"] for line in found.lines[:3]}
    assert len(set(partitions.values())) == 1
    with runner.held(out), pytest.raises(RunError, match="another process is running the study"), runner.held(out):
        pass


@pytest.mark.slow
def test_several_at_once_leave_what_one_after_the_other_leaves(run_file: Path, tmp_path: Path) -> None:
    made = parsed(run_file, draws=1, methods={"fedit": {}})
    runner.compare(made, tmp_path / "one")
    runner.compare(made, tmp_path / "two", jobs=2)
    for line, other in zip(summary.read([tmp_path / "one"]).lines, summary.read([tmp_path / "two"]).lines, strict=True):
        assert line.by_draw == other.by_draw and line.label == other.label


@pytest.mark.slow
def test_a_study_killed_twice_goes_on(run_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text('base = "run.toml"\ndraws = 2\n[methods.fedit]\n[methods.fedsa_lora]\n')
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from fedloom.cli.main import main; main()"]
    command += ["compare", str(file), "--out", str(out)]
    for least in (1, 3):
        env = os.environ | {"OMP_NUM_THREADS": "1"}  # as this process: sums over more threads have other last bits
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, env=env)
        deadline = time.monotonic() + 180
        while len(list(out.glob("*/*/run.toml"))) <= least and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "the study ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    whole = {path for path in out.glob("*/*") if results.finished(path)}
    assert 0 < len(whole) < 8
    assert {line.label for line in summary.read([out]).lines}  # what has ended can be reported
    before = {path: (path / "rounds.jsonl").stat().st_mtime_ns for path in whole}
    assert call(["compare", str(file), "--out", str(out)]) == 0
    assert before == {path: (path / "rounds.jsonl").stat().st_mtime_ns for path in whole}
    undisturbed = tmp_path / "undisturbed"
    runner.compare(study.load(file), undisturbed)
    for ours, theirs in zip(summary.read([out]).lines, summary.read([undisturbed]).lines, strict=True):
        assert ours.by_draw == theirs.by_draw
        adapters = [t.manifest["hashes"]["adapter"] for t in ours.traces]
        assert adapters == [t.manifest["hashes"]["adapter"] for t in theirs.traces]


def test_methods_are_scored_where_they_have_spent_the_budget(run_file: Path, tmp_path: Path) -> None:
    methods = {"fedit": {}, "ffa_lora": {}}
    runner.compare(parsed(run_file, draws=1, methods={"fedit": {}}), tmp_path / "out")
    trace = summary.read([tmp_path / "out"]).lines[0].traces[0]
    round_bytes = sum(trace.records[1]["bytes_up"].values()) + sum(trace.records[1]["bytes_down"].values())
    made = parsed(run_file, draws=1, methods=methods, budget={"bytes": 1.5 * round_bytes})
    runner.compare(made, tmp_path / "out")
    fedit, ffa = summary.read([tmp_path / "out"]).methods
    # FFA sends half the factors: it trains both of its rounds, FedIT one.
    assert [s.round for s in fedit.scored] == [1] and fedit.by_draw[0] == trace.records[1]["eval"]["accuracy"]
    assert fedit.up + fedit.down == round_bytes and fedit.whole
    assert [s.round for s in ffa.scored] == [2] and ffa.up + ffa.down < 1.5 * round_bytes


def test_a_budget_that_no_method_reaches_is_told_after_one_draw(run_file: Path, tmp_path: Path) -> None:
    seen = Seen()
    made = parsed(run_file, draws=3, methods={"fedit": {}}, budget={"samples": 1e6})
    with pytest.raises(
        ConfigError, match=r"no method reaches the budget of 1e\+06 samples; spent in all .*: fedit 84\."
    ):
        runner.compare(made, tmp_path / "out", progress=seen)
    assert {cell.split()[1] for cell in seen.cells} == {"0"}


def test_a_grid_is_decided_by_its_tuning_draws(run_file: Path, tmp_path: Path) -> None:
    methods = {"fedit": {"grid": {"train": {"lr": [1e-6, 3e-2]}}}}
    runner.compare(parsed(run_file, draws=1, methods=methods, controls={}), tmp_path / "out")
    found = summary.read([tmp_path / "out"])
    assert [(t["label"], t["point"]["train.lr"], t["chosen"]) for t in found.tuning] == [
        (label, lr, lr == 3e-2) for label in ("fedit", "alone", "pooled") for lr in (1e-6, 3e-2)
    ]
    for low, high in pairwise(found.tuning):
        assert not high["chosen"] or high["scores"] < low["scores"]
    assert [line.traces[0].config["train"]["lr"] for line in found.lines] == [3e-2] * 4


def test_a_cell_that_fails_does_not_stop_the_others(run_file: Path, tmp_path: Path) -> None:
    methods = {"fedit": {}, "wild": {"name": "fedit", "set": {"train": {"lr": 1e30, "optimizer": "sgd", "clip": 0}}}}
    failed = runner.compare(parsed(run_file, draws=2, methods=methods), tmp_path / "out")
    assert len(failed) == 2 and all(key.startswith("wild/") and "round 1" in why for key, why in failed.items())
    found = summary.read([tmp_path / "out"])
    assert [line.label for line in found.methods] == ["fedit"] and found.failed == failed


def test_alone_is_training_without_federation(settings: Settings, tmp_path: Path) -> None:
    def trained(name: str, count: int) -> fedloom.Result:
        return fedloom.run(settings(method={"name": name}, clients={"count": count}), tmp_path / f"{name[:5]}{count}")

    alone = "fedloom.studies.alone:Alone"
    one, same = trained(alone, 1), trained("fedit", 1)
    for ours, theirs in zip(one.rounds, same.rounds, strict=True):
        assert ours["eval"] == pytest.approx(theirs["eval"], abs=1e-6)
    three = trained(alone, 3)
    assert all(sum(r["bytes_up"].values()) == 0 and r["dropped"] == {} for r in three.rounds)
    each = three.rounds[-1]["eval_clients"]
    assert len(each) == 3 and len({x["loss"] for x in each.values()}) == 3


def test_the_time_left_is_a_range_or_nothing() -> None:
    clock = Clock(1)
    assert clock.words(["fedit"] * 3) == "3 cells to go, no estimate before the first has ended"
    clock.add("fedit", 10.0)
    clock.add("fedit", 14.0)
    assert clock.left(["fedit", "fedit", "other"]) == (30.0, 42.0)
    assert clock.words(["fedit"]) == "1 cell to go, about 10 s to 14 s"


def test_the_command_line(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text('base = "run.toml"\n[methods.fedit]\n')
    assert call(["compare", str(file), "--draws", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "fedit/draw-0-seed-0: running (3 cells to go" in text and f"report:  {out}/report.html" in text
    assert "untuned base" in text and "pooled data" in text and "fedit ends at accuracy" in text
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    file.write_text('base = "run.toml"\n[methods.fedittt]\n')
    assert call(["compare", str(file)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and "did you mean 'fedit'" in told.err and told.out == ""
