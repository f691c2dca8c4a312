"""What nodes say of themselves and of their clients, read without trust: limits, finite numbers and known names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Any

from fedloom.client import BUDGETS, Client, Failure
from fedloom.core import METRICS
from fedloom.engine import Answer
from fedloom.flower import codec
from fedloom.flower.message import WireError, printable
from fedloom.flower.pending import Answered
from fedloom.state import State

MOST_CLIENTS = 10_000
"""That one node may announce."""
MOST_EXAMPLES = 10**9
_METRICS = frozenset({"loss", *METRICS})

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_TRAINING_S = 1e7


def is_client_id(text: str) -> bool:
    """Whether a client may be called so: the name of a file, at most 64 characters, and not the server's."""
    return _ID.fullmatch(text) is not None and ".." not in text and text != "server"


def client(values: object) -> Client:
    """A client as its node describes it. Raises WireError for anything out of the ordinary."""
    if not isinstance(values, dict):
        raise WireError(f"announced a client as {type(values).__name__}, expected an object")
    try:
        found = Client.from_dict(values)
    except ValueError as error:
        raise WireError(f"announced a client that {printable(error, 120)}") from None
    if not is_client_id(found.id):
        raise WireError(
            f"announced a client {printable(repr(found.id), 70)}, expected letters, digits, dots, dashes and underscores"
        )
    if not 1 <= found.examples <= MOST_EXAMPLES:
        raise WireError(f"announced {found.examples} examples for {found.id}, expected 1 to {MOST_EXAMPLES}")
    for name, budget in BUDGETS.items():
        value = getattr(found, name)
        if not math.isfinite(value) or value < budget.low or (budget.above and value == budget.low):
            raise WireError(f"announced {name} {value:g} for {found.id}")
    return found


def clients(header: dict[str, Any]) -> list[Client]:
    """Who lives on a node, from its answer to a hello. Raises WireError."""
    said = header.get("clients")
    if not isinstance(said, list) or not 1 <= len(said) <= MOST_CLIENTS:
        raise WireError(f"announced no list of 1 to {MOST_CLIENTS} clients")
    found = [client(values) for values in said]
    if len({one.id for one in found}) < len(found):
        raise WireError("announced a client twice")
    return found


def results(one: Answered, form: codec.Form | None) -> Iterator[tuple[Answer | Failure, bool]]:
    """What came of each client that a node was asked for, and whether its visit waits for a further exchange.

    `form` is that of the tensors; None if none are sent. Never raises.
    """
    try:
        given = _given(one)
    except Exception as error:
        for asked, _ in one.asked.jobs:
            yield Failure(asked, f"answer refused: {printable(error)}"), False
        return
    for asked, received in one.asked.jobs:
        said, blob = given.get(asked.id, (None, None))
        try:
            yield _result(asked, received, said, blob, form), said is not None and said.get("waits") is True
        except Exception as error:
            yield Failure(asked, f"answer refused: {printable(error)}"), False


def _given(one: Answered) -> dict[str, tuple[dict[str, Any], memoryview | None]]:
    """Client id -> what is said of it, and its tensors."""
    said = one.header.get("results")
    if not isinstance(said, list) or not all(isinstance(x, dict) and isinstance(x.get("client"), str) for x in said):
        raise WireError("has no list of results")
    blobs = iter(one.parts)
    given = {x["client"]: (x, None if "failure" in x else next(blobs, None)) for x in said}
    if len(given) < len(said):
        raise WireError("has two results for one client")
    if next(blobs, None) is not None:
        raise WireError("has tensors of no client")
    return given


def _result(
    asked: Client, received: State, said: dict[str, Any] | None, blob: memoryview | None, form: codec.Form | None
) -> Answer | Failure:
    if said is None:
        return Failure(asked, "its node answered without it")
    if "failure" in said:
        return Failure(asked, printable(said["failure"]))
    metrics = {name: x for name, x in numbers(said.get("metrics")).items() if name in _METRICS}
    if form is None:
        return Answer(asked, {}, metrics)
    if blob is None:
        raise WireError("no tensors")
    state = codec.Feedback.download(blob, received) if form == "int8" else codec.decode(blob)
    return Answer(asked, state, metrics)


def numbers(values: object) -> dict[str, float]:
    """Name -> finite number. Raises WireError for anything else."""
    if not isinstance(values, dict):
        raise WireError(f"metrics are {type(values).__name__}, expected an object")
    for name, x in values.items():
        if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
            raise WireError(f"metric {printable(name, 40)!r} is no finite number")
    return {name: float(x) for name, x in values.items()}


def scores(one: Answered, names: Collection[str]) -> dict[str, dict[str, float]]:
    """Client id -> its scores, of exactly these names. Raises WireError."""
    said = one.header.get("scores")
    if not isinstance(said, dict):
        raise WireError("scores are no object")
    found = {}
    for asked, _ in one.asked.jobs:
        values = numbers(said.get(asked.id))
        if values.keys() != set(names):
            raise WireError(f"scores of {asked.id} are not {', '.join(sorted(names))}, all of them finite")
        found[asked.id] = values
    return found


def epsilons(one: Answered) -> dict[str, float]:
    """Client id -> what its rows have spent, of those whose node says something of sense."""
    said = one.header.get("results")
    asked = {client.id for client, _ in one.asked.jobs}
    return {
        result["client"]: result["epsilon"]
        for result in (said if isinstance(said, list) else [])
        if isinstance(result, dict) and isinstance(result.get("client"), str) and result["client"] in asked
        if isinstance(result.get("epsilon"), float) and 0 <= result["epsilon"] < math.inf
    }


def seconds(header: dict[str, Any]) -> float:
    """How long a node says that it trained; 0 if it says nothing of sense."""
    said = header.get("seconds")
    sensible = isinstance(said, float) and 0 <= said <= _LONGEST_TRAINING_S
    return said if sensible and isinstance(said, float) else 0.0
