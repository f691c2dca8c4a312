"""Somebody between a SuperNode's app and its worker, who may change, delay or repeat what passes. Both ends are real."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from fedloom.flower import ipc

Rule = Callable[[bytes, Callable[[bytes], bytes]], bytes]
"""(message, the worker) -> the answer that the SuperNode's app gets."""


def honest(message: bytes, worker: Callable[[bytes], bytes]) -> bytes:
    return worker(message)


class Middleman:
    """Listens at `path` for the worker at `behind`. `rules` are used up one a message; honest after the last."""

    def __init__(self, path: Path, behind: Path) -> None:
        self.behind = behind
        self.rules: list[Rule] = []
        self.seen: list[tuple[bytes, bytes]] = []
        self._listener = ipc.Listener(path)
        threading.Thread(target=self._serve, daemon=True).start()

    def ask(self, message: bytes) -> bytes:
        with ipc.connect(self.behind, 60.0) as connection:
            connection.send_bytes(message)
            return connection.recv_bytes()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while (connection := self._listener.accept()) is not None:
            with connection:
                message = connection.recv_bytes()
                rule = self.rules.pop(0) if self.rules else honest
                answer = rule(message, self.ask)
                self.seen.append((message, answer))
                with contextlib.suppress(OSError):  # who asked may have gone, as after a late answer
                    connection.send_bytes(answer)
