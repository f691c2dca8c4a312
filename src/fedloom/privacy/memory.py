"""What a client must not forget between the messages of a secure sum, though its process ends: on disk before it answers."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from fedloom.disk import write_json
from fedloom.errors import RoundError, RunError


class Memory:
    """Attempts that were masked for, the own share of each, and the set that was opened in each round."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` is a JSON file; without one, all is kept in this process. Raises RunError if the file is damaged."""
        self._path = path
        self._shares: dict[str, str] = {}
        self._opened: dict[str, list[str]] = {}
        if path is not None and path.is_file():
            try:
                found = json.loads(path.read_text())
                self._shares, self._opened = dict(found["shares"]), dict(found["opened"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{path} is damaged ({type(error).__name__}): without it this client cannot tell which sums it opened; "
                    "start the run again"
                ) from None

    def begin(self, client: str, run: str, t: int, part: int, attempt: bytes) -> None:
        """Raise RoundError if this client has masked for this attempt before."""
        key = _key(client, run, t, part, attempt)
        if key in self._shares:
            raise RoundError(f"round {t}: client {client!r} has masked for this attempt before: it does so once")
        if (client_round := _key(client, run, t, part)) in self._opened:
            raise RoundError(
                f"round {t}: client {client!r} has opened a sum of {', '.join(self._opened[client_round][1:])} in this round: "
                "it masks for no second one"
            )
        self._shares[key] = ""
        self._write()

    def keep(self, client: str, run: str, t: int, part: int, attempt: bytes, share: bytes) -> None:
        """Keep the own share of an attempt. Those of the client's earlier rounds go."""
        old = [k for k, v in self._shares.items() if v and json.loads(k)[:2] == [client, run] and json.loads(k)[2] < t]
        for key in old:
            self._shares[key] = ""
        self._shares[_key(client, run, t, part, attempt)] = share.hex()
        self._write()

    def kept(self, client: str, run: str, t: int, part: int, attempt: bytes) -> bytes:
        """The own share of an attempt. Raises RoundError if this client did not mask for it."""
        share = self._shares.get(_key(client, run, t, part, attempt))
        if not share:
            raise RoundError(f"round {t}: client {client!r} is asked to open a sum that it did not mask for")
        return bytes.fromhex(share)

    def answer(self, client: str, run: str, t: int, part: int, attempt: bytes, present: Collection[str]) -> None:
        """Note that a set is opened; the same set again is no harm. Raises RoundError for a second one in a round."""
        key, asked = _key(client, run, t, part), [attempt.hex(), *sorted(present)]
        if self._opened.setdefault(key, asked) != asked:
            raise RoundError(
                f"round {t}: client {client!r} has opened the sum of {', '.join(self._opened[key][1:])} and opens no "
                "second one: the difference of two sums is what one client sent"
            )
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, {"shares": self._shares, "opened": self._opened})


def _key(client: str, run: str, t: int, part: int, attempt: bytes = b"") -> str:
    return json.dumps([client, run, t, part, attempt.hex()])
