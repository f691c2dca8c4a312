"""Which numbers of the shared space a client trains: public, of its budgets and seeds alone."""

from __future__ import annotations

from typing import Any

import torch

from fedloom.core import Client, Exchange, Method, State, Visit
from fedloom.rng import generator
from fedloom.spec import zeros
from fedloom.state import Sites


def covered(method: Method, x: Exchange[Any], client: Client, t: int, sites: Sites) -> State:
    """Ones where the client's upload has a part in the sum, zeros elsewhere."""
    received = x.send(client)
    # Random numbers above zero: no sum of them vanishes, whatever `spread` adds up.
    rng = generator("cover")
    probe = {
        role: {site: 0.5 + torch.rand(v.shape, generator=rng, dtype=v.dtype) for site, v in group.items()}
        for role, group in zeros(x.expects(client, received)).items()
    }
    wide = method.spread(probe, received, Visit(t, client, sites))
    return {role: {site: (v != 0).to(v.dtype) for site, v in group.items()} for role, group in wide.items()}
