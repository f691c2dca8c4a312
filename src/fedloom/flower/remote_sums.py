"""Secure sums at the server: the clients' keys, and each sum on disk from before it is opened until its round is done.

Training is deterministic, so that two sums of one round over different clients would differ by what one of them sent. A sum is
therefore written down before any client is asked to open it, and whoever goes on with the run opens that one or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedloom.checkpoint import decode, encode
from fedloom.client import Client
from fedloom.disk import disk_errors, make_folder, write
from fedloom.errors import RunError
from fedloom.flower import sum_wire
from fedloom.flower.message import WireError, pack, unpack
from fedloom.flower.sum_wire import Keys
from fedloom.privacy.exchange import Aggregator
from fedloom.privacy.keys import Roster, check_signature
from fedloom.privacy.sum_plan import Rule

_FILE = re.compile(r"sum-(\d{6,})-(\d+)\.bin")


@dataclass(frozen=True)
class Begun:
    """A sum that clients were asked to open, or will be."""

    attempt: bytes
    keys: Keys
    failures: list[tuple[str, str]]
    """(client id, why it is not in the sum)."""
    waiting: list[str]
    """Clients whose visits go on after it."""
    bound: bytes
    """Of its terms."""
    masked: bytes
    """What the clients sent, added up: for `restore`."""

    def restore(self, server: Aggregator, path: Path) -> None:
        """Bring an aggregator to where it was. Raises RunError if its terms are others now."""
        if server.terms.bound != self.bound:
            raise RunError(
                f"{path} holds a secure sum of another method, model or run file: put back what the run began with"
            )
        state = decode(self.masked)
        server.total = state["sum"]["y"]
        around = server.terms.graph()[0]
        for client, boxes in state["boxes"].items():
            group = sorted(around[client])
            server.boxes[client] = dict(zip(group, sum_wire.split(boxes), strict=True))
            server.hashes[client] = dict(zip(["", *group], sum_wire.split(state["hashes"][client]), strict=True))


class RemoteSums:
    """A run's secure sums, as its server knows them."""

    def __init__(self, rule: Rule, run: str, folder: Path, roster: Roster | None = None) -> None:
        """`folder` is of this run; without a `roster` the keys of clients are believed."""
        self.rule, self.run, self.folder, self.roster = rule, run, folder, roster
        self.keys: dict[str, tuple[bytes, bytes]] = {}
        """Client id -> (public key, signature), of those that announced one."""

    def announce(self, clients: Iterable[Client], said: object) -> None:
        """Take in the keys of a node's clients. Raises WireError or RoundError for one that is not there, or not signed."""
        keys = sum_wire.read_keys(said)
        for client in clients:
            if client.id not in keys:
                raise WireError(f"announced no key of {client.id} for secure sums")
            if self.roster is not None:
                check_signature(self.roster, self.run, client.id, *keys[client.id])
            self.keys[client.id] = keys[client.id]

    def path(self, t: int, part: int) -> Path:
        """The file of a sum: that of round t which is the `part`-th, from 0."""
        return self.folder / f"sum-{t:06d}-{part}.bin"

    def begun(self, t: int, part: int) -> Begun | None:
        """The sum that clients may have opened already. Raises RunError if its file is damaged."""
        path = self.path(t, part)
        if not path.is_file():
            return None
        try:
            said, (masked,) = unpack(path.read_bytes())
            return Begun(
                bytes.fromhex(said["attempt"]),
                sum_wire.read_keys(said["keys"]),
                [(client, why) for client, why in said["failures"]],
                list(said["waiting"]),
                bytes.fromhex(said["bound"]),
                bytes(masked),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} is damaged ({type(error).__name__}): its sum can be opened no more. Remove it, and the clients will "
                f"refuse round {t}; begin the run anew"
            ) from None

    def begin(self, server: Aggregator, keys: Keys, failures: list[tuple[str, str]], waiting: Iterable[str]) -> None:
        """Write a sum down, whole, before any client is asked to open it."""
        terms, present = server.terms, server.present
        assert server.total is not None
        masked = {
            "sum": {"y": server.total},
            "boxes": {i: sum_wire.rows([server.boxes[i][j] for j in sorted(server.boxes[i])]) for i in present},
            "hashes": {i: sum_wire.rows([server.hashes[i][j] for j in sorted(server.hashes[i])]) for i in present},
        }
        said = {
            "attempt": terms.attempt.hex(),
            "keys": sum_wire.keys_header({key: keys[key] for key in terms.keys}),
            "failures": failures,
            "waiting": sorted(waiting),
            "bound": terms.bound.hex(),
        }
        make_folder(self.folder)
        write(self.path(terms.t, terms.part), pack(said, [encode(masked)]))

    def may_be_open(self, t: int) -> bool:
        """Whether clients were asked to open a sum of round t."""
        return self.path(t, 0).is_file()

    def forget_before(self, t: int) -> None:
        """Remove the sums of earlier rounds: their checkpoints stand."""
        with disk_errors(self.folder):
            for path in self.folder.glob("sum-*.bin"):
                if (match := _FILE.fullmatch(path.name)) and int(match[1]) < t:
                    path.unlink(missing_ok=True)
