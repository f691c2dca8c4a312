"""A node's worker: one process that loads the model once and answers every message of its node, one at a time.

This is the node's side of the wire: the one place where it decodes what comes and encodes what goes. A message names the
server's session and carries a number that only grows, so that none is answered twice. A worker that does not know the session,
because it was started again, says so; the server then sends the same message with what the worker must know of the run, and no
round is lost.
"""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedloom.checkpoint import ClientStates
from fedloom.client import Client, Failure
from fedloom.engine import Answer, Job
from fedloom.errors import ConfigError, FedloomError, MethodError, RoundError
from fedloom.flower import codec, ipc
from fedloom.flower.message import WireError, pack, printable, unpack
from fedloom.flower.node_visits import NodeRun, NodeVisits, lost_visit
from fedloom.state import State

if TYPE_CHECKING:
    from fedloom.flower.sum_wire import Told

log = logging.getLogger("fedloom.node")

_MESSAGE_S = 60.0
"""How long a caller that has the key may wait before it says something."""


class Node(Protocol):
    """What a worker works with: a model and local rows."""

    @property
    def loads(self) -> int:
        """How often a base model was loaded since the process began."""
        ...

    def setup(self, setup: dict[str, Any]) -> NodeRun:
        """Take up a run. Raises ConfigError if it is not the one agreed upon."""
        ...


class Refused(FedloomError, ValueError):
    """A message that the worker does not answer as asked."""


class Unknown(Refused):
    """A message of a session that this process does not know."""


