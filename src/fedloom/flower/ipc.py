"""Messages of bytes between two processes of one machine: a Unix socket that only its user can open, with a key.

`multiprocessing.connection` frames and authenticates; only its byte messages are used, never its pickled objects. Whoever
connects is authenticated in a thread of its own and within a time limit: a caller with a wrong key, or one that says nothing,
costs the others nothing.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import stat
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from pathlib import Path
from types import TracebackType
from typing import Any

from fedloom.errors import RunError
from fedloom.flower.message import WireError, dumps, loads

log = logging.getLogger("fedloom.node")

LONGEST = 1 << 36
"""Bytes of one message: more is refused before memory is asked for."""
_LONGEST_PATH = 100  # of a Unix socket, as kernels have it
_HANDSHAKE_S = 10.0
_CALLERS = 32
"""How many may be in their handshake at once."""
_KEY_BYTES = 32


def _key_file(path: Path) -> Path:
    return path.with_name(path.name + ".key")


class Listener:
    """Listens at `path`, a socket of mode 0600 with its key beside it, and authenticates who connects.

    Raises RunError if somebody listens there already, or something is there that is no left-over socket of this user's.
    """

    def __init__(self, path: Path, handshake_s: float = _HANDSHAKE_S) -> None:
        if len(os.fsencode(path)) > _LONGEST_PATH:
            raise RunError(f"{path} is {len(str(path))} characters long, a socket's path has at most {_LONGEST_PATH}")
        self.path, self._handshake_s = path, handshake_s
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(path)
        self._key = secrets.token_bytes(_KEY_BYTES)
        self._socket = socket.socket(socket.AF_UNIX)
        _write_key(_key_file(path), self._key)
        before = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        finally:
            os.umask(before)
        self._socket.listen(_CALLERS)
        self._made = _identity(path)
        self._accepted: queue.Queue[Connection | None] = queue.Queue()
        self._room = threading.BoundedSemaphore(_CALLERS)
        threading.Thread(target=self._serve, daemon=True).start()

    def accept(self, patience_s: float | None = None) -> Connection | None:
        """The next caller that has the key; None if none came within the time, or this is closed."""
        try:
            return self._accepted.get(timeout=patience_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Listen no more; socket and key are removed, if they are still ours."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for callers
        self._socket.close()
        self._accepted.put(None)
        if _identity(self.path) == self._made:
            self.path.unlink(missing_ok=True)
            _key_file(self.path).unlink(missing_ok=True)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:  # closed
                return
            if not self._room.acquire(blocking=False):
                caller.close()
                continue
            threading.Thread(target=self._authenticate, args=(caller,), daemon=True).start()

    def _authenticate(self, caller: socket.socket) -> None:
        connection: Connection = Connection(caller.detach())
        try:
            _time_limit(connection, self._handshake_s)
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            _time_limit(connection, 0)
            self._accepted.put(connection)
        except (OSError, EOFError, AuthenticationError, ValueError) as error:
            log.warning("a caller was sent away: %s", type(error).__name__)
            connection.close()
        finally:
            self._room.release()


def connect(path: Path, patience_s: float = 10.0) -> Connection:
    """A connection to whoever listens at `path`, waited for so long. Raises RunError if nobody does."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return Client(str(path), family="AF_UNIX", authkey=_key_file(path).read_bytes())
        except (OSError, EOFError, AuthenticationError) as error:
            if time.monotonic() > until:
                raise RunError(f"nobody listens at {path} ({error}): is its process running?") from None
            time.sleep(0.1)


def send(connection: Connection, header: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
    """A header and parts, each a message of its own: for two processes of ours, so without a digest."""
    connection.send_bytes(dumps({"parts": len(parts), "header": header}))
    for part in parts:
        connection.send_bytes(part)


def receive(connection: Connection) -> tuple[dict[str, Any], list[bytes]]:
    """What `send` sent. Raises WireError for anything else, EOFError if the other side hung up."""
    said = loads(connection.recv_bytes(LONGEST))
    if not isinstance(said, dict) or type(said.get("parts")) is not int or not isinstance(said.get("header"), dict):
        raise WireError("has no header and number of parts")
    return said["header"], [connection.recv_bytes(LONGEST) for _ in range(said["parts"])]


def _time_limit(connection: Connection, seconds: float) -> None:
    """Of each read and write of a connection's socket; 0 for none."""
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, value)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove_stale(path: Path) -> None:
    """Remove a socket and key that a dead process of ours left. Raises RunError if something else is there."""
    key = _key_file(path)
    try:
        found = path.lstat()
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
            raise RunError(f"{path} is there already and is no socket of yours: name another path, or remove it")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"{path} cannot be taken ({error}): name another path") from None
            else:
                raise RunError(f"another process listens at {path}: end it, or name another path")
    try:
        found = key.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_size != _KEY_BYTES:
        raise RunError(f"{key} is there already and is no key of a socket: name another path, or remove it")
    key.unlink(missing_ok=True)


def _write_key(path: Path, key: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    with os.fdopen(handle, "wb") as file:
        file.write(key)
