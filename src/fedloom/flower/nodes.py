"""Which node each client lives on: said by the nodes themselves, or dealt out over nodes that serve any client."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from fedloom.client import Client

RETRY_S = 60.0
"""When a node that takes no part is asked again: its owner may mend it."""


class Directory(Protocol):
    """Clients and their nodes."""

    places: dict[str, int]
    """Client id -> node."""
    announced: dict[str, Client]
    """Client id -> client, of those that nodes announced."""
    refused: dict[int, tuple[float, str]]
    """Node -> when and why it took no part."""

    def newcomers(self, online: Collection[int]) -> list[int]:
        """Nodes to ask who they are."""
        ...

    def place(self, online: Collection[int], owing: Collection[int]) -> set[int]:
        """Bring `places` up to date; the nodes that may be asked. `owing` are those that have not answered yet."""
        ...


class Registry:
    """Nodes that say which clients they are. A name is one node's as long as that node is connected."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.announced: dict[str, Client] = {}
        self.refused: dict[int, tuple[float, str]] = {}
        self._known: set[int] = set()

    def newcomers(self, online: Collection[int]) -> list[int]:
        since = time.monotonic() - RETRY_S
        stubborn = {node for node, (when, _) in self.refused.items() if when > since}
        return sorted(set(online) - self._known - stubborn)

    def place(self, online: Collection[int], owing: Collection[int]) -> set[int]:
        return set(online) & self._known

    def register(
        self, node: int, clients: Sequence[Client], online: Collection[int], check: Callable[[Client], None]
    ) -> str | None:
        """Take in what a node announced; or why it takes no part. `check` raises for a client that the method cannot serve."""
        for client in clients:
            check(client)
            # A node that was started again may have a new id: a name is free again when the node that had it is gone.
            holder = self.places.get(client.id, node)
            if holder != node and holder in online:
                return f"it says that it is {client.id}, as node {holder} does: give one of them another --id"
        for client in clients:
            self.places[client.id] = node
            self.announced.setdefault(client.id, client)
        self._known.add(node)
        self.refused.pop(node, None)
        return None

    def refuse(self, node: int, why: str) -> None:
        """A node takes no part for a while."""
        self.refused[node] = time.monotonic(), why


class Roster:
    """Nodes of one machine, started by us: any of them serves any client."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.places: dict[str, int] = {}
        self.announced: dict[str, Client] = {}
        self.refused: dict[int, tuple[float, str]] = {}
        self._clients = clients

    def newcomers(self, online: Collection[int]) -> list[int]:
        return []

    def place(self, online: Collection[int], owing: Collection[int]) -> set[int]:
        # A SuperNode does one thing at a time: to a node that owes an answer, or died with it, nothing new is sent.
        free = sorted(set(online) - set(owing))
        if free:
            self.places = {client.id: free[i % len(free)] for i, client in enumerate(self._clients)}
        return set(free)
