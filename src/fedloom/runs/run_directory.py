"""The run directory: what is in it, who holds it, and whether it is still what it was.

run.toml       the resolved configuration        manifest.json   versions, seed, hashes
rounds.jsonl   one JSON object a round           adapter/        PEFT
partition.json client -> rows                    clients/ID/adapter/
checkpoint/    the newest complete one
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom import __version__
from fedloom.disk import disk_errors, make_folder, write, write_json
from fedloom.errors import RunError
from fedloom.runs.config import RunConfig, parse, read_toml

FORMAT = 1


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "run.toml"
        self.manifest_file = path / "manifest.json"
        self.rounds_file = path / "rounds.jsonl"
        self.partition_file = path / "partition.json"
        self.checkpoint = path / "checkpoint"
        self.adapter = path / "adapter"
        self._lock: int | None = None

    @staticmethod
    def require_free(path: Path) -> None:
        """Raise RunError if there is something at `path` already. Writes nothing."""
        # A run.toml.new is what a kill within the very first write leaves: there is nothing in it to lose.
        if path.exists() and (not path.is_dir() or any(file.name != "run.toml.new" for file in path.iterdir())):
            raise RunError(
                f"{path} exists and is not empty, expected a new or empty directory: choose another --out"
                + (f", or go on with it: fedloom resume {path}" if (path / "run.toml").is_file() else "")
            )

    @staticmethod
    def create(path: Path, config: RunConfig) -> RunDirectory:
        """A new run directory that holds the configuration. Raises RunError if there is something at `path` already."""
        RunDirectory.require_free(path)
        run = RunDirectory(path)
        make_folder(path)
        write(run.config_file, config.to_toml().encode())
        return run

    @staticmethod
    def open(path: Path) -> RunDirectory:
        """An existing run directory. Raises RunError if it is none, or another version of fedloom's."""
        run = RunDirectory(path)
        if not run.config_file.is_file():
            raise RunError(f"{path} is no run directory (no run.toml in it), expected one that `fedloom run` made")
        if run.manifest_file.is_file():
            got = run.manifest().get("format")
            if got != FORMAT:
                raise RunError(
                    f"{path} has run format {got!r}, expected {FORMAT} (fedloom {__version__}): use the version that made it"
                )
        return run

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training in this directory; the lock ends with the process, however it ends."""
        with disk_errors(self.path):
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process is training in {self.path}: wait for it, or stop it") from None
            self._lock = os.fstat(handle).st_ino
            yield
        finally:
            os.close(handle)

    def check_in_place(self) -> None:
        """Raise RunError if the directory that is held was moved away: what is written now would be elsewhere."""
        try:
            there = (self.path / ".lock").stat().st_ino == self._lock
        except OSError:
            there = False
        if not there:
            raise RunError(
                f"{self.path} was moved or removed while the run trained there: nothing more is written; go on with "
                "`fedloom resume` where it is now"
            )

    def config(self) -> RunConfig:
        """The resolved configuration."""
        return parse(read_toml(self.config_file), str(self.config_file))

    def manifest(self) -> dict[str, Any]:
        """The manifest. Raises RunError if it is missing or damaged."""
        try:
            value = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f"{self.manifest_file} cannot be read ({type(error).__name__}): the run did not start, or the file is damaged; "
                f"without it nobody knows what the run was made from: restore it from a copy, or start the run again"
            ) from None
        if not isinstance(value, dict) or not isinstance(value.get("hashes"), dict):
            raise RunError(f"{self.manifest_file} is damaged: restore it from a copy, or start the run again")
        return value

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, whole or not at all."""
        write_json(self.manifest_file, {"fedloom": __version__, "format": FORMAT} | manifest)

    def rounds(self) -> list[dict[str, Any]]:
        """The records of `rounds.jsonl`; a line that is damaged, as by a crash, is left out, and no other."""
        records = []
        if self.rounds_file.is_file():
            for line in self.rounds_file.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and type(record.get("round")) is int:
                    records.append(record)
        return records

    def keep_rounds(self, last: int) -> list[dict[str, Any]]:
        """Drop the records after round `last` (they belong to no checkpoint) and return the others."""
        records = [record for record in self.rounds() if record["round"] <= last]
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        write(self.rounds_file, text.encode())
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add one line to `rounds.jsonl`."""
        with disk_errors(self.rounds_file), self.rounds_file.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def digest_files(folder: Path) -> str:
    """sha256 over the names and contents of all files below a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of one file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
