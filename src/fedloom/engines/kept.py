"""What a node's clients keep, as it stood before any of the last rounds: a server that was killed may ask for one again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fedloom.checkpoint import Kept

_NAME = re.compile(r"(.+)-(\d{6,})\.safetensors")


def before(folder: Path, t: int) -> Kept:
    """What was kept last in a round before t. Changes nothing on disk."""
    newest: dict[str, tuple[int, str]] = {}
    for path in folder.glob("*.safetensors"):
        if (match := _NAME.fullmatch(path.name)) and int(match[2]) < t:
            client, at = match[1], int(match[2])
            newest[client] = max(newest.get(client, (-1, "")), (at, path.name))
    return Kept(folder, {client: name for client, (_, name) in newest.items()})


def forget(folder: Path, kept: Kept, clients: Iterable[str]) -> None:
    """Remove what `kept` does not name of these clients: rounds that a killed server does not count, and bygone ones."""
    named, ours = set(kept.files.values()), set(clients)
    for path in folder.glob("*.safetensors"):
        if path.name not in named and (match := _NAME.fullmatch(path.name)) and match[1] in ours:
            path.unlink(missing_ok=True)
