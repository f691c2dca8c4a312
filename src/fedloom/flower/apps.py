"""The two apps that Flower runs, both thin: bytes in, bytes out. The only module that imports flwr (1.41).

A SuperLink starts `server` once per run: it lends the run's `Grid` to the fedloom process that listens at the socket named in
the run's configuration, and ends with it. A SuperNode starts `client` in a fresh process for every message: it hands the
message to the node's worker, which lives on with the model in its memory, and returns the worker's answer.

Neither imports torch, so that their processes start quickly. Only flwr's public API is used: flwr.app, flwr.serverapp,
flwr.clientapp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedloom.flower import ipc
from fedloom.flower.message import WireError, printable

RECORD, KEY, STYPE = "fedloom", "message", "fedloom.1"
ACTION = "train.fedloom"
"""One action: what is asked is in our own message, whose header both sides check."""

server = ServerApp()
client = ClientApp()


def wrap(data: bytes) -> RecordDict:
    """Our bytes as Flower's record: one array of unsigned bytes, which Flower cuts, sends and puts together again."""
    return RecordDict({RECORD: ArrayRecord({KEY: Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})})


def unwrap(content: RecordDict) -> bytes:
    """Inverse of `wrap`. Raises WireError for any other record."""
    record = content.get(RECORD)
    if list(content) != [RECORD] or not isinstance(record, ArrayRecord) or list(record) != [KEY]:
        raise WireError(f"records {sorted(content)}, expected one array record {RECORD!r} with one array {KEY!r}")
    array = record[KEY]
    if (array.stype, array.dtype) != (STYPE, "uint8"):
        raise WireError(f"an array {array.stype!r} of {array.dtype!r}, expected {STYPE!r} of 'uint8'")
    return bytes(array.data)


@server.main()
def lend(grid: Grid, context: Context) -> None:
    """Do on the grid what the fedloom process asks for, until it hangs up."""
    with ipc.connect(Path(str(context.run_config["socket"]))) as connection:
        while True:
            try:
                asked, parts = ipc.receive(connection)
            except EOFError:
                return
            try:
                answer, found = _do(grid, asked, parts)
            except Exception as error:  # flwr's HTTP client raises many kinds, and all mean the same to who asked
                answer, found = {"error": f"{type(error).__name__}: {error}"}, []
            ipc.send(connection, answer, found)


def _do(grid: Grid, asked: dict[str, Any], parts: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    match asked["do"]:
        case "nodes":
            return {"nodes": sorted(grid.get_node_ids())}, []
        case "push":
            message = Message(wrap(parts[0]), asked["node"], ACTION, ttl=asked["ttl_s"])
            # One at a time: many large payloads in one request would be refused for their size.
            return {"id": next(iter(grid.push_messages([message])), None)}, []
        case "pull":
            return _pull(grid, asked["ids"])
        case other:
            raise WireError(f"{other!r} is nothing a grid does")


def _pull(grid: Grid, ids: list[str]) -> tuple[dict[str, Any], list[bytes]]:
    replies: list[list[Any]] = []
    parts: list[bytes] = []
    for message in grid.pull_messages(ids):
        fault = None
        if message.has_error():
            fault = f"Flower says: {printable(message.error.reason)} (code {message.error.code})"
        else:
            try:
                parts.append(unwrap(message.content))
            except Exception as error:  # a record of any kind may come from a node
                fault = f"answer {printable(error)}"
        replies.append([message.metadata.reply_to_message_id, fault])
    return {"replies": replies}, parts


@client.train("fedloom")
def proxy(message: Message, context: Context) -> Message:
    """Hand the message to the node's worker and return its answer. An exception becomes Flower's error reply."""
    path = context.node_config.get("worker")
    if not isinstance(path, str):
        raise WireError(f"node config has worker = {path!r}, expected --node-config 'worker=\"/path/of/the/socket\"'")
    with ipc.connect(Path(path)) as connection:
        connection.send_bytes(unwrap(message.content))
        answer = connection.recv_bytes(ipc.LONGEST)
    return Message(wrap(answer), reply_to=message)
