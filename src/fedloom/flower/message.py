"""One message of bytes: a JSON header and binary parts, with one digest over all. Strict, without torch, without pickle.

    "FLM2" | sha256 of the rest (32) | header length (4) | number of parts (4) | length of each part (8) | header | parts

Every number is little-endian. Nothing may follow the last part. What a peer wrote is never trusted: JSON is bounded in size
and depth and holds no number that a float64 or a 64-bit integer does not, and text is made printable before anybody shows it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from typing import Any, NoReturn

from fedloom.errors import FedloomError

MAGIC = b"FLM2"
_FIXED = struct.Struct("<II")
_MOST_PARTS = 1 << 16
_LONGEST_JSON = 1 << 23
_DEEPEST_JSON = 16
_LONGEST_INTEGER = 20
_LONGEST_REASON = 200


class WireError(FedloomError, ValueError):
    """Bytes that came from another process are not what they should be."""


def printable(text: object, most: int = _LONGEST_REASON) -> str:
    """What a peer said, fit for a terminal and a log: one line, no control or escape characters, at most so long.

    >>> printable("a\\x1b]0;title\\x07 b\\nc")
    'a ]0;title b c'
    >>> len(printable("x" * 10**6))
    200
    """
    cut = str(text)[: 4 * most]
    line = " ".join("".join(c if c.isprintable() else " " for c in cut).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def dumps(value: Any) -> bytes:
    """A JSON value as bytes. Raises ValueError for NaN and infinite numbers."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def loads(data: bytes | memoryview) -> Any:
    """A JSON value that a peer wrote. Raises WireError if it is none, or too large, too deep, or has numbers beyond reason."""
    if len(data) > _LONGEST_JSON:
        raise WireError(f"has {len(data)} bytes of JSON, expected at most {_LONGEST_JSON}")
    try:
        value = json.loads(bytes(data), parse_int=_integer, parse_float=_real, parse_constant=_constant)
    except RecursionError:
        raise WireError("has JSON that is nested without end") from None
    except WireError:
        raise
    except ValueError as error:
        raise WireError(f"has a header that is no JSON ({printable(error, 80)})") from None
    _shallow(value, _DEEPEST_JSON)
    return value


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER + text.startswith("-"):
        raise WireError(f"has an integer of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    if (value := float(text)) in (float("inf"), float("-inf")):
        raise WireError("has a number that no float holds")
    return value


def _constant(text: str) -> NoReturn:
    raise WireError(f"has {text}, expected finite numbers")


def _shallow(value: Any, left: int) -> None:
    if isinstance(value, list | dict):
        if left == 0:
            raise WireError(f"has JSON nested deeper than {_DEEPEST_JSON}")
        for inner in value.values() if isinstance(value, dict) else value:
            _shallow(inner, left - 1)


def pack(header: dict[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """Header and parts as one message."""
    text = dumps(header)
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
        raise WireError(f"starts with {bytes(view[:4])!r}, expected {MAGIC!r}: no fedloom message of this version")
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
    header = loads(view[at : at + text_length])
    if not isinstance(header, dict):
        raise WireError(f"has a header of type {type(header).__name__}, expected an object")
    at += text_length
    parts = []
    for length in lengths:
        parts.append(view[at : at + length])
        at += length
    return header, parts
