"""Keys of a secure sum: an identity that lasts (Ed25519) and a key for one run (X25519)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedloom.errors import ConfigError, RoundError
from fedloom.privacy.secret import joined

PREFIX = "ed25519:"


@dataclass(frozen=True)
class RunKey:
    """The X25519 key of one client for one run."""

    secret: bytes = field(default_factory=lambda: os.urandom(32), repr=False)

    @property
    def public(self) -> bytes:
        """32 bytes, for everybody."""
        return X25519PrivateKey.from_private_bytes(self.secret).public_key().public_bytes_raw()

    def shared(self, other: bytes) -> bytes:
        """The secret that this key's owner shares with the owner of another one. Raises RoundError for no valid key."""
        try:
            return X25519PrivateKey.from_private_bytes(self.secret).exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError as error:
            raise RoundError(f"the key {other.hex()!r} of a peer is none of X25519 ({error})") from None


@dataclass(frozen=True)
class Identity:
    """Who a client is, in every run: the Ed25519 key that signs its run keys."""

    secret: bytes = field(default_factory=lambda: os.urandom(32), repr=False)

    @property
    def name(self) -> str:
        """`ed25519:` and 64 hexadecimal digits, for a roster."""
        return PREFIX + Ed25519PrivateKey.from_private_bytes(self.secret).public_key().public_bytes_raw().hex()

    def sign(self, run: str, client: str, key: bytes) -> bytes:
        """The signature, 64 bytes, of a client's public key for a run."""
        return Ed25519PrivateKey.from_private_bytes(self.secret).sign(_statement(run, client, key))


def _statement(run: str, client: str, key: bytes) -> bytes:
    return joined("fedloom-key-1", run, client, key)


Roster = Mapping[str, str]
"""Client id -> identity."""


def check_roster(roster: Roster) -> None:
    """Raise ConfigError naming the first client whose identity is none."""
    for client, name in roster.items():
        digits = name.removeprefix(PREFIX)
        if digits == name or len(digits) != 64 or set(digits) - set("0123456789abcdef"):
            raise ConfigError(
                f"the roster has {name!r} for client {client!r}, expected {PREFIX} and 64 hexadecimal digits: copy the line "
                "that the client's node printed"
            )


def check_signature(roster: Roster, run: str, client: str, key: bytes, signature: bytes) -> None:
    """Raise RoundError unless a client of the roster signed this key for this run."""
    if client not in roster:
        raise RoundError(f"client {client!r} is not in the roster: add its identity, at every site")
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(roster[client].removeprefix(PREFIX)))
    try:
        public.verify(signature, _statement(run, client, key))
    except InvalidSignature:
        raise RoundError(
            f"the key of client {client!r} is not signed by its identity {roster[client]}: it was made for another run, or "
            "somebody swapped it"
        ) from None
