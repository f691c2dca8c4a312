"""A socket that only its user and its key open, and that no caller can keep from the others or make its process end."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest

from fedloom.errors import RunError
from fedloom.flower import ipc
from fedloom.flower.message import WireError, unpack
from fedloom.flower.worker import Worker

from .toys import ToyNode, TwoSteps


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Short: kernels allow no long socket paths."""
    here = Path.cwd()
    os.chdir(tmp_path)
    yield Path("w.socket")
    os.chdir(here)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def accepted(listener: ipc.Listener) -> Connection:
    caller = listener.accept(10.0)
    assert caller is not None
    return caller


def answered(path: Path) -> bool:
    with ipc.connect(path, 5.0) as connection:
        connection.send_bytes(b"junk")
        assert connection.poll(5.0)
        return "refused" in unpack(connection.recv_bytes())[0]


@pytest.fixture
def worker(path: Path, tmp_path: Path) -> Iterator[threading.Thread]:
    """A worker that serves at `path`."""
    thread = threading.Thread(target=Worker(ToyNode(TwoSteps(), [], tmp_path)).serve, args=(path,), daemon=True)
    thread.start()
    assert answered(path)
    yield thread
    assert thread.is_alive() and answered(path)


def test_socket_and_key_are_their_users_alone_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        with ipc.Listener(path):
            assert mode(path) == 0o600 and mode(Path("w.socket.key")) == 0o600
            assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert not path.exists() and not Path("w.socket.key").exists()


def test_nothing_is_deleted_that_is_no_old_socket(path: Path) -> None:
    path.write_text("text,label\n")
    with pytest.raises(RunError, match="no socket of yours"):
        ipc.Listener(path)
    assert path.read_text() == "text,label\n"
    path.unlink()
    Path("elsewhere").write_text("precious")
    Path("w.socket.key").symlink_to("elsewhere")
    with pytest.raises(RunError, match="no key of a socket"):
        ipc.Listener(path)
    Path("w.socket.key").unlink()
    Path("w.socket.key").write_text("my own notes")
    with pytest.raises(RunError, match="no key of a socket"):
        ipc.Listener(path)
    path.symlink_to("elsewhere")
    Path("w.socket.key").unlink()
    with pytest.raises(RunError, match="no socket of yours"):
        ipc.Listener(path)
    assert Path("elsewhere").read_text() == "precious"


def test_a_socket_that_a_dead_process_left_is_taken_over(path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    Path("w.socket.key").write_bytes(bytes(32))
    Path("w.socket.key").chmod(0o666)
    with ipc.Listener(path) as listener:
        assert mode(Path("w.socket.key")) == 0o600 and Path("w.socket.key").read_bytes() != bytes(32)
        ipc.connect(path).close()
        with accepted(listener):
            pass


def test_a_second_process_at_the_same_socket_is_refused(path: Path, worker: threading.Thread) -> None:
    key = Path("w.socket.key").read_bytes()
    with pytest.raises(RunError, match="another process listens"):
        ipc.Listener(path)
    assert Path("w.socket.key").read_bytes() == key


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at most 100"):
        ipc.Listener(tmp_path / ("x" * 120))


def test_a_caller_with_a_wrong_key_is_sent_away(path: Path, worker: threading.Thread) -> None:
    for _ in range(3):
        with pytest.raises((AuthenticationError, OSError, EOFError)):
            Client(str(path), family="AF_UNIX", authkey=b"wrong" * 8)
    assert answered(path)


def test_silent_callers_keep_nobody_waiting(path: Path, worker: threading.Thread) -> None:
    with ExitStack() as open_:
        for _ in range(5):
            open_.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        start = time.monotonic()
        assert answered(path) and time.monotonic() - start < 3


def test_a_silent_caller_is_hung_up_on(path: Path) -> None:
    with ipc.Listener(path, handshake_s=0.3) as listener, socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
        caller.settimeout(5.0)
        while caller.recv(1 << 12):  # the challenge, and then the end
            pass
        ipc.connect(path).close()
        with accepted(listener):
            pass


def test_a_flood_of_silent_callers_passes(path: Path) -> None:
    with ipc.Listener(path, handshake_s=0.5) as listener, ExitStack() as open_:
        for _ in range(60):
            caller = open_.enter_context(socket.socket(socket.AF_UNIX))
            caller.settimeout(1.0)
            caller.connect_ex(str(path))  # it may be turned away at once
        ipc.connect(path, 10.0).close()
        with accepted(listener):
            pass


def test_a_length_that_no_message_has_ends_the_caller_alone(path: Path, worker: threading.Thread) -> None:
    for length in (1 << 40, 1 << 62, 1 << 63):
        with ipc.connect(path) as connection:
            os.write(connection.fileno(), struct.pack("!iQ", -1, length))
            with pytest.raises((EOFError, OSError)):
                connection.recv_bytes()
    with ipc.connect(path) as connection:
        connection.send_bytes(b"x")
    assert answered(path)


def test_frames_pass_whole_and_junk_is_refused(path: Path) -> None:
    with ipc.Listener(path) as listener, ipc.connect(path) as ours, accepted(listener) as theirs:
        ipc.send(ours, {"do": "push", "node": 2**64 - 1}, [b"", b"abc"])
        assert ipc.receive(theirs) == ({"do": "push", "node": 2**64 - 1}, [b"", b"abc"])
        for junk in (b"[]", b"{}", b'{"parts": true, "header": {}}', b"\xff"):
            ours.send_bytes(junk)
            with pytest.raises(WireError):
                ipc.receive(theirs)
        ours.close()
        with pytest.raises(EOFError):
            ipc.receive(theirs)


def test_nobody_listening_is_told(path: Path) -> None:
    with pytest.raises(RunError, match="nobody listens at w"):
        ipc.connect(path, 0.2)


def test_closing_wakes_who_waits(path: Path) -> None:
    listener = ipc.Listener(path)
    threading.Timer(0.2, listener.close).start()
    assert listener.accept(10.0) is None
