"""Secret bytes: kept in a file, and derived from one another.

Everything that trains imports this, and `cryptography` is of an extra: it is imported by what needs it.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedloom.disk import disk_errors
from fedloom.errors import RunError


def joined(*parts: str | int | bytes) -> bytes:
    """One byte string from several, each after its length: two lists never give the same one."""
    made = b""
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        made += len(data).to_bytes(4, "big") + data
    return made


def derive(secret: bytes, *context: str | int | bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869) of a secret for one purpose."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

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
