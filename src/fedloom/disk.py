"""Files that are there whole or not at all: written beside, synced, then renamed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedloom.errors import RunError


def cache_dir() -> Path:
    """Where what was derived from models and data is kept between runs: `$FEDLOOM_CACHE`, or `~/.cache/fedloom`."""
    return Path(os.environ.get("FEDLOOM_CACHE") or Path.home() / ".cache" / "fedloom")


@contextmanager
def disk_errors(path: Path, then: str = "resume the run") -> Iterator[None]:
    """Turn an error of writing into one RunError that says what is lost (nothing), and what to do `then`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors says a full disk with a class of its own
        why = getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write {path}: {why}. Nothing is lost: free space or fix the permissions, then {then}"
        ) from error


def make_folder(path: Path, mode: int = 0o777) -> Path:
    """A folder that is there, made if it is not."""
    with disk_errors(path):
        path.mkdir(mode, parents=True, exist_ok=True)
    return path


def write(path: Path, data: bytes, listed: bool = True) -> None:
    """Write a file so that it is there whole or not at all.

    Where it is not `listed`, the caller syncs its folder, once for many files: until then a power cut may take it away.
    """
    with disk_errors(path):
        beside = path.with_name(path.name + ".new")
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        if listed:
            sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """As `write`, for a JSON value."""
    write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder of files so that it is there whole or not at all: `fill` writes into a new one, which takes its place.

    A crash between the two renames leaves the old one beside, under `.old`.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
        shutil.rmtree(beside, ignore_errors=True)
        _fill(beside, fill)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(beside, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_new_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """As `write_folder`, where `path` is new or empty and its neighbours are somebody's: nothing that was there is touched.

    One rename makes it appear. Only where the command is run, which a shell would lose with a rename, files are moved in one by
    one: a crash between them leaves the folder incomplete, and no longer empty.
    """
    with disk_errors(path, then="export again"):
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        try:
            _fill(beside, fill)
            if path == Path.cwd():
                _move(beside, path)
            else:
                os.replace(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync_folder(path.parent)


def _move(source: Path, dest: Path) -> None:
    """Move all that is in one folder into another, or leave the other as it was."""
    moved: list[Path] = []
    try:
        for file in sorted(source.iterdir()):
            moved.append(dest / file.name)
            os.replace(file, moved[-1])
        sync_folder(dest)
        source.rmdir()
    except BaseException:
        for file in moved:
            file.unlink(missing_ok=True)
        raise


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder, have it filled, and make what is in it durable."""
    folder.mkdir()
    fill(folder)
    for path in sorted(folder.rglob("*")):
        _sync(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