class Worker:
    """Answers messages. `answer` is all there is to it; `serve` listens for them at a socket."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._session: str | None = None
        self._last: dict[str, int] = {}
        """Session -> number of its last message, of sessions that have ended too."""
        self._run: NodeRun | None = None
        self._clients: dict[str, Client] = {}
        self._visits: NodeVisits | None = None
        self._form: codec.Form = "raw"

    def serve(self, path: Path) -> None:
        """Listen at `path` and answer, until the process is ended."""
        with ipc.Listener(path) as listener:
            log.info("process %d: worker listens at %s", os.getpid(), path)
            while (connection := listener.accept()) is not None:
                with connection:
                    self._serve_one(connection)

    def _serve_one(self, connection: Connection) -> None:
        try:
            if connection.poll(_MESSAGE_S):
                connection.send_bytes(self.answer(connection.recv_bytes(ipc.LONGEST)))
        except (OSError, EOFError, MemoryError) as error:  # who asked is gone, or claims a length that nothing has
            log.warning("a caller left: %s", type(error).__name__)

    def answer(self, data: bytes) -> bytes:
        """The answer to one message: always a message, `refused` with a reason if it cannot be answered.

        Reasons never quote local data: of errors that could, only the kind crosses, and the text stays in the node's log.
        """
        head: dict[str, Any] = {}
        try:
            header, parts = unpack(data)
            head = {key: header.get(key) for key in ("session", "number", "do", "t")}
            run = self._admitted(header)
            more, blobs = self._done(run, header, parts)
            return pack(head | more, blobs)
        except (WireError, Refused, ConfigError, MethodError, RoundError) as error:
            log.warning("refused: %s", printable(error))
            more = {"unknown": True} if isinstance(error, Unknown) else {}
            return pack(head | {"refused": printable(error)} | more)
        except Exception as error:
            log.exception("failed")
            return pack(head | {"refused": f"{type(error).__name__} on the node; its log says more"})

    def _admitted(self, header: dict[str, Any]) -> NodeRun:
        """The run that a message is of: set up if it says how, and if it is not the one at hand."""
        session, number = header.get("session"), header.get("number")
        numbers = [number, header.get("t"), header.get("exchange")]
        if not isinstance(session, str) or any(type(x) is not int or x < 0 for x in numbers):
            raise WireError("has no session, number, t or exchange")
        assert isinstance(number, int)
        if session != self._session and session in self._last:
            raise Refused("replayed: this session has ended")
        if session == self._session and number <= self._last[session]:
            raise Refused(f"replayed: message {number} of this session, expected one after {self._last[session]}")
        if session != self._session or self._run is None:
            self._take_up(session, header.get("setup"))
        self._last[session] = number
        assert self._run is not None
        return self._run

    def _take_up(self, session: str, setup: object) -> None:
        if setup is None:
            raise Unknown("this session is not known here")
        if not isinstance(setup, dict) or setup.get("form") not in codec.FORMS:
            raise WireError("does not say what run it is of")
        if self._visits is not None:
            self._visits.close()
        # If this fails, the session at hand goes on: it will be asked for its setup again, for the model may be another one.
        self._run = self._visits = None
        run = self._node.setup(setup)
        self._run, self._clients = run, {client.id: client for client in run.clients}
        self._session, self._form = session, setup["form"]
        log.info("process %d: base model loaded %d time(s)", os.getpid(), self._node.loads)

    def _done(
        self, run: NodeRun, header: dict[str, Any], parts: list[memoryview]
    ) -> tuple[dict[str, Any], list[bytes]]:
        do, t = header["do"], int(header["t"])
        if do == "hello":
            return {"clients": [client.to_dict() for client in run.clients]} | _keys(run, list(run.clients)), []
        jobs = self._jobs(header, parts)
        told = self._told(run, header, parts)
        log.info(
            "%s %d: process %d, base model loaded %d time(s), clients %s",
            *(do, t, os.getpid(), self._node.loads, ", ".join(client.id for client, _ in jobs)),
        )
        start = time.perf_counter()
        match do:
            case "exchange":
                self._claim(run.folder, jobs)
                came = self._exchange(run, t, header["exchange"], jobs)
                self._claim(run.folder, jobs)
                if told is not None:
                    came = _masked(run, t, came, dict(jobs), told)
                seconds = time.perf_counter() - start
                said, blobs = self._encoded(run, came, dict(jobs), t, header["exchange"])
                return {"results": said, "seconds": seconds}, blobs
            case "keys":
                return _keys(run, [client for client, _ in jobs]), []
            case "unmask" if run.sums is not None and told is not None:
                sums, present = run.sums, header.get("present")
                given = [sums.unmasked(client, boxes, told, present) for client, boxes in jobs]
                said = [_said(one) for one in given]
                return {"results": said}, [codec.encode(one.state) for one in given if isinstance(one, Answer)]
            case "personal":
                trained = list(run.before(t, jobs).personal(run.method, jobs, t))
                if run.sums is not None:  # a client's own numbers stay with it
                    trained = [replace(one, metrics={}) if isinstance(one, Answer) else one for one in trained]
                return {"results": [_said(one) for one in trained], "seconds": time.perf_counter() - start}, []
            case "evaluate" | "evaluate common" if run.sums is not None:
                raise Refused("one client's scores are not told under privacy.secure_aggregation")
            case "evaluate" | "evaluate common":
                scores = run.before(t + 1).scores(run.method, jobs, t, do == "evaluate common")
                return {"scores": {key: _finite(values) for key, values in scores.items()}}, []
            case "export":
                run.before(t + 1).export(run.method, jobs, t)
                return {}, []
            case other:
                raise Refused(f"{other!r} is nothing a node does")

    def _jobs(self, header: dict[str, Any], parts: list[memoryview]) -> list[Job]:
        asked = header.get("clients")
        if not isinstance(asked, list):
            raise WireError("names no clients")
        if strange := [str(id) for id in asked if not isinstance(id, str) or id not in self._clients]:
            raise Refused(f"clients {', '.join(strange)} do not live here")
        if len(asked) != len(parts) - _has_thin(header):
            raise WireError(f"has tensors for {len(parts)} of {len(asked)} clients")
        # Identity and budget are the node's own, whatever the server says.
        return [(self._clients[id], codec.decode(part)) for id, part in zip(asked, parts, strict=False)]

    def _told(self, run: NodeRun, header: dict[str, Any], parts: list[memoryview]) -> Told | None:
        """What the sum is that uploads go into; None where each goes by itself."""
        if header["do"] not in ("exchange", "unmask") or (run.sums is None and "sum" not in header):
            return None
        if run.sums is None:
            raise Refused("asks for a secure sum, and this node's run has none")
        return run.sums.told(header.get("sum"), header["t"], parts[-1] if _has_thin(header) else None)

    def _claim(self, folder: Path, jobs: list[Job]) -> None:
        """Note on disk which message trains these clients. Raises Refused if a later one does, or did, in another worker.

        On one machine the clients of a worker that is stuck are given to another: when it goes on, it must not touch what they
        have kept since.
        """
        assert self._session is not None
        number, asked = self._last[self._session], folder / "asked"
        asked.mkdir(parents=True, exist_ok=True)
        for client, _ in jobs:
            path = asked / client.id
            session, _, last = (path.read_text() if path.exists() else "").partition(" ")
            if session == self._session and last.isdigit() and int(last) > number:
                raise Refused(f"overtaken: a later message trained {client.id} on another node")
        for client, _ in jobs:
            # Not synced: it matters only as long as the server's process lives.
            (asked / client.id).write_text(f"{self._session} {number}")

    def _exchange(self, run: NodeRun, t: int, exchange: int, jobs: list[Job]) -> list[tuple[Answer | Failure, bool]]:
        if exchange == 1:
            if self._visits is not None:
                self._visits.close()
            self._visits = NodeVisits(run, t, jobs)
        if self._visits is None or self._visits.t != t:
            return [(lost_visit(client), False) for client, _ in jobs]
        return self._visits.run(jobs)

    def _encoded(
        self,
        run: NodeRun,
        came: list[tuple[Answer | Failure, bool]],
        received: dict[Client, State],
        t: int,
        exchange: int,
    ) -> tuple[list[dict[str, Any]], list[bytes]]:
        said, blobs = [], []
        lost = ClientStates.before(run.folder / "lost" / str(exchange), t)
        lost.forget_others([client.id for client in received])
        for result, waits in came:
            spent = {} if run.epsilon is None else _finite({"epsilon": run.epsilon(result.client.id)})
            said.append(_said(result) | {"waits": waits} | spent)
            if isinstance(result, Answer):
                given = received[result.client]
                int8 = self._form == "int8"
                blobs.append(_with_feedback(lost, result, given, t) if int8 else codec.encode(result.state, self._form))
        return said, blobs


def _has_thin(header: dict[str, Any]) -> int:
    """Parts of a message besides those of its clients: which numbers are not summed."""
    said = header.get("sum")
    return int(isinstance(said, dict) and said.get("thin") is True)


def _keys(run: NodeRun, clients: list[Client]) -> dict[str, Any]:
    """The keys of clients for the run's secure sums, where it has any."""
    if run.sums is None:
        return {}
    return {"keys": {key: [x.hex() for x in pair] for key, pair in run.sums.announced(clients).items()}}


