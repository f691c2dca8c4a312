"""The coordinator's view of the machines: who is there, send one of them bytes, collect answers. Nothing of Flower in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from fedloom.errors import RoundError
from fedloom.flower import ipc
from fedloom.flower.message import WireError, printable

_LOOK_S = 0.5


@dataclass(frozen=True)
class Reply:
    """What came back for a message: bytes, or why there are none."""

    id: str
    data: bytes | None
    fault: str | None = None


class Transport(Protocol):
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


class GridTransport:
    """A Transport over the grid that Flower's server app lends through a local socket.

    `alive` says whether what is behind it runs still, where somebody knows: then nobody waits for the dead.
    """

    def __init__(
        self, connection: Connection, patience_s: float = 300.0, alive: Callable[[], bool] = lambda: True
    ) -> None:
        self._connection, self._patience_s, self._alive = connection, patience_s, alive

    @staticmethod
    def accept(
        listener: ipc.Listener, patience_s: float = 120.0, alive: Callable[[], bool] = lambda: True
    ) -> GridTransport:
        """Wait for the server app to connect. Raises RoundError if it does not."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until and alive():
            if (connection := listener.accept(_LOOK_S)) is not None:
                return GridTransport(connection, alive=alive)
        raise RoundError(
            f"Flower did not start the server app within {patience_s:.0f} s: look at the SuperLink's log, then resume"
        )

    def nodes(self) -> list[int]:
        return [int(x) for x in self._ask({"do": "nodes"})[0]["nodes"]]

    def push(self, node: int, data: bytes, ttl_s: float) -> str | None:
        header, _ = self._ask({"do": "push", "node": node, "ttl_s": ttl_s}, [data])
        return None if header["id"] is None else str(header["id"])

    def pull(self, ids: list[str]) -> list[Reply]:
        header, parts = self._ask({"do": "pull", "ids": ids})
        data = iter(parts)
        return [Reply(id, None if fault else next(data), fault) for id, fault in header["replies"]]

    def close(self) -> None:
        self._connection.close()

    def _ask(self, header: dict[str, Any], parts: Sequence[bytes] = ()) -> tuple[dict[str, Any], list[bytes]]:
        try:
            ipc.send(self._connection, header, parts)
            self._wait()
            answer, found = ipc.receive(self._connection)
        except (EOFError, OSError, WireError) as error:
            raise _lost(type(error).__name__) from None
        if "error" in answer:
            raise _lost(printable(answer["error"], 500))
        return answer, found

    def _wait(self) -> None:
        until = time.monotonic() + self._patience_s
        while not self._connection.poll(_LOOK_S):
            if not self._alive():
                raise _lost("its process has ended")
            if time.monotonic() > until:
                raise _lost(f"no answer within {self._patience_s:.0f} s")


def _lost(why: str) -> RoundError:
    return RoundError(
        f"the connection to the SuperLink is lost ({why}). The last checkpoint stands: start it again and resume"
    )
