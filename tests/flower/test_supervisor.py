"""What was started ends with who started it, however that ends; what should live is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.errors import RunError
from fedloom.flower import supervisor
from fedloom.flower.supervisor import Program, Supervisor

TREE = ["bash", "-c", "setsid sleep 60 & sleep 60"]
"""A process with a child that leaves its session."""


def mark_of(pid: int | None) -> str:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(line.split("=", 1) for line in lines if line.startswith(supervisor.MARK))[supervisor.MARK]


def soon(there: Callable[[], bool], patience_s: float = 10.0) -> bool:
    until = time.monotonic() + patience_s
    while not there() and time.monotonic() < until:
        time.sleep(0.05)
    return there()


def test_it_ends_what_it_started_and_nothing_else(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    folder = tmp_path / "sockets"
    folder.mkdir()
    started = Supervisor([Program("child", TREE)], tmp_path, remove=folder)
    mark = mark_of(started.ids["child"])
    assert soon(lambda: len(supervisor.marked(mark)) == 3) and started.running("child")
    started.close()
    assert supervisor.marked(mark) == [] and other.poll() is None and not folder.exists()
    assert not started.running("child")
    other.kill()
    other.wait()


def test_what_a_killed_supervisor_leaves_is_ended_by_the_kernel_and_by_close(tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    started = Supervisor([Program("child", TREE), Program("other", ["sleep", "60"])], tmp_path, remove=folder)
    mark, children = mark_of(started.ids["child"]), list(started.ids.values())
    assert soon(lambda: len(supervisor.marked(mark)) == 4)
    started.process.kill()
    assert soon(lambda: not set(children) & set(supervisor.marked(mark)))
    started.close()
    assert supervisor.marked(mark) == [] and not folder.exists()


def test_what_is_killed_with_its_owner_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fedloom.flower.supervisor import Program, Supervisor\n"
        f"s = Supervisor([Program('child', {TREE!r})], Path({str(tmp_path)!r}), remove=Path({str(tmp_path / 'gone')!r}))\n"
        "print(s.ids['child'], flush=True); time.sleep(60)"
    )
    for what in (signal.SIGKILL, signal.SIGTERM):
        (tmp_path / "gone").mkdir()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdout is not None
            mark = mark_of(int(owner.stdout.readline()))
            owner.send_signal(what)
            owner.wait()
        assert soon(lambda mark=mark: supervisor.marked(mark) == [] and not (tmp_path / "gone").exists())


def test_a_program_that_should_live_is_started_again(tmp_path: Path) -> None:
    programs = [Program("worker", ["sleep", "60"], restart=True), Program("once", ["sleep", "60"])]
    started = Supervisor(programs, tmp_path)
    first, once = started.ids["worker"], started.ids["once"]
    assert first is not None and once is not None
    os.kill(first, signal.SIGKILL)
    os.kill(once, signal.SIGKILL)
    assert soon(lambda: started.ids["worker"] not in (first, None)) and started.running("worker")
    assert soon(lambda: started.ids["once"] is None) and not started.running("once")
    mark = mark_of(started.ids["worker"])
    started.close()
    assert supervisor.marked(mark) == []


def test_a_program_that_ends_at_once_is_not_started_without_a_pause(tmp_path: Path) -> None:
    started = Supervisor([Program("worker", ["bash", "-c", "echo began"], restart=True)], tmp_path)
    time.sleep(4.0)
    started.close()
    assert 2 <= (tmp_path / "worker.log").read_text().count("began") <= 4


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="could not be started, of nothing"):
        Supervisor([Program("nothing", [str(tmp_path / "nothing")])], tmp_path)
