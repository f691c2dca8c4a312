"""Keys of a secure sum: an identity that lasts (Ed25519), a key for one run (X25519), and what is derived from two of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedloom.disk import disk_errors
from fedloom.errors import ConfigError, RoundError, RunError

PREFIX = "ed25519:"


def joined(*parts: str | int | bytes) -> bytes:
    """One byte string from several, each after its length: two lists never give the same one."""
    made = b""
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        made += len(data).to_bytes(4, "big") + data
    return made


def derive(secret: bytes, *context: str | int | bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869) of a secret for one purpose."""
    return HKDF(hashes.SHA256(), length, salt=None, info=joined(*context)).derive(secret)


def secret_file(path: Path) -> bytes:
    """The 32 secret bytes in a file that its owner alone may read; made from the operating system's randomness if missing."""
    with disk_errors(path):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes()
            if len(key) != 32:
                raise RunError(f"{path} has {len(key)} bytes, expected a key of 32: restore it from a copy") from None
            return key
        with os.fdopen(handle, "wb") as file:
            key = os.urandom(32)
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        return key


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
