"""A node's worker: one process that loads the model once and answers every message of its node, one at a time.

This is the node's side of the wire: the one place where it decodes what comes and encodes what goes. A message names the
server's session and carries a number that only grows, so that none is answered twice. It also carries what the worker must
know of the run: a worker that was started again takes it up from any message, and no round is lost.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fedloom.checkpoint import Kept
from fedloom.core import Client, Failure, State, Upload
from fedloom.engines import channel, codec, kept
from fedloom.engines.envelope import WireError, pack, unpack
from fedloom.errors import ConfigError, FedloomError

log = logging.getLogger("fedloom.node")


class Node(Protocol):
    """What a worker works with: a model, local rows, and what its clients keep."""

    @property
    def folder(self) -> Path:
        """Where what clients keep is, for this run."""
        ...

    @property
    def loads(self) -> int:
        """How often a base model was loaded since the process began."""
        ...

    def setup(self, header: dict[str, Any]) -> list[Client]:
        """Take up a run; the clients that live here. Raises ConfigError if the run is not the one agreed upon."""
        ...

    def train(self, clients: Sequence[Client], received: Sequence[State], t: int) -> list[Upload | Failure]:
        """One round of training."""
        ...

    def personal(self, clients: Sequence[Client], received: Sequence[State], t: int) -> list[Upload | Failure]:
        """The personal phase; uploads are empty, and clients with nothing to do have none."""
        ...

    def evaluate(self, clients: Sequence[Client], received: Sequence[State], t: int) -> list[dict[str, float]]:
        """Scores of the clients' own models as they stand after round t."""
        ...

    def export(self, clients: Sequence[Client], received: Sequence[State], t: int) -> None:
        """Write the clients' own models here."""
        ...


class Refused(FedloomError, ValueError):
    """A message that the worker does not answer as asked."""


class Worker:
    """Answers messages. `answer` is all there is to it; `serve` listens for them at a socket."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._session: str | None = None
        self._ended: set[str] = set()
        self._clients: list[Client] = []
        self._number = 0
        self._form: codec.Form = "raw"

    def serve(self, path: Path) -> None:
        """Listen at `path` and answer, until the process is ended."""
        with channel.listen(path) as listener:
            log.info("process %d: worker listens at %s", os.getpid(), path)
            while True:
                try:
                    with listener.accept() as connection:
                        connection.send_bytes(self.answer(connection.recv_bytes()))
                except (OSError, EOFError) as error:  # who asked is gone, or had no key
                    log.warning("a caller left: %s", type(error).__name__)

    def answer(self, data: bytes) -> bytes:
        """The answer to one message: always a message, `refused` with a reason if it cannot be answered.

        Reasons never quote local data: of errors that could, only the kind crosses, and the text stays in the node's log.
        """
        head: dict[str, Any] = {}
        try:
            header, parts = unpack(data)
            head = {key: header.get(key) for key in ("session", "number", "do", "t")}
            self._admit(header)
            more, blobs = self._do(header, parts)
            return pack(head | more, blobs)
        except (WireError, Refused, ConfigError) as error:
            log.warning("refused: %s", error)
            return pack(head | {"refused": str(error)})
        except Exception as error:
            log.exception("failed")
            return pack(head | {"refused": f"{type(error).__name__} on the node; its log says more"})

    def _admit(self, header: dict[str, Any]) -> None:
        session, number, setup = header.get("session"), header.get("number"), header.get("setup")
        if not isinstance(session, str) or not isinstance(number, int) or not isinstance(header.get("t"), int):
            raise WireError("has no session, number or t")
        if session != self._session:
            if session in self._ended:
                raise Refused("replayed: this session has ended")
            if not isinstance(setup, dict) or setup.get("form") not in codec.FORMS:
                raise WireError("does not say what run it is of")
            self._clients = self._node.setup(setup)
            if self._session is not None:
                self._ended.add(self._session)
            self._session, self._number, self._form = session, 0, setup["form"]
            log.info("process %d: base model loaded %d time(s)", os.getpid(), self._node.loads)
        if number <= self._number:
            raise Refused(f"replayed: message {number} of this session, expected one after {self._number}")
        self._number = number

    def _do(self, header: dict[str, Any], parts: list[memoryview]) -> tuple[dict[str, Any], list[bytes]]:
        if header["do"] == "hello":
            return {"clients": [[c.id, c.examples, c.rank, c.keep] for c in self._clients]}, []
        t = int(header["t"])
        here = {client.id: client for client in self._clients}
        if strange := [id for id in header["clients"] if id not in here]:
            raise Refused(f"clients {', '.join(map(str, strange))} do not live here")
        # Identity and budget are the node's own, whatever the server says.
        clients = [here[id] for id in header["clients"]]
        received = [codec.decode(part) for part in parts]
        log.info(
            "%s %d: process %d, base model loaded %d time(s), clients %s",
            *(header["do"], t, os.getpid(), self._node.loads, ", ".join(c.id for c in clients)),
        )
        start = time.perf_counter()
        match header["do"]:
            case "train" | "personal" as what:
                fit = self._node.train if what == "train" else self._node.personal
                results = fit(clients, received, t)
                seconds = time.perf_counter() - start
                answers, blobs = self._encoded(results, clients, received, t)
                return {"results": answers, "seconds": seconds}, blobs
            case "evaluate":
                return {"scores": self._node.evaluate(clients, received, t)}, []
            case "export":
                self._node.export(clients, received, t)
                return {}, []
            case other:
                raise Refused(f"{other!r} is nothing a node does")

    def _encoded(
        self, results: list[Upload | Failure], clients: list[Client], received: list[State], t: int
    ) -> tuple[list[dict[str, Any]], list[bytes]]:
        answers: list[dict[str, Any]] = []
        blobs: list[bytes] = []
        by_id = {client.id: state for client, state in zip(clients, received, strict=True)}
        lost = kept.before(self._node.folder / "lost", t)
        kept.forget(self._node.folder / "lost", lost, by_id)
        for result in results:
            if isinstance(result, Failure):
                answers.append({"client": result.client.id, "failure": result.reason})
                continue
            answers.append({"client": result.client.id, "metrics": result.metrics})
            if self._form == "int8":
                blobs.append(_with_feedback(lost, result, by_id[result.client.id]))
            else:
                blobs.append(codec.encode(result.state, self._form))
        return answers, blobs


def _with_feedback(store: Kept, upload: Upload, received: State) -> bytes:
    """Encode as int8, adding what the client's last upload lost if it was of the same slice."""
    mark = torch.frombuffer(bytearray(bytes.fromhex(codec.marks(received))), dtype=torch.int64)
    last = store.get(upload.client.id) or {}
    fits = "mark" in last and torch.equal(last.pop("mark")["mark"], mark)
    data, lost = codec.Feedback.upload(upload.state, received, last if fits else {})
    store.put(upload.client.id, lost | {"mark": {"mark": mark}}, upload.t)
    return data
