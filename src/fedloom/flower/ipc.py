"""Messages of bytes between two processes of one machine: a Unix socket that only its user can open, with a key.

`multiprocessing.connection` frames and authenticates; only its byte messages are used, never its pickled objects.
"""

from __future__ import annotations

import os
import secrets
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from fedloom.errors import RunError

_LONGEST = 100  # of a Unix socket's path, as kernels have it


def _key_file(path: Path) -> Path:
    return path.with_name(path.name + ".key")


def listen(path: Path) -> Listener:
    """A listener at `path` in a folder of the user's own. Raises RunError if the path is too long or somebody listens."""
    if len(str(path)) > _LONGEST:
        raise RunError(f"{path} is {len(str(path))} characters long, a socket's path has at most {_LONGEST}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    key = secrets.token_bytes(32)
    handle = os.open(_key_file(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(key)
    return Listener(str(path), family="AF_UNIX", backlog=16, authkey=key)


def connect(path: Path, patience_s: float = 10.0) -> Connection:
    """A connection to whoever listens at `path`, waited for so long. Raises RunError if nobody does."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return Client(str(path), family="AF_UNIX", authkey=_key_file(path).read_bytes())
        except (OSError, EOFError) as error:
            if time.monotonic() > until:
                raise RunError(f"nobody listens at {path} ({error}): is its process running?") from None
            time.sleep(0.1)
