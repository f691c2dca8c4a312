"""The secure sum as two state machines without a network: a party for each client, an aggregator at the server.

Double masking as in Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", 2017/281, with
pair seeds derived from keys that are agreed once a run, as in Flamingo (2308.09883), and shares of a round's seeds, never of
a key. What a client sends is

    y_i = x_i + PRG(b_i) + sum over j > i of PRG(k_ij) - sum over j < i of PRG(k_ij)        modulo 2^bits

and boxes: its seeds b_i and k_ij, split by Shamir's scheme, one share sealed for each neighbour. In a second message the
server asks for the shares of b_j of who answered, and of k_jl where l did not: the sum of those who answered, and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, islice

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from torch import Tensor

from fedloom.errors import RoundError
from fedloom.privacy import graph, shamir
from fedloom.privacy.fixed_point import FixedPoint
from fedloom.privacy.keys import RunKey
from fedloom.privacy.masks import SEED, mask
from fedloom.privacy.memory import Memory
from fedloom.privacy.secret import derive, joined

OWN = ""
"""Names a client's own seed beside those that it shares with neighbours."""
TRIES = 500
"""Sets of shares that are tried before a secret counts as lost."""

Shares = dict[str, dict[str, bytes]]
"""Client -> (its neighbour, or OWN) -> a share of that seed."""


@dataclass(frozen=True)
class Terms:
    """What the clients of one sum are told of it. Public."""

    run: str
    t: int
    keys: Mapping[str, bytes]
    """Client id -> public key, of all who are asked."""
    fixed: FixedPoint
    part: int = 0
    """Which exchange of the round it is."""
    attempt: bytes = field(default_factory=lambda: os.urandom(16))
    """The server's, new for each."""
    least: int = 2
    """A client helps to open no sum of fewer."""
    about: bytes = b""
    """A digest of whatever else clients are told of the sum."""

    @cached_property
    def bound(self) -> bytes:
        """The attempt with all the terms in it, 16 bytes: clients that are told different ones share no masks."""
        keys = [part for name, key in sorted(self.keys.items()) for part in (name, key)]
        grid = (self.fixed.count, repr(self.fixed.limit), self.fixed.bits)
        told = joined("fedloom-sum-1", self.run, self.t, self.part, self.attempt, self.least, *grid, self.about, *keys)
        return hashlib.sha256(told).digest()[:16]

    @property
    def context(self) -> tuple[str, int, int, bytes]:
        """What makes this sum unlike any other."""
        return self.run, self.t, self.part, self.bound

    def graph(self) -> tuple[dict[str, list[str]], int]:
        """Neighbours, and shares that open a secret."""
        return graph.neighbours(self.keys, self.bound)


@dataclass(frozen=True)
class Masked:
    """What a client sends in the first message."""

    words: Tensor
    boxes: dict[str, bytes]
    """Neighbour -> the share that is sealed for it."""
    hashes: dict[str, bytes]
    """Neighbour, or OWN -> sha256 of the seed, 16 bytes: whoever combines shares sees that they fit."""


