"""What fedloom makes of one bad model or data file, and whether that is what a user should see.

It should train, or end with one short message, leave no run directory, take less than a minute, obey no escape sequence of
others' text and run nobody's code.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from fedloom.cli.main import call

SECONDS = 60
LONGEST = 400
"""Characters of a message, the folder's name apart."""

Expected = Literal["trains", "refused", "either"]
"""`either`: it is arguable which, or another version of a library reads what this one does not."""


@dataclass(frozen=True)
class Case:
    """One bad thing, and what should become of it."""

    name: str
    expected: Expected
    make: Callable[[Path], Mapping[str, Any]]
    """Writes it below a folder; returns keys of the run file, such as {"task.data": ...}."""
    says: str = ""
    """Words that the message must have."""


@dataclass(frozen=True)
class Outcome:
    """What became of it."""

    code: int | None
    """None where it did not end by itself."""
    said: str


Run = Callable[[Path, Path], Outcome]
"""How `fedloom run` is done with a run file, into a directory."""


class _Late(BaseException):
    pass


def settings(folder: Path, keys: Mapping[str, Any]) -> Path:
    """The run file of a case: one round of two clients and one step."""
    values: dict[str, Any] = {
        "model": {"dtype": "float32"},
        "task": {},
        "lora": {"rank": 2},
        "clients": {"count": 2, "partition": "iid"},
        "method": {"name": "fedit"},
        "train": {"rounds": 1, "local_steps": 1, "batch_size": 2},
    }
    for key, value in keys.items():
        section, name = key.split(".")
        values[section][name] = value
    file = folder / "run.toml"
    file.write_text(tomli_w.dumps(values), encoding="utf-8", errors="surrogatepass")
    return file


def here(file: Path, out: Path) -> Outcome:
    """`fedloom run` in this process."""

    def late(number: int, frame: object) -> None:
        raise _Late

    said = io.StringIO()
    # Of its own: fedloom has a use for the alarm.
    before = signal.signal(signal.SIGUSR1, late)
    clock = threading.Timer(SECONDS, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    clock.start()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = call(["run", str(file), "--out", str(out)])
    except _Late:
        return Outcome(None, f"still at it after {SECONDS} s")
    except BaseException:
        return Outcome(1, said.getvalue() + traceback.format_exc())
    finally:
        clock.cancel()
        signal.signal(signal.SIGUSR1, before)
    return Outcome(code, said.getvalue())


def apart(file: Path, out: Path) -> Outcome:
    """`fedloom run` in a process of its own, as a user starts it."""
    command = [sys.executable, "-c", "from fedloom.cli.main import main; main()", "run", str(file), "--out", str(out)]
    try:
        found = subprocess.run(command, capture_output=True, timeout=2 * SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Outcome(None, f"still at it after {2 * SECONDS} s")
    return Outcome(found.returncode, (found.stdout + found.stderr).decode(errors="replace"))


def faults(case: Case, outcome: Outcome, folder: Path) -> Iterator[str]:
    """What is wrong with it, in words."""
    said = outcome.said
    error = "\n".join(said.partition("error: ")[1:])
    if outcome.code is None:
        yield "hangs"
    elif outcome.code not in (0, 2) or "Traceback" in said:
        yield f"crashes ({(said.strip().splitlines() or [''])[-1][:200]})"
    elif (outcome.code == 0) != (case.expected == "trains") and case.expected != "either":
        yield "is accepted" if outcome.code == 0 else f"is refused ({error[:300]})"
    elif outcome.code == 2 and said.count("error: ") != 1:
        yield f"says {said.count('error: ')} errors"
    elif outcome.code == 2 and case.says not in said:
        yield f"does not say {case.says!r} ({error[:300]})"
    if outcome.code == 2 and len(error.replace(str(folder), "")) > LONGEST:
        yield f"says {len(error.replace(str(folder), ''))} characters ({error[:600]})"
    if outcome.code != 0 and (folder / "out").exists():
        yield "leaves a run directory"
    if "[y/N]" in said:
        yield "asks a question"
    if "\x1b" in said:
        yield "sends an escape sequence to the terminal"
    if (folder / "TRAPPED").exists():
        yield "runs its code"


def tried(case: Case, folder: Path, run: Run) -> tuple[Outcome, list[str]]:
    """Make the bad thing in a new folder, have fedloom train with it, and look."""
    folder.mkdir(parents=True)
    outcome = run(settings(folder, case.make(folder)), folder / "out")
    found = list(faults(case, outcome, folder))
    if outcome.code == 0 and not (folder / "out" / "adapter" / "adapter_model.safetensors").is_file():
        found.append("trains without an adapter")
    return outcome, found


def written(path: Path, content: bytes | str | list[Any]) -> Path:
    """A file: bytes, text, or rows as JSON lines, of which texts are lines already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    return path