def _masked(
    run: NodeRun, t: int, came: list[tuple[Answer | Failure, bool]], received: dict[Client, State], told: Told
) -> list[tuple[Answer | Failure, bool]]:
    """Every upload under its masks: from here on nobody can read one."""
    assert run.sums is not None
    made: list[tuple[Answer | Failure, bool]] = []
    for one, waits in came:
        if isinstance(one, Answer):
            visit = run.simulation.visit(one.client, t)
            made.append((run.sums.masked(run.method, one, received[one.client], visit, told), waits))
        else:
            made.append((one, waits))
    return made


def _said(result: Answer | Failure) -> dict[str, Any]:
    """A result without its tensors. Numbers that are not finite are left out: the upload that goes with them tells enough."""
    if isinstance(result, Failure):
        return {"client": result.client.id, "failure": result.reason}
    return {"client": result.client.id, "metrics": _finite(result.metrics)}


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: float(x) for name, x in values.items() if math.isfinite(x)}


def _with_feedback(store: ClientStates, answer: Answer, received: State, t: int) -> bytes:
    """Encode as int8, adding what the client's last upload lost if it was of the same slice."""
    mark = torch.frombuffer(bytearray(bytes.fromhex(codec.marks(received))), dtype=torch.int64)
    last = store.get(answer.client.id) or {}
    fits = "mark" in last and torch.equal(last.pop("mark")["mark"], mark)
    data, lost = codec.Feedback.upload(answer.state, received, last if fits else {})
    store.put(answer.client.id, lost | {"mark": {"mark": mark}}, t)
    return data
