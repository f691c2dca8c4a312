"""The journal of a run's clients: which file has what each of them keeps, a line for each change.

It is only appended to, so that a round costs what changed in it, not what all clients keep. A checkpoint names a journal with
its length and hash: what is behind that length, of a crash or of a round that did not count, is not there for it, and the
journal of an earlier round is the beginning of a later one's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.disk import disk_errors, write
from fedloom.errors import RunError

Line = tuple[str, str, str]
"""(client id, name of its file, sha256 of that file; "" where it is not known)."""

SPARE = 1000
"""Lines beyond twice those that count, at which a journal is begun anew."""


@dataclass
class Journal:
    """A journal as far as it counts."""

    name: str | None = None
    """Of its file; None before anything is kept."""
    size: int = 0
    """Bytes that count."""
    lines: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    """sha256 of those bytes, going on."""

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"journal": self.name, "bytes": self.size, "sha256": self.digest.hexdigest()}

    def add(
        self, folder: Path, t: int, changed: Iterable[Line], live: int, all_lines: Callable[[], Iterable[Line]]
    ) -> None:
        """Write what changed before the checkpoint of round t names it; `all_lines` gives those that count, `live` of them."""
        new = [_line(x) for x in changed]
        if not new:
            return
        if self.name is None or self.lines + len(new) > 2 * live + SPARE:
            new = [_line(x) for x in all_lines()]
            name = f"kept-{t:06d}.jsonl"
            write(folder / name, b"".join(new))
            self.name, self.size, self.lines, self.digest = name, 0, 0, hashlib.sha256()
        else:
            self._append(folder / self.name, b"".join(new))
        for line in new:
            self.digest.update(line)
        self.size += sum(map(len, new))
        self.lines += len(new)

    def _append(self, path: Path, data: bytes) -> None:
        with disk_errors(path), path.open("r+b") as file:
            file.truncate(self.size)
            file.seek(self.size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(folder: Path, meta: dict[str, Any], instead: str) -> tuple[Journal, dict[str, str], dict[str, str]]:
        """(journal, client id -> file, file -> sha256) that a checkpoint names. Raises RunError if it is not there whole."""
        journal = Journal(meta["journal"], meta["bytes"])
        files: dict[str, str] = {}
        hashes: dict[str, str] = {}
        if journal.name is None:
            return journal, files, hashes
        path = folder / journal.name
        try:
            data = path.read_bytes()[: journal.size]
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror}): {instead}") from error
        journal.digest.update(data)
        if journal.digest.hexdigest() != meta["sha256"]:
            raise RunError(f"{path} is not what the checkpoint names (its sha256 differs): {instead}")
        for line in data.splitlines():
            client, name, digest = json.loads(line)
            files[client] = name
            hashes[name] = digest
            journal.lines += 1
        return journal, files, {name: hashes[name] for name in files.values() if hashes[name]}


def _line(line: Line) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"
