"""A run whose clients are on other machines: the deployment, the agreement with its nodes, and who takes part."""

from __future__ import annotations

import hashlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.client import Client
from fedloom.engine import Engine
from fedloom.errors import ConfigError
from fedloom.flower import sandbox
from fedloom.flower.codec import Form
from fedloom.flower.coordinator import Coordinator, RoundPolicy
from fedloom.flower.transport import Transport
from fedloom.runs.assemble import Parts
from fedloom.runs.directory import RunDirectory, digest_file
from fedloom.runs.flower_node import agreement
from fedloom.sampling import Sampler, fraction

_FORMS: dict[str, Form] = {"float32": "raw", "bfloat16": "bfloat16", "int8": "int8"}


@contextmanager
def connected(run: RunDirectory, parts: Parts, on_status: Callable[[str], None]) -> Iterator[Transport | None]:
    """The transport to the run's nodes while the block lasts, or None if its clients are in this process.

    Without engine.superlink a whole deployment is started on this machine, and stopped after.
    """
    c = parts.config.engine
    if c.name == "inprocess":
        yield None
        return
    if c.superlink is not None:
        on_status(f"waiting for the SuperLink at {c.superlink}")
        certificates = None if c.root_certificates is None else Path(c.root_certificates)
        with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
            transport = sandbox.lend(c.superlink, Path(folder) / "home", Path(folder) / "link", certificates)
            try:
                yield transport
            finally:
                transport.close()
        return
    on_status("starting a SuperLink and its nodes")
    with sandbox.Deployment(nodes(parts), run.path / "logs", local_worker(c.threads)) as deployment:
        transport = deployment.connect()
        try:
            yield transport
        finally:
            transport.close()


def local_worker(threads: int | None) -> Callable[[Path], list[str]]:
    """Socket -> the command of a worker that serves whatever client of whatever run the server names."""
    more = [] if threads is None else ["--threads", str(threads)]
    return lambda path: [sys.executable, "-m", "fedloom.runs.flower_node", "--socket", str(path), *more]


def coordinator(
    transport: Transport, run: RunDirectory, parts: Parts, local: Engine, on_status: Callable[[str], None]
) -> Coordinator:
    """The engine over a transport, once the run's clients have announced themselves. Sets `parts.clients` to those."""
    c = parts.config
    here = c.engine.superlink is None
    if not here and c.clients.count is None:
        raise ConfigError("clients.count is missing: say how many clients the run waits for")
    count = len(parts.clients) if here or c.clients.count is None else c.clients.count
    policy = RoundPolicy(
        deadline_s=c.engine.deadline_s,
        enough=max(1, round(c.clients.fraction * count)) if c.engine.oversample > 0 else None,
        form=_FORMS[c.engine.wire],
    )
    engine = Coordinator(
        transport,
        setup(run, parts),
        policy,
        local,
        roster=parts.clients if here else None,
        check=parts.method.check,
        metrics={"loss", *parts.tables.metrics},
        on_status=on_status,
    )
    if here:
        engine.wait_for_nodes(nodes(parts), c.engine.patience_s)
        return engine
    known = run.manifest().get("clients") if (run.checkpoint / "latest.json").exists() else None
    if known is None:
        parts.clients = engine.wait_for_clients(count, c.engine.patience_s)
    else:
        # The run began with these: who is not back yet is left out of the rounds until it is.
        engine.wait_for_clients(min(c.engine.quorum, len(known)), c.engine.patience_s)
        parts.clients = [Client.from_dict({"id": id} | values) for id, values in sorted(known.items())]
    return engine


def setup(run: RunDirectory, parts: Parts) -> dict[str, Any]:
    """What a node must know of a run to take part."""
    name = hashlib.sha256(f"{run.path.resolve()} {digest_file(run.config_file)}".encode()).hexdigest()[:16]
    said = {
        "run": name,
        "agreement": agreement(parts.config),
        "labels": parts.tables.labels,
        "model": parts.base.sha256,
    }
    if parts.config.engine.superlink is None:  # nodes of this very machine, started by us: they read what we read
        said |= {"config": parts.config.to_toml(), "folder": str(run.path.resolve())}
    return said


def nodes(parts: Parts) -> int:
    """How many nodes a run on this machine has."""
    return parts.config.engine.nodes or min(2, len(parts.clients))


def sampler(parts: Parts) -> Sampler:
    """Who is asked each round: the share of the configuration, and more of them where it asks for more than it needs."""
    c = parts.config
    more = 1.0 + (c.engine.oversample if c.engine.name != "inprocess" else 0.0)
    wanted = max(1, round(c.clients.fraction * len(parts.clients)))
    share = math.ceil(wanted * more) / len(parts.clients) if more > 1 else c.clients.fraction
    return fraction(min(1.0, share), c.seed)
