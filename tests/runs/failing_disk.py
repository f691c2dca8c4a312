"""A disk that fails once, or dies: every write of Python below one folder is counted, and one of them goes wrong.

A disk that died keeps what was synced. What was not is lost in one of the ways that POSIX allows: a file is cut to what it had
at its last fsync, or is not there, or renames and removals in a folder that was not synced since have not happened.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

Fault = Literal["ENOSPC", "EIO", "torn", "cut", "removed", "undone"]
ERRORS: tuple[Fault, ...] = ("ENOSPC", "EIO")
"""The call fails, and the process goes on."""
CRASHES: tuple[Fault, ...] = ("torn", "cut", "removed", "undone")
"""The machine stops at the call: in the middle of a write with all that was written on disk, or with what was not synced
cut, removed, or with its renames undone."""


class Crash(BaseException):
    """The machine stopped."""


@dataclass(frozen=True)
class _Change:
    """A rename or removal that is not durable yet."""

    folder: int
    """Inode of the folder that must be synced."""
    undo: Callable[[], None]


class Disk:
    """Counts the writing calls below `root`; the one numbered `at` (from 1) meets the fault."""

    def __init__(self, root: Path, at: int = 0, fault: Fault = "EIO") -> None:
        self.root, self.at, self.fault = root.resolve(), at, fault
        self.calls: list[str] = []
        """What was called, with the file's name."""
        self._dead = False
        self._durable: dict[int, int] = {}
        """Inode of a file with data that is not synced -> bytes of it that are."""
        self._changes: list[_Change] = []
        self._real: dict[str, Any] = {name: getattr(os, name) for name in _CALLS}
        self._open = io.open

    # the calls

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Python writes through this disk. Raises Crash where it died, its losses done."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, getattr(self, name))
            patch.setattr(io, "open", self.open)
            patch.setattr(builtins, "open", self.open)
            try:
                yield
            finally:
                patch.undo()
                if self._dead:
                    self._lose()

    def call(self, kind: str, path: Path) -> None:
        """Before a writing call: count it, and fail if it is its turn."""
        if self._dead:
            raise Crash
        self.calls.append(f"{kind} {path.name}")
        if len(self.calls) != self.at:
            return
        if self.fault in ERRORS:
            code = getattr(errno, self.fault)
            raise OSError(code, os.strerror(code), str(path))
        self._dead = True
        raise Crash

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **more: Any) -> Any:
        path = self._below(file) if isinstance(file, str | os.PathLike) else None
        if path is None or "r" in mode:
            return self._open(file, mode, buffering, *args, **more)
        self.call("open", path)
        raw = _Raw(self, path, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        names = dict(zip(("encoding", "errors", "newline"), args, strict=False)) | more
        return io.TextIOWrapper(buffered, **names)

    def fsync(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if self._below(path):
            self.call("fsync", path)
            inode = os.fstat(handle).st_ino
            self._durable.pop(inode, None)
            self._changes = [change for change in self._changes if change.folder != inode]
        # Nothing is synced in truth: the machine under the test does not stop.

    def replace(self, source: Any, target: Any, **more: Any) -> None:
        self._renamed("replace", source, target)

    def rename(self, source: Any, target: Any, **more: Any) -> None:
        self._renamed("rename", source, target)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if (where := self._below(path, dir_fd)) is not None:
            self.call("mkdir", where)
        self._real["mkdir"](path, mode, dir_fd=dir_fd)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        where = self._below(path, dir_fd)
        if where is None or not where.is_file():
            return self._real["unlink"](path, dir_fd=dir_fd)  # type: ignore[no-any-return]
        self.call("unlink", where)
        data = where.read_bytes()
        self._changed(where, lambda: _restore(where, data))
        return self._real["unlink"](path, dir_fd=dir_fd)  # type: ignore[no-any-return]

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        if (where := self._below(path, dir_fd)) is not None:
            self.call("rmdir", where)
            self._changed(where, lambda: where.mkdir(exist_ok=True))
        self._real["rmdir"](path, dir_fd=dir_fd)

    # what becomes of them

    def wrote(self, inode: int, durable: int) -> None:
        """A file has data that is not synced."""
        self._durable.setdefault(inode, durable)

    def _renamed(self, kind: str, source: Any, target: Any) -> None:
        old, new = self._below(source), self._below(target)
        if old is not None and new is not None:
            self.call(kind, new)
            before, empty = new.read_bytes() if new.is_file() else None, new.is_dir()

            def undo() -> None:
                if new.exists() and not old.exists():
                    self._real["replace"](new, old)
                    if before is not None:
                        _restore(new, before)
                    elif empty:
                        new.mkdir()

            self._changed(new, undo)
        self._real[kind](source, target)

    def _changed(self, path: Path, undo: Callable[[], None]) -> None:
        self._changes.append(_Change(os.stat(path.parent).st_ino, undo))

    def _below(self, path: Any, dir_fd: int | None = None) -> Path | None:
        """The absolute path, if it is below the root, or is the root."""
        folder = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) if dir_fd is not None else Path.cwd()
        where = folder / os.fsdecode(path)
        return where if where == self.root or self.root in where.parents else None

    def _lose(self) -> None:
        if self.fault == "torn":
            return
        for path in [path for path in self.root.rglob("*") if path.is_file()]:
            durable = self._durable.get(path.stat().st_ino)
            if durable == 0 and self.fault == "removed":
                path.unlink()
            elif durable is not None:
                os.truncate(path, durable)
        if self.fault == "undone":
            for change in reversed(self._changes):
                change.undo()


class _Raw(io.FileIO):
    """A file whose every write is a call."""

    def __init__(self, disk: Disk, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._path = disk, path
        status = os.fstat(self.fileno())
        disk.wrote(status.st_ino, status.st_size)

    def write(self, data: Any) -> int:
        status = os.fstat(self.fileno())
        self._disk.wrote(status.st_ino, status.st_size)
        try:
            self._disk.call("write", self._path)
        except (Crash, OSError):
            if len(self._disk.calls) == self._disk.at:  # half of it is there
                super().write(bytes(data)[: len(data) // 2])
            raise
        return super().write(data)


def _restore(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


_CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
