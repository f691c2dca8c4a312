"""A run whose clients are on other machines: the deployment, the agreement with its nodes, and who takes part."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom.core import Client, Engine, Sampler
from fedloom.engines import local
from fedloom.engines.codec import Form
from fedloom.engines.link import Link
from fedloom.engines.remote import Remote, Terms
from fedloom.errors import ConfigError
from fedloom.loop import some
from fedloom.runs.assemble import Parts
from fedloom.runs.directory import RunDirectory, digest_file
from fedloom.runs.node import agreement

_FORMS: dict[str, Form] = {"float32": "raw", "bfloat16": "bfloat16", "int8": "int8"}


@contextmanager
def connected(run: RunDirectory, parts: Parts, say: Callable[[str], None]) -> Iterator[Link | None]:
    """The link to the run's nodes while the block lasts, or None if its clients are in this process.

    Without engine.superlink a whole deployment is started on this machine, and stopped after.
    """
    c = parts.config.engine
    if c.name == "inprocess":
        yield None
        return
    if c.superlink is not None:
        say(f"waiting for the SuperLink at {c.superlink}")
        certificates = None if c.root_certificates is None else Path(c.root_certificates)
        with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
            link = local.lend(c.superlink, Path(folder) / "home", Path(folder) / "link", certificates)
            try:
                yield link
            finally:
                link.close()
        return
    say("starting a SuperLink and its nodes")
    with local.Deployment(nodes(parts), run.path / "logs", c.threads) as deployment:
        link = deployment.connect()
        try:
            yield link
        finally:
            link.close()


def engine(link: Link, run: RunDirectory, parts: Parts, own: Engine, say: Callable[[str], None]) -> Remote:
    """The engine over a link, once the run's clients have announced themselves. Sets `parts.clients` to those."""
    c = parts.config
    setup = {
        "run": hashlib.sha256(f"{run.path.resolve()} {digest_file(run.config_file)}".encode()).hexdigest()[:16],
        "agreement": agreement(c),
        "labels": parts.tables.labels,
        "model": parts.base.sha256,
    }
    here = c.engine.superlink is None
    if here:  # nodes of this very machine, started by us: they read what we read
        setup |= {"config": c.to_toml(), "folder": str(run.path.resolve())}
    elif c.clients.count is None:
        raise ConfigError("clients.count is missing: say how many clients the run waits for")
    count = len(parts.clients) if here else c.clients.count
    assert count is not None
    share = c.clients.fraction
    terms = Terms(
        deadline_s=c.engine.deadline_s,
        enough=max(1, round(share * count)) if c.engine.oversample > 0 else None,
        form=_FORMS[c.engine.wire],
    )
    remote = Remote(link, setup, terms, own, say, parts.clients if here else None)
    if here:
        remote.muster(nodes(parts), c.engine.patience_s)
        return remote
    known = run.manifest().get("clients") if (run.checkpoint / "latest.json").exists() else None
    if known is None:
        parts.clients = remote.gather(count, c.engine.patience_s)
    else:
        # The run began with these: who is not back yet is left out of the rounds until it is.
        remote.gather(min(c.engine.quorum, len(known)), c.engine.patience_s)
        parts.clients = [Client(id, x["examples"], x["rank"], x["keep"]) for id, x in sorted(known.items())]
    for client in parts.clients:
        parts.method.check(client)
    return remote


def nodes(parts: Parts) -> int:
    """How many nodes a run on this machine has."""
    return parts.config.engine.nodes or min(2, len(parts.clients))


def sampler(parts: Parts) -> Sampler:
    """Who is asked each round: the share of the configuration, and more of them where it asks for more than it needs."""
    c = parts.config
    more = 1.0 + (c.engine.oversample if c.engine.name != "inprocess" else 0.0)
    wanted = max(1, round(c.clients.fraction * len(parts.clients)))
    share = math.ceil(wanted * more) / len(parts.clients) if more > 1 else c.clients.fraction
    return some(min(1.0, share), c.seed)
