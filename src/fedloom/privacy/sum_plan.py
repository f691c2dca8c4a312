"""What a secure sum is of: weights, layout, and the numbers that too few clients train. Public, and the server's to make."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fedloom.core import Client, Each, Exchange, Method, State
from fedloom.errors import MethodError, RoundError
from fedloom.privacy.client_level import ClientLevel
from fedloom.privacy.client_noise import NoiseShares, noisy_terms
from fedloom.privacy.cover import covered
from fedloom.privacy.exchange import Terms
from fedloom.privacy.fixed_point import FixedPoint, Layout
from fedloom.privacy.secret import joined
from fedloom.spec import reject_reason
from fedloom.state import Sites, only


@dataclass(frozen=True)
class Rule:
    """What a run says of its sums: the same at the server and at every client."""

    least: int = 3
    """Clients of the smallest sum that is opened."""
    cover: int = 3
    """Clients that must train a coordinate; the others leave it as it was."""
    limit: float = 65536.0
    """Largest size of a number that a client sends, times its share of the largest weight."""
    bits: Literal[32, 64] = 64

    def terms(self, run: str, t: int, part: int, keys: Mapping[str, bytes], attempt: bytes, about: bytes) -> Terms:
        """The terms of one sum of those who have these keys."""
        grid = FixedPoint(len(keys), self.limit, self.bits)
        return Terms(run, t, keys, grid, part, attempt, self.least, about)


@dataclass(frozen=True)
class SumPlan:
    """One sum, as the server plans it."""

    terms: Terms
    shares: dict[str, float]
    """Client id -> its weight over the largest one."""
    thin: Tensor
    """(d,) bool: trained by fewer clients than a sum needs."""
    layout: Layout
    largest: float
    """The largest weight."""
    noise: NoiseShares | None = None
    """What each client adds to its words, if clients add noise."""

    def sizes(self) -> dict[str, int]:
        """Role -> bytes of its words."""
        found: dict[str, int] = {}
        for role, _, shape, _ in self.layout.leaves:
            found[role] = found.get(role, 0) + self.terms.fixed.bits // 8 * math.prod(shape)
        return found

    def state(self, words: Tensor) -> State:
        """The sum of weight * spread(upload) from the opened words."""
        return self.layout.state(self.terms.fixed.decode(words) * self.largest)


def planned(
    method: Method,
    x: Exchange[Any],
    clients: Sequence[Client],
    sites: Sites,
    rule: Rule,
    run: str,
    t: int,
    part: int,
    keys: Mapping[str, bytes],
    attempt: bytes | None = None,
) -> SumPlan:
    """The plan of a sum of these clients; `attempt` is that of one that was begun. Raises MethodError or RoundError where
    no sum can be."""
    if isinstance(x, Each):
        raise MethodError(f"{method.name} awaits Each: it reads every upload, and a secure sum hides them")
    weights = {client.id: x.weight(client) for client in clients}
    largest = max(weights.values())
    shares = {key: weight / largest for key, weight in weights.items()}
    layout, cover = _cover(method, x, clients, sites, t)
    thin = _thin(method, x, clients, rule, t, cover)
    about = about_sum(shares, thin, layout.digest)
    terms = rule.terms(run, t, part, keys, attempt or os.urandom(16), about)
    noise = None
    if isinstance(method, ClientLevel) and method.noise == "clients" and method.noise_multiplier > 0:
        reach = method.reach(x.send(clients[0]))
        terms, noise = noisy_terms(terms, method.noise_multiplier, reach, (cover > 0) & ~thin)
    return SumPlan(terms, shares, thin, layout, largest, noise)


def about_sum(shares: Mapping[str, float], thin: Tensor, layout: bytes) -> bytes:
    """A digest of what clients are told of a sum besides its keys: who was told another one has other masks."""
    told = [part for key, share in sorted(shares.items()) for part in (key, repr(share))]
    return hashlib.sha256(joined(*told, thin.numpy().tobytes(), layout)).digest()


def _cover(method: Method, x: Exchange[Any], clients: Sequence[Client], sites: Sites, t: int) -> tuple[Layout, Tensor]:
    """The sum's layout, and how many clients train each coordinate."""
    layout: Layout | None = None
    cover: Tensor | None = None
    for client in clients:
        wide = covered(method, x, client, t, sites)
        layout = layout or Layout.of(wide)
        there = layout.vector(wide)
        cover = there if cover is None else cover + there
    assert cover is not None and layout is not None
    return layout, cover


def _thin(method: Method, x: Exchange[Any], clients: Sequence[Client], rule: Rule, t: int, cover: Tensor) -> Tensor:
    """Which coordinates some clients train, but fewer than a sum needs. Raises RoundError if they cannot be left out."""
    least = min(rule.cover, len(clients))
    thin = (cover > 0) & (cover < least)
    if thin.any() and (why := _not_skipped(x, clients)):
        raise RoundError(
            f"round {t}: {int(thin.sum())} of {len(thin)} coordinates are trained by fewer than {least} clients "
            f"(privacy.min_cover), whom a sum would tell apart, and {method.name} cannot leave them out "
            f"({why}): give clients larger budgets"
        )
    return thin


def _not_skipped(x: Exchange[Any], clients: Sequence[Client]) -> str | None:
    for client in clients:
        received = x.send(client)
        wanted = x.expects(client, received)
        if why := reject_reason(wanted, only(received, *wanted)):
            return why
    return None
