"""Secure sums at a node: its clients' keys, what they must not forget, and their half of the two messages.

Keys never leave the node; everything that a client must not do twice is on its disk before an answer goes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedloom.client import Client, Failure
from fedloom.core import Method, Visit
from fedloom.disk import make_folder
from fedloom.engine import Answer
from fedloom.errors import RoundError
from fedloom.flower import sum_wire
from fedloom.flower.message import WireError
from fedloom.flower.sum_wire import Told
from fedloom.privacy.contribution import contribution
from fedloom.privacy.exchange import Party
from fedloom.privacy.keys import Identity, Roster, RunKey, check_signature
from fedloom.privacy.memory import Memory
from fedloom.privacy.secret import secret_file
from fedloom.privacy.sum_plan import Rule
from fedloom.state import State


@dataclass(frozen=True)
class NodeSums:
    """A node's part in the secure sums of one run."""

    rule: Rule
    """The node's own: the server cannot change it."""
    run: str
    folder: Path
    """Of this run at this node."""
    identity: Identity | None = None
    """Signs the run's keys."""
    roster: Roster | None = None
    """Without one, keys are not authenticated."""

    def key(self, client: str) -> RunKey:
        """The client's key for this run, made when it is first asked for."""
        return RunKey(secret_file(self._file(client, "key")))

    def announced(self, clients: list[Client]) -> dict[str, tuple[bytes, bytes]]:
        """Client id -> (public key, signature)."""
        found = {}
        for client in clients:
            public = self.key(client.id).public
            signed = self.identity.sign(self.run, client.id, public) if self.identity else b""
            found[client.id] = public, signed
        return found

    def told(self, said: object, t: int, thin: memoryview | None) -> Told:
        """What the server says of a sum, with its keys checked. Raises WireError or RoundError."""
        told = sum_wire.read(said, self.rule, self.run, t, thin)
        if self.roster is not None:
            for client, (public, signature) in told.keys.items():
                check_signature(self.roster, self.run, client, public, signature)
        return told

    def masked(self, method: Method, answer: Answer, received: State, visit: Visit, told: Told) -> Answer | Failure:
        """What is sent in place of an upload, without a word of its metrics; or why nothing is."""
        client = answer.client
        try:
            words = contribution(
                method,
                answer.state,
                received,
                visit,
                fixed=told.terms.fixed,
                share=told.shares.get(client.id, 0.0),
                thin=told.thin,
                layout=told.layout,
            )
            return Answer(client, sum_wire.masked_state(self._party(client.id, told).mask(words)))
        except (ValueError, RoundError) as error:
            return Failure(client, str(error))

    def unmasked(self, client: Client, boxes: State, told: Told, present: object) -> Answer | Failure:
        """The client's shares that open the sum of `present`; or why it gives none."""
        try:
            if not isinstance(present, list) or not all(isinstance(one, str) for one in present):
                raise WireError("does not say whose sum it is to open")
            given = sum_wire.read_boxes(boxes, client.id, told.terms, present)
            return Answer(client, sum_wire.shares_state(self._party(client.id, told).unmask(present, given)))
        except (WireError, RoundError) as error:
            return Failure(client, str(error))

    def _party(self, client: str, told: Told) -> Party:
        # From the disk each time: on one machine another worker may have spoken for this client since.
        return Party(client, self.key(client), told.terms, Memory(self._file(client, "json")))

    def _file(self, client: str, kind: str) -> Path:
        return make_folder(self.folder / "secure", 0o700) / f"{client}.{kind}"  # the shares in it are the client's own