class Party:
    """One client in one secure sum."""

    def __init__(self, me: str, key: RunKey, terms: Terms, memory: Memory) -> None:
        """Raises RoundError for terms that this client must not accept."""
        if terms.keys.get(me) != key.public:
            raise RoundError(f"client {me!r} is asked for a secure sum under a key that is not its own")
        if len(terms.keys) < terms.least:
            raise RoundError(
                f"a sum of {len(terms.keys)} clients, expected at least {terms.least} (privacy.min_clients)"
            )
        self.me, self.terms, self.memory = me, terms, memory
        around, self._threshold = terms.graph()
        self._groups = {j: sorted([j, *around[j]]) for j in sorted([me, *around[me]])}
        self._secrets = {j: key.shared(terms.keys[j]) for j in around[me]}

    def mask(self, words: Tensor, digest: bytes = b"") -> Masked:
        """The words under masks, and the boxes. Once: masks that are used for two uploads open their difference.

        `digest` is of what all clients were sent alike: if the server sent one of them something else, no sum opens.
        """
        self.memory.begin(self.me, *self.terms.context)
        run, t, part, attempt = self.terms.context
        seeds = {OWN: os.urandom(SEED)}
        y = words + mask(seeds[OWN], words)
        for j, secret in self._secrets.items():
            low, high = sorted((self.me, j))
            seeds[j] = derive(secret, "pair", run, t, part, attempt, low, high, digest, length=SEED)
            pair = mask(seeds[j], words)
            y = y + pair if self.me < j else y - pair
        group = self._groups[self.me]
        shares = dict(zip(group, shamir.split(b"".join(seeds.values()), self._threshold, len(group)), strict=True))
        self.memory.keep(self.me, *self.terms.context, shares.pop(self.me))
        boxes = {
            j: self._cipher(self.me, j).encrypt(bytes(12), share, self._about(self.me, j))
            for j, share in shares.items()
        }
        return Masked(y, boxes, {name: fingerprint(seed) for name, seed in seeds.items()})

    def unmask(self, present: Collection[str], boxes: Mapping[str, bytes]) -> Shares:
        """The shares that open the sum of `present`, from the boxes of those neighbours that are in it.

        Raises RoundError, and gives no share, for a set that must not be opened, or a box that does not open.
        """
        there = set(present)
        if self.me not in there:
            raise RoundError(f"client {self.me!r} is asked to open a sum without itself")
        if strange := there - self.terms.keys.keys():
            raise RoundError(f"the sum to open holds {min(strange)!r}, which was not asked")
        if len(there) < max(self.terms.least, 2):
            raise RoundError(f"a sum of {len(there)} clients is not opened, expected at least {self.terms.least}")
        asked = [j for j in self._groups if j in there]
        for j in asked:
            if sum(i in there for i in self._groups[j]) < self._threshold:
                raise RoundError(f"fewer than {self._threshold} of the group of {j!r} are in the sum to open")
        own = self.memory.kept(self.me, *self.terms.context)
        shares = {j: own if j == self.me else self._opened(j, boxes) for j in asked}
        self.memory.answer(self.me, *self.terms.context, there)
        return {j: self._revealed(j, shares[j], names) for j, names in revealed(self.terms, self.me, there).items()}

    def _revealed(self, j: str, share: bytes, names: Collection[str]) -> dict[str, bytes]:
        at = {name: i * SEED for i, name in enumerate(seed_names(j, self._groups[j]))}
        return {name: share[at[name] : at[name] + SEED] for name in names}

    def _opened(self, j: str, boxes: Mapping[str, bytes]) -> bytes:
        if j not in boxes:
            raise RoundError(f"the box of client {j!r} for {self.me!r} is missing")
        try:
            return self._cipher(j, self.me).decrypt(bytes(12), boxes[j], self._about(j, self.me))
        except InvalidTag:
            raise RoundError(
                f"the box of client {j!r} for {self.me!r} does not open: it was changed, or is of another sum"
            ) from None

    def _cipher(self, sender: str, receiver: str) -> ChaCha20Poly1305:
        """Each sum has a key for each direction: the nonce is zero."""
        other = receiver if sender == self.me else sender
        return ChaCha20Poly1305(derive(self._secrets[other], "box", *self.terms.context, sender))

    def _about(self, sender: str, receiver: str) -> bytes:
        return joined(*self.terms.context, sender, receiver)


