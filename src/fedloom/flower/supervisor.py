"""Starts processes for another one and stops them all when it ends, however it ends: kill -9 included.

    python -m fedloom.engines.keeper < one line of JSON, then silence

The line is a list of {"name", "command", "log", "env"}. The end of its standard input, which comes when the process that
started it closes it or dies, is the sign to stop. Every process carries a mark in its environment that its own children
inherit: what is stopped in the end is what carries the mark, and nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

MARK = "FEDLOOM_KEEPER"
_PATIENCE_S = 5.0


def main() -> None:
    """Start, wait for the end of standard input, stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us: it will close our input
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    mark = secrets.token_hex(16)
    try:
        for spec in json.loads(sys.stdin.readline()):
            with open(spec["log"], "ab") as log:
                started = subprocess.Popen(
                    spec["command"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | spec["env"] | {MARK: mark},
                    start_new_session=True,
                )
            print(json.dumps([spec["name"], started.pid]), flush=True)
        while os.read(0, 4096):
            pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop(mark)


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
