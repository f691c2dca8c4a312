"""Secure sums of a run on many machines: what its nodes and its server bring, and the roster of who they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom import disk, toml
from fedloom.errors import ConfigError
from fedloom.privacy.secret import secret_file
from fedloom.runs.config import RunConfig

if TYPE_CHECKING:
    from fedloom.flower.node_sums import NodeSums
    from fedloom.flower.remote_sums import RemoteSums
    from fedloom.privacy.keys import Identity
    from fedloom.privacy.sum_plan import Rule

UNAUTHENTICATED = (
    "privacy.roster is not set: the keys of secure sums are not authenticated, and the server is trusted not to swap them "
    "(docs/privacy.md)"
)
ONE_USER = "secure sums on one machine are a test bed: the keys of all clients are yours"


def wanted(config: RunConfig) -> bool:
    """Whether uploads leave in secure sums alone."""
    return config.privacy is not None and config.privacy.secure_aggregation


def warning(config: RunConfig) -> str | None:
    """What a run's secure sums do not protect from, if anything."""
    if not wanted(config):
        return None
    if config.engine.superlink is None:
        return ONE_USER
    return UNAUTHENTICATED if roster(config) is None else None


def rule(config: RunConfig) -> Rule:
    """What the run file says of sums."""
    from fedloom.privacy.sum_plan import Rule

    c = config.privacy
    assert c is not None
    return Rule(least=c.min_clients, cover=c.min_cover, limit=c.limit, bits=c.bits)


def roster(config: RunConfig) -> dict[str, str] | None:
    """Client id -> identity, from the file that privacy.roster names. Raises ConfigError for what is none."""
    if config.privacy is None or config.privacy.roster is None:
        return None
    from fedloom.privacy.keys import check_roster

    path = Path(config.privacy.roster)
    found = toml.read_toml(
        path, missing=f"privacy.roster: there is no file {path}; each site's line comes from `fedloom identity ID`"
    )
    if wrong := [key for key, value in found.items() if not isinstance(value, str)]:
        raise ConfigError(f'{path}: {wrong[0]} is no text, expected lines such as north = "ed25519:..."')
    check_roster(found)
    return found


def missing(config: RunConfig, clients: Sequence[str]) -> None:
    """Raise ConfigError if the roster lacks one of these clients."""
    named = roster(config)
    if named is not None and (lacks := sorted(set(clients) - named.keys())):
        raise ConfigError(
            f"the roster {config.privacy.roster if config.privacy else ''} lacks {', '.join(lacks)}: add the line that "
            "`fedloom identity` prints there, at the server and at every site"
        )


def identity(folder: Path) -> Identity:
    """Who a site is, in every run: `identity.key` in its folder, made when it is first asked for."""
    from fedloom.privacy.keys import Identity

    return Identity(secret_file(disk.make_folder(folder) / "identity.key"))


def check_identity(config: RunConfig, client: str, found: Identity) -> None:
    """Raise ConfigError unless the roster, if there is one, has this client as who it is."""
    missing(config, [client])
    named = roster(config)
    if named is not None and named[client] != found.name:
        raise ConfigError(
            f"the roster has another identity for {client} than this site's: it has {named[client]}, and this site's line is "
            f'{client} = "{found.name}". Put it there, at the server and at every site, or use the folder with the old key'
        )


def at_node(config: RunConfig, run: str, folder: Path, who: Identity | None) -> NodeSums | None:
    """A node's part. `folder` is of this run at the node; without an identity keys are not signed."""
    if not wanted(config):
        return None
    from fedloom.flower.node_sums import NodeSums

    return NodeSums(rule(config), run, folder, who, roster(config))


def at_server(config: RunConfig, run: str, folder: Path) -> RemoteSums | None:
    """The server's part. `folder` is of this run."""
    if not wanted(config):
        return None
    from fedloom.flower.remote_sums import RemoteSums

    return RemoteSums(rule(config), run, folder, roster(config))


def nonce(config: RunConfig, folder: Path) -> str:
    """What makes a run unlike another one in a directory of the same name: clients open no sum of a round twice."""
    if not wanted(config):
        return ""
    return secret_file(disk.make_folder(folder) / "run.id").hex()
