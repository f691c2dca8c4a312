"""A transport to workers of this process: the coordinator and the node's side are real, Flower is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedloom.errors import RoundError
from fedloom.flower.message import unpack
from fedloom.flower.transport import Reply
from fedloom.flower.worker import Worker

Tamper = Callable[[dict[str, Any], bytes], bytes]
"""(the question's header, the node's answer) -> what arrives."""


class Direct:
    """Nodes are numbers from 0. `lost` says whether the connection breaks at a message; `tampers` changes a node's answers."""

    def __init__(self, workers: list[Worker], lost: Callable[[dict[str, Any]], bool] = lambda header: False) -> None:
        self.workers, self.lost = workers, lost
        self.silent: set[int] = set()
        self.gone: set[int] = set()
        self.headers: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        self.tampers: dict[int, Tamper] = {}
        self._ready: list[Reply] = []
        self._held: list[Reply] = []

    def nodes(self) -> list[int]:
        return [node for node in range(len(self.workers)) if node not in self.gone]

    def push(self, node: int, data: bytes, ttl_s: float) -> str | None:
        header, _ = unpack(data)
        self.headers.append(header)
        self.sizes.append(len(data))
        if self.lost(header):
            raise RoundError("the connection is lost")
        id = f"{node}-{len(self.headers)}"
        answer = self.workers[node].answer(data)
        reply = Reply(id, self.tampers.get(node, lambda header, answer: answer)(header, answer))
        (self._held if node in self.silent else self._ready).append(reply)
        return id

    def catch_up(self) -> None:
        """Nobody is silent any more: what they held back comes now."""
        self.silent = set()
        self._ready += self._held
        self._held = []

    def pull(self, ids: list[str]) -> list[Reply]:
        got = [reply for reply in self._ready if reply.id in ids]
        self._ready = [reply for reply in self._ready if reply.id not in ids]
        return got

    def close(self) -> None:
        pass
