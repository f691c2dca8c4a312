"""A secure sum on the wire: its terms in a message's header; masked words, boxes and shares as tensors of bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.flower.message import WireError, printable
from fedloom.privacy.exchange import OWN, Masked, Shares, Terms, revealed
from fedloom.privacy.masks import SEED
from fedloom.privacy.sum_plan import Rule, SumPlan, about_sum
from fedloom.state import State

KEY, SIGNATURE, DIGEST = 32, 64, 16
"""Bytes of an X25519 key, of an Ed25519 signature, and of the digests here."""
_TAG = 16
_MOST_NUMBERS = 1 << 34

Keys = Mapping[str, tuple[bytes, bytes]]
"""Client id -> (public key for the run, its signature, which is empty without an identity)."""


def header(plan: SumPlan, keys: Keys) -> dict[str, Any]:
    """What every client of a sum is told, the same to all."""
    return {
        "attempt": plan.terms.attempt.hex(),
        "part": plan.terms.part,
        "keys": keys_header({key: keys[key] for key in plan.terms.keys}),
        "shares": plan.shares,
        "layout": plan.layout.digest.hex(),
        "size": len(plan.thin),
        "thin": bool(plan.thin.any()),
    }


def thin_part(plan: SumPlan) -> list[bytes]:
    """Which numbers are not summed, a bit each: a part of the message if there are any."""
    return [np.packbits(plan.thin.numpy()).tobytes()] if plan.thin.any() else []


def keys_header(keys: Keys) -> dict[str, list[str]]:
    """Keys as JSON."""
    return {client: [public.hex(), signature.hex()] for client, (public, signature) in keys.items()}


def read_keys(said: object) -> dict[str, tuple[bytes, bytes]]:
    """Inverse of `keys_header`. Raises WireError."""
    if not isinstance(said, dict):
        raise WireError("announced no keys")
    found = {}
    for client, pair in said.items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise WireError(f"has no key and signature of {printable(client, 70)}")
        public, signature = _bytes(pair[0], KEY), _bytes(pair[1], SIGNATURE if pair[1] else 0)
        found[str(client)] = public, signature
    return found


@dataclass(frozen=True)
class Told:
    """What a client was told of a sum."""

    terms: Terms
    keys: Keys
    shares: dict[str, float]
    thin: Tensor
    """(size,) bool."""
    layout: bytes


def read(said: object, rule: Rule, run: str, t: int, thin: memoryview | None) -> Told:
    """What a header and its part say of a sum, under this client's own rule. Raises WireError."""
    if not isinstance(said, dict):
        raise WireError("says nothing of the sum that it is for (privacy.secure_aggregation)")
    keys = read_keys(said.get("keys"))
    shares, size, part = said.get("shares"), said.get("size"), said.get("part")
    if not isinstance(shares, dict) or shares.keys() != keys.keys() or not all(map(_is_share, shares.values())):
        raise WireError("has no share, above 0 and at most 1, for each client of the sum")
    if type(size) is not int or not 0 <= size <= _MOST_NUMBERS or type(part) is not int or not 0 <= part < 1 << 16:
        raise WireError("has no size or part of the sum")
    mask = torch.zeros(size, dtype=torch.bool)
    if thin is not None:
        if len(thin) != math.ceil(size / 8):
            raise WireError(f"has {len(thin)} bytes that say what is not summed, expected {math.ceil(size / 8)}")
        mask = torch.from_numpy(np.unpackbits(np.frombuffer(thin, np.uint8), count=size)).bool()
    layout = _bytes(said.get("layout"), DIGEST)
    public = {client: key for client, (key, _) in keys.items()}
    about = about_sum(shares, mask, layout)
    terms = rule.terms(run, t, part, public, _bytes(said.get("attempt"), DIGEST), about)
    return Told(terms, keys, shares, mask, layout)


def _is_share(x: object) -> bool:
    return isinstance(x, float) and 0.0 < x <= 1.0


def _bytes(text: object, length: int) -> bytes:
    try:
        found = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        found = b""
    if len(found) != length or not isinstance(text, str):
        raise WireError(f"has {printable(repr(text), 40)}, expected {length} bytes in hexadecimal digits")
    return found


# tensors


def masked_state(masked: Masked) -> State:
    """What a client sends in the first message: boxes and hashes in the order of ids, its own hash first."""
    return {
        "words": {"y": masked.words},
        "boxes": {"b": rows([masked.boxes[j] for j in sorted(masked.boxes)])},
        "hashes": {"h": rows([masked.hashes[j] for j in sorted(masked.hashes)])},
    }


def read_masked(state: State, client: str, terms: Terms, size: int) -> Masked:
    """Inverse of `masked_state`. Raises WireError."""
    around = sorted(terms.graph()[0].get(client, []))
    words = _tensor(state, "words", "y", terms.fixed.dtype, (size,))
    boxes = _tensor(state, "boxes", "b", torch.uint8, (len(around), box_length(len(around))))
    hashes = _tensor(state, "hashes", "h", torch.uint8, (len(around) + 1, DIGEST))
    return Masked(
        words,
        dict(zip(around, split(boxes), strict=True)),
        dict(zip([OWN, *around], split(hashes), strict=True)),
    )


def boxes_state(boxes: Mapping[str, bytes]) -> State:
    """The boxes for one client, in the order of their senders."""
    return {"boxes": {"b": rows([boxes[j] for j in sorted(boxes)])}}


def read_boxes(state: State, client: str, terms: Terms, present: Collection[str]) -> dict[str, bytes]:
    """Inverse of `boxes_state`, from those neighbours of a client who are present. Raises WireError."""
    senders = [j for j in sorted(terms.graph()[0].get(client, [])) if j in present]
    length = box_length(len(terms.graph()[0].get(client, [])))
    return dict(zip(senders, split(_tensor(state, "boxes", "b", torch.uint8, (len(senders), length))), strict=True))


def shares_state(shares: Shares) -> State:
    """The shares that a client gives, in the order of `revealed`."""
    return {"shares": {"s": rows([share for by in shares.values() for share in by.values()])}}


def read_shares(state: State, client: str, terms: Terms, present: Collection[str]) -> Shares:
    """Inverse of `shares_state`. Raises WireError."""
    names = revealed(terms, client, present)
    flat = split(_tensor(state, "shares", "s", torch.uint8, (sum(map(len, names.values())), SEED)))
    left = iter(flat)
    return {j: {name: next(left) for name in some} for j, some in names.items()}


def box_length(neighbours: int) -> int:
    """Bytes of a box: a share of each seed, and the tag."""
    return SEED * (neighbours + 1) + _TAG


def rows(values: list[bytes]) -> Tensor:
    """(n, length) uint8 of byte strings of one length."""
    if not values:
        return torch.zeros(0, 0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).view(len(values), -1)


def split(x: Tensor) -> list[bytes]:
    """Inverse of `rows`."""
    return [row.numpy().tobytes() for row in x]


def _tensor(state: State, role: str, site: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    x = state.get(role, {}).get(site)
    if x is None or x.dtype != dtype or tuple(x.shape) != shape:
        got = "nothing" if x is None else f"{x.dtype} of shape {tuple(x.shape)}"
        raise WireError(f"has {got} as {role}, expected {dtype} of shape {shape}")
    return x
