"""The ledger of a run: every release of noise, one JSON object a line, written before what it paid for is used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fedloom.disk import disk_errors
from fedloom.errors import RunError
from fedloom.privacy.accountant import Release, epsilon


@dataclass(frozen=True)
class Entry:
    """One line: the same release again, as after a crash, is the same line, and costs nothing more."""

    round: int
    whose: str
    """Whose data it is about: a client id, or "" for every client."""
    release: Release
    digest: str
    """Of what was noised: it is another release if that differs."""


class Ledger:
    """The entries of a file, which is made with the first one."""

    def __init__(self, path: Path) -> None:
        """Raises RunError if the file is damaged: nobody then knows what was spent."""
        self._path = path
        self.entries: list[Entry] = []
        if path.is_file():
            lines = path.read_bytes().splitlines(keepends=True)
            for i, line in enumerate(lines):
                try:
                    values = json.loads(line)
                    self.entries.append(Entry(**values | {"release": Release(**values["release"])}))
                except (ValueError, TypeError, KeyError):
                    if i == len(lines) - 1 and not line.endswith(b"\n"):
                        # A crash within the write: what it would have paid for was not used.
                        os.truncate(path, path.stat().st_size - len(line))
                        continue
                    raise RunError(
                        f"{path} is damaged in line {i + 1}: nobody knows what was spent. Restore a copy, or begin anew"
                    ) from None

    def add(self, entry: Entry) -> None:
        """Write an entry, unless it is there."""
        if entry in self.entries:
            return
        with disk_errors(self._path), self._path.open("a") as file:
            file.write(json.dumps(asdict(entry), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def releases(self, whose: str) -> list[Release]:
        """All that is about one client, or about every client."""
        return [entry.release for entry in self.entries if entry.whose in ("", whose)]

    @property
    def known(self) -> list[str]:
        """Whose data the entries are about."""
        return sorted({entry.whose for entry in self.entries})

    def epsilon(self, delta: float, more: Iterable[Release] = ()) -> float:
        """The largest epsilon over those whom the ledger is about, were `more` released as well."""
        later = list(more)
        return max((epsilon([*self.releases(whose), *later], delta) for whose in self.known or [""]), default=0.0)
