"""A process that loads from a hub as asked: where the hub is, its clients read once, when they are imported.

One JSON object a line comes in, {"call": name, "args": [...]}, and one goes out: the result, or the error's class and message.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any

from fedloom.cli.main import call
from fedloom.data import hub, load
from fedloom.errors import FedloomError
from fedloom.models.huggingface import load_base


def rows(source: str, split: str | None = None) -> dict[str, list[Any]]:
    return {name: list(values) for name, values in load.load(source, split)[:].items()}


def model(name: str, kind: Any = "classification") -> dict[str, Any]:
    base = load_base(name, kind=kind, num_labels=2)
    return {"name": base.path_or_id, "revision": base.revision, "sha256": base.sha256, "family": base.family}


def command(*words: str) -> dict[str, Any]:
    """`fedloom WORDS`: its exit code and everything that it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = call(list(words))
    return {"code": code, "said": said.getvalue()}


def ask_again() -> None:
    """Forget whether the hub answered."""
    hub._answers.cache_clear()


CALLS = {"rows": rows, "model": model, "command": command, "ask_again": ask_again}


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        found: dict[str, Any] = {}
        try:
            found["result"] = CALLS[asked["call"]](*asked["args"])
        except FedloomError as error:
            found |= {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(found), file=answers, flush=True)
    os._exit(0)  # threads of the libraries take seconds to end


if __name__ == "__main__":
    main()
