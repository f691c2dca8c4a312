"""The fedloom server's view of the machines: who is there, send one of them bytes, collect answers. Nothing of Flower in it."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from typing import Any, Protocol

from fedloom.engines.envelope import pack, unpack
from fedloom.errors import RoundError


@dataclass(frozen=True)
class Reply:
    """What came back for a message: bytes, or why there are none."""

    id: str
    data: bytes | None
    fault: str | None = None


class Link(Protocol):
    """A narrow port, so that another federation runtime can be put behind it."""

    def nodes(self) -> list[int]:
        """Ids of the nodes that are connected."""
        ...

    def push(self, node: int, data: bytes, ttl_s: float) -> str | None:
        """Send; the id that the answer will name, or None if it was not accepted."""
        ...

    def pull(self, ids: list[str]) -> list[Reply]:
        """The answers that are there, each of them once; never waits."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class GridLink:
    """A Link to the grid that Flower's server app lends through a local socket."""

    def __init__(self, connection: Connection, patience_s: float = 300.0) -> None:
        self._connection = connection
        self._patience_s = patience_s

    @staticmethod
    def accept(listener: Listener, patience_s: float = 120.0) -> GridLink:
        """Wait for the server app to connect. Raises RoundError if it does not."""
        found: list[Connection] = []

        def wait() -> None:
            with contextlib.suppress(OSError, EOFError):
                found.append(listener.accept())

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(patience_s)
        if not found:
            raise RoundError(
                f"Flower did not start the server app within {patience_s:.0f} s: look at the SuperLink's log, then resume"
            )
        return GridLink(found[0])

    def nodes(self) -> list[int]:
        return [int(x) for x in self._ask({"do": "nodes"})[0]["nodes"]]

    def push(self, node: int, data: bytes, ttl_s: float) -> str | None:
        header, _ = self._ask({"do": "push", "node": node, "ttl_s": ttl_s}, [data])
        return None if header["id"] is None else str(header["id"])

    def pull(self, ids: list[str]) -> list[Reply]:
        header, parts = self._ask({"do": "pull", "ids": ids})
        data = iter(parts)
        return [Reply(id, None if fault else bytes(next(data)), fault) for id, fault in header["replies"]]

    def close(self) -> None:
        self._connection.close()

    def _ask(self, header: dict[str, Any], parts: list[bytes] | None = None) -> tuple[dict[str, Any], list[memoryview]]:
        lost = "the connection to the SuperLink is lost ({}). The last checkpoint stands: start it again and resume"
        try:
            self._connection.send_bytes(pack(header, parts or []))
            if not self._connection.poll(self._patience_s):
                raise RoundError(lost.format(f"no answer within {self._patience_s:.0f} s"))
            answer, found = unpack(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise RoundError(lost.format(type(error).__name__)) from None
        if "error" in answer:
            raise RoundError(lost.format(answer["error"]))
        return answer, found
