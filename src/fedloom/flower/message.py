"""One message of bytes: a JSON header and binary parts, with their digest. Strict, without torch, without pickle.

    "FLM1" | sha256 of the rest (32) | header length (4) | number of parts (4) | length of each part (8) | header | parts

Every number is little-endian. Nothing may follow the last part.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from typing import Any

from fedloom.errors import FedloomError

MAGIC = b"FLM1"
_FIXED = struct.Struct("<II")
_MOST_PARTS = 1 << 20


class WireError(FedloomError, ValueError):
    """Bytes that came from another process are not what they should be."""


def pack(header: dict[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """Header and parts as one message."""
    text = json.dumps(header, separators=(",", ":"), allow_nan=True).encode()
    lengths = struct.pack(f"<{len(parts)}Q", *map(len, parts))
    body = [_FIXED.pack(len(text), len(parts)), lengths, text, *parts]
    digest = hashlib.sha256()
    for piece in body:
        digest.update(piece)
    return b"".join([MAGIC, digest.digest(), *body])


def unpack(data: bytes | memoryview) -> tuple[dict[str, Any], list[memoryview]]:
    """Inverse of `pack`; parts are views into `data`. Raises WireError with the reason for anything else."""
    view = memoryview(data)
    start = len(MAGIC) + 32
    if len(data) >= 2 and data[0] == 0x80 and data[1] <= 5:
        raise WireError("a pickle, which is never read: expected a fedloom message")
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise WireError(f"starts with {bytes(view[:4])!r}, expected {MAGIC!r}: no fedloom message")
    if len(data) < start + _FIXED.size:
        raise WireError(f"has {len(data)} bytes, expected at least {start + _FIXED.size}: cut short")
    if hashlib.sha256(view[start:]).digest() != bytes(view[len(MAGIC) : start]):
        raise WireError(f"is damaged: the sha256 of its {len(data)} bytes is not the one it carries")
    text_length, count = _FIXED.unpack_from(data, start)
    at = start + _FIXED.size
    if count > _MOST_PARTS or at + 8 * count > len(data):
        raise WireError(f"claims {count} parts in {len(data)} bytes")
    lengths = struct.unpack_from(f"<{count}Q", data, at)
    at += 8 * count
    if (want := at + text_length + sum(lengths)) != len(data):
        what = "trailing bytes" if want < len(data) else "cut short"
        raise WireError(f"has {len(data)} bytes, expected {want}: {what}")
    try:
        header = json.loads(bytes(view[at : at + text_length]))
    except ValueError as error:
        raise WireError(f"has a header that is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise WireError(f"has a header of type {type(header).__name__}, expected an object")
    at += text_length
    parts = []
    for length in lengths:
        parts.append(view[at : at + length])
        at += length
    return header, parts