class Aggregator:
    """The server in one secure sum: it holds one running sum, and the boxes."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.total: Tensor | None = None
        """The sum of what was taken, under masks."""
        self.boxes: dict[str, dict[str, bytes]] = {}
        """Client -> neighbour -> box."""
        self.hashes: dict[str, dict[str, bytes]] = {}
        self._around, self.threshold = terms.graph()

    @property
    def present(self) -> list[str]:
        """Who answered, by id."""
        return sorted(self.boxes)

    def overhead(self, client: str) -> int:
        """Bytes that a client sent beside its words."""
        return sum(map(len, self.boxes[client].values())) + sum(map(len, self.hashes[client].values()))

    def take(self, client: str, masked: Masked) -> None:
        """Add one client's masked words. Raises RoundError for an answer that does not fit."""
        around = set(self._around.get(client, ()))
        if client in self.boxes or not around:
            raise RoundError(f"client {client!r} " + ("sent two uploads" if around else "was not asked"))
        if masked.boxes.keys() != around or masked.hashes.keys() != around | {OWN}:
            raise RoundError(f"client {client!r} sent boxes for others than its neighbours")
        if self.total is not None and (self.total.shape, self.total.dtype) != (masked.words.shape, masked.words.dtype):
            raise RoundError(f"client {client!r} sent {len(masked.words)} words, expected {len(self.total)}")
        self.total = masked.words.clone() if self.total is None else self.total + masked.words
        self.boxes[client], self.hashes[client] = masked.boxes, masked.hashes

    def boxes_for(self, client: str) -> dict[str, bytes]:
        """Sender -> the box that it sealed for this client."""
        return {j: boxes[client] for j, boxes in self.boxes.items() if client in boxes}

    def require_enough(self) -> None:
        """Raise RoundError if no client would open the sum of those who are present."""
        there, least = set(self.boxes), self.terms.least
        if len(there) < least:
            raise RoundError(
                f"round {self.terms.t}: {len(there)} of {len(self.terms.keys)} clients sent a masked upload, expected at least "
                f"{least} (privacy.min_clients). The checkpoint of round {self.terms.t - 1} stands; resume"
            )

    def open(self, answers: Mapping[str, Shares]) -> Tensor:
        """The sum of the words of all who are present. Raises RoundError if too few shares came, or they do not fit."""
        self.require_enough()
        total, there = self.total, set(self.boxes)
        assert total is not None
        for j in self.present:
            total = total - mask(self._seed(j, OWN, answers), total)
            for lost in self._around[j]:
                if lost not in there:
                    pair = mask(self._seed(j, lost, answers), total)
                    total = total - pair if j < lost else total + pair
        return total

    def _seed(self, j: str, name: str, answers: Mapping[str, Shares]) -> bytes:
        group = sorted([j, *self._around[j]])
        shares = {
            at: answers[i][j][name]
            for at, i in enumerate(group, 1)
            if i in answers and len(answers[i].get(j, {}).get(name, b"")) == SEED
        }
        if len(shares) < self.threshold:
            raise RoundError(
                f"{len(shares)} clients gave shares for the mask of {j!r}, expected at least {self.threshold} of {len(group)}"
            )
        for places in islice(combinations(shares, self.threshold), TRIES):
            seed = shamir.combine({at: shares[at] for at in places})
            if hmac.compare_digest(fingerprint(seed), self.hashes[j][name]):
                return seed
        raise RoundError(f"the shares for the mask of {j!r} do not fit what it announced: some were changed")


def shares_size(shares: Shares) -> int:
    """Bytes of the shares that a client gives."""
    return sum(len(share) for by in shares.values() for share in by.values())


def revealed(terms: Terms, client: str, present: Collection[str]) -> dict[str, list[str]]:
    """Whose shares a client gives to open the sum of `present`: of a neighbour who is there its own seed, and those that it
    shares with who is not. In the order of ids."""
    around, there = terms.graph()[0], set(present)
    return {
        j: [name for name in seed_names(j, [j, *around[j]]) if name == OWN or name not in there]
        for j in sorted([client, *around[client]])
        if j in there
    }


def seed_names(j: str, group: Collection[str]) -> list[str]:
    """The seeds of a client in the order in which it splits them."""
    return [OWN, *(i for i in sorted(group) if i != j)]


def fingerprint(seed: bytes) -> bytes:
    """sha256 of a seed, 16 bytes."""
    return hashlib.sha256(seed).digest()[:16]
