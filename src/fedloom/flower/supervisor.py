"""Runs processes for another one: starts again those that should live, and stops all when it ends, however: kill -9 included.

    python -m fedloom.flower.supervisor < one line of JSON, then silence

The line is {"mark", "remove", "programs": [{"name", "command", "log", "env", "restart"}]}. On standard output comes a line
[name, process id] for each start, and [name, null] for each end. The end of its standard input, which comes when the process
that started it closes it or dies, is the sign to stop; then the folder `remove` goes too. Every process carries a mark in its
environment that its own children inherit: what is stopped in the end is what carries the mark, and nothing else. Should the
supervisor itself be killed, the kernel ends its children, and `Supervisor.close` whatever carries the mark.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.errors import RunError

MARK = "FEDLOOM_SUPERVISOR"
_PATIENCE_S = 5.0
_LOOK_S = 0.2
_LONGEST_PAUSE_S = 60.0
_PR_SET_PDEATHSIG = 1


# the process that starts it


@dataclass
class Program:
    """One process to start."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    restart: bool = False
    """Whether it is started again when it ends."""


class Supervisor:
    """Processes that end with this one. Their output is in `logs`/NAME.log; `remove` is a folder that goes with them.

    Raises RunError if one of them cannot be started.
    """

    def __init__(self, programs: Sequence[Program], logs: Path, remove: Path | None = None) -> None:
        self._mark = secrets.token_hex(16)
        self._remove = remove
        self.ids: dict[str, int | None] = {}
        """Name -> process id; None of a process that has ended."""
        self._ears = threading.Thread(target=self._listen, daemon=True)
        logs.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedloom.flower.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        lines = [vars(program) | {"log": str(logs / f"{program.name}.log")} for program in programs]
        order = {"mark": self._mark, "remove": None if remove is None else str(remove), "programs": lines}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        while len(self.ids) < len(programs):
            if not (line := self.process.stdout.readline()):
                self.close()
                raise RunError(f"a process could not be started, of {', '.join(p.name for p in programs)}: see {logs}")
            self._hear(line)
        self._ears.start()

    def running(self, name: str) -> bool:
        """Whether a process has not ended."""
        try:
            return Path(f"/proc/{self.ids[name]}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def close(self) -> None:
        """Stop all; returns when they have ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.process.wait() != 0:  # it was killed, so that nobody swept after it
            stop(self._mark)
            _remove(self._remove)
        if self._ears.is_alive():
            self._ears.join(_PATIENCE_S)
        self.process.stdout.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._hear(line)

    def _hear(self, line: str) -> None:
        name, pid = json.loads(line)
        self.ids[name] = pid


# the supervising process


def main() -> None:
    """Start, start again, wait for the end of standard input, stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us: it will close our input
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    order = json.loads(sys.stdin.readline())
    try:
        watched = [_Watched(program, order["mark"]) for program in order["programs"]]
        while not _input_ended():
            for one in watched:
                one.look()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop(order["mark"])
        _remove(None if order["remove"] is None else Path(order["remove"]))


class _Watched:
    """A program that runs, or ran, or will run again after a pause that grows with every quick end."""

    def __init__(self, program: dict[str, Any], mark: str) -> None:
        self._program, self._mark = program, mark
        self._pause_s, self._again = 1.0, float("inf")
        self._started = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = self._start()

    def look(self) -> None:
        """Say if it ended; start it again if it is time to."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            self._process = None
            _say(self._program["name"], None)
            if self._program["restart"]:
                lived = now - self._started > _LONGEST_PAUSE_S
                self._pause_s = 1.0 if lived else min(2 * self._pause_s, _LONGEST_PAUSE_S)
                self._again = now + self._pause_s / 2
        if now >= self._again:
            self._again, self._started = float("inf"), now
            self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self._program["log"], "ab") as log:
            process = subprocess.Popen(
                self._program["command"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._program["env"] | {MARK: self._mark},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        _say(self._program["name"], process.pid)
        return process


_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """In the child, before its program: the kernel ends it when its parent ends, even by kill -9."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(name: str, pid: int | None) -> None:
    with suppress(BrokenPipeError):
        print(json.dumps([name, pid]), flush=True)


def _input_ended() -> bool:
    ready, _, _ = select.select([0], [], [], _LOOK_S)
    return bool(ready) and not os.read(0, 4096)


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def marked(mark: str) -> list[int]:
    """Ids of this user's processes that carry the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def stop(mark: str) -> None:
    """End what carries the mark: asked first, then killed."""
    _send(marked(mark), signal.SIGTERM)
    until = time.monotonic() + _PATIENCE_S
    while (left := _alive(marked(mark))) and time.monotonic() < until:
        time.sleep(0.1)
    while left:
        _send(left, signal.SIGKILL)
        time.sleep(0.05)
        left = _alive(marked(mark))


def _alive(ids: Iterable[int]) -> list[int]:
    if __name__ == "__main__":
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # our own children stay in the table until they are waited for
                pass
    return [id for id in ids if Path(f"/proc/{id}").exists()]


def _send(ids: Iterable[int], what: signal.Signals) -> None:
    for id in ids:
        with suppress(ProcessLookupError):
            os.kill(id, what)


if __name__ == "__main__":
    main()
