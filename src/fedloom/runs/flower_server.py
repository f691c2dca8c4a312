"""A run whose clients are on other machines: the deployment, the agreement with its nodes, and who takes part."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom import sampling
from fedloom.client import Client
from fedloom.engine import Engine
from fedloom.errors import ConfigError
from fedloom.flower import sandbox
from fedloom.flower.codec import Form
from fedloom.flower.coordinator import Coordinator, RoundPolicy
from fedloom.flower.transport import Transport
from fedloom.runs import secure_sums
from fedloom.runs.config import ClientsSection, RunConfig
from fedloom.runs.experiment import Experiment, with_clients
from fedloom.runs.flower_node import agreement, local_worker
from fedloom.runs.run_directory import RunDirectory, digest_file
from fedloom.sampling import Sampler, fraction
from fedloom.text import shown

_FORMS: dict[str, Form] = {"float32": "raw", "bfloat16": "bfloat16", "int8": "int8"}


OPEN_PORT = (
    "while this run lasts, any user of this machine can submit an app to its SuperLink, and that app's code runs as you: "
    "share the machine with nobody you do not trust, or use engine.name = 'inprocess' (SECURITY.md)"
)
"""What starting a whole deployment on one machine does not prevent."""


def check_startable(config: RunConfig) -> None:
    """Raise ConfigError if Flower is not installed, or the certificate's file is not there."""
    sandbox.command("flower-superlink" if config.engine.superlink is None else "flwr")
    named = config.engine.root_certificates
    if named is not None and not Path(named).is_file():
        raise ConfigError(
            f"engine.root_certificates: there is no file {shown(named)}, expected the authority's PEM file"
        )


BROUGHT = ("partition", "alpha", "field", "classes_per_client", "split_seed", "ranks", "keep")
"""Keys of [clients] for a simulation alone: nodes that are there already have rows and budgets of their own."""


@contextmanager
def connected(
    run: RunDirectory,
    e: Experiment,
    on_status: Callable[[str], None],
    on_warning: Callable[[str], None] = lambda what: None,
) -> Iterator[Transport]:
    """The transport to the run's nodes while the block lasts.

    Without engine.superlink a whole deployment is started on this machine, and stopped after; `on_warning` is told before
    what that does not prevent. With it, what of [clients] has no effect.
    """
    c = e.config.engine
    if (said := secure_sums.warning(e.config)) is not None:
        on_warning(said)
    if c.superlink is not None:
        if unused := [key for key in BROUGHT if getattr(e.config.clients, key) != getattr(ClientsSection(), key)]:
            on_warning(f"{', '.join(f'clients.{key}' for key in unused)}: of no effect, as each node brings its own")
        on_status(f"waiting for the SuperLink at {c.superlink}")
        certificates = None if c.root_certificates is None else Path(c.root_certificates)
        with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
            transport = sandbox.lend(c.superlink, Path(folder) / "home", Path(folder) / "link", certificates)
            try:
                yield transport
            finally:
                transport.close()
        return
    on_warning(OPEN_PORT)
    on_status("starting a SuperLink and its nodes")
    with sandbox.Deployment(node_count(e), run.path / "logs", lambda path: local_worker(path, c.threads)) as deployment:
        transport = deployment.connect()
        try:
            yield transport
        finally:
            transport.close()


def coordinator(
    transport: Transport, run: RunDirectory, e: Experiment, local: Engine, on_status: Callable[[str], None]
) -> tuple[Coordinator, Experiment]:
    """The engine over a transport once the run's clients have announced themselves, and the experiment with those."""
    c, secure = e.config, run.path / "secure"
    name = f"{run.path.resolve()} {digest_file(run.config_file)}{secure_sums.nonce(c, secure)}"
    setup = {
        "run": hashlib.sha256(name.encode()).hexdigest()[:16],
        "agreement": agreement(c),
        "labels": e.tables.labels,
        "metrics": e.tables.metrics,
        "model": e.base.sha256,
    }
    here = c.engine.superlink is None
    if here:  # nodes of this very machine, started by us: they read what we read
        setup |= {"config": c.to_toml(), "folder": str(run.path.resolve())}
    elif c.clients.count is None:
        raise ConfigError("clients.count is missing: say how many clients the run waits for")
    engine = Coordinator(
        transport,
        setup,
        _policy(c, len(e.clients)),
        local,
        roster=e.clients if here else None,
        check=e.method.check,
        metrics=("loss", *e.tables.metrics),
        sums=secure_sums.at_server(c, str(setup["run"]), secure),
        on_status=on_status,
    )
    if here:
        engine.wait_for_nodes(node_count(e), c.engine.patience_s)
        return engine, e
    known = run.manifest().get("clients") if (run.checkpoint / "latest.json").exists() else None
    if known is None:
        assert c.clients.count is not None
        return engine, with_clients(e, engine.wait_for_clients(c.clients.count, c.engine.patience_s))
    # The run began with these: who is not back yet is left out of the rounds until it is.
    engine.wait_for_clients(min(c.engine.quorum, len(known)), c.engine.patience_s)
    return engine, with_clients(e, [Client.from_dict({"id": id, **values}) for id, values in sorted(known.items())])


def _policy(config: RunConfig, clients: int) -> RoundPolicy:
    count = config.clients.count or clients
    return RoundPolicy(
        deadline_s=config.engine.deadline_s,
        enough=sampling.count(config.clients.fraction, count) if config.engine.oversample > 0 else None,
        form=_FORMS[config.engine.wire],
    )


def node_count(e: Experiment) -> int:
    """How many nodes a run on this machine has."""
    return e.config.engine.nodes or min(2, len(e.clients))


def sampler(e: Experiment) -> Sampler:
    """Who is asked each round: the share of the configuration, and more of them where it asks for more than it needs."""
    c = e.config
    more = 1.0 + (c.engine.oversample if c.engine.name != "inprocess" else 0.0)
    wanted = sampling.count(c.clients.fraction, len(e.clients))
    share = math.ceil(wanted * more) / len(e.clients) if more > 1 else c.clients.fraction
    return fraction(min(1.0, share), c.seed)
