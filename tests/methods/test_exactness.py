"""What exact methods have in common, and averages of factors have not."""

from __future__ import annotations

import pytest
import torch

from fedloom.core import Client
from fedloom.methods import build
from fedloom.rng import generator
from fedloom.state import only

from .cases import SITES, after, random_uploads, served


def test_exact_methods_agree_and_the_factor_average_does_not() -> None:
    sent = random_uploads([2, 2, 2])
    found = {}
    for name, rank in (("fedex_lora", 2), ("flexlora", 6), ("fedit", 2)):
        # Every client's scale is that of its rank, 2, in all three.
        method = build({"name": name}, {"rank": rank, "alpha": 6.0})
        first = method.init(SITES, generator(0))
        found[name] = served(method, after(method, first, sent), Client("x", 1, rank), SITES)
    for site in SITES:
        # The rank of D is 6: no layer is smaller than 5, and all of it is served.
        torch.testing.assert_close(found["fedex_lora"][site], found["flexlora"][site], rtol=1e-8, atol=1e-8)
        assert (found["fedit"][site] - found["fedex_lora"][site]).norm() > 0.1 * found["fedex_lora"][site].norm()


@pytest.mark.parametrize("name, changes", [("flexlora", False), ("fedit", True), ("fedex_lora", False)])
def test_gauge(name: str, changes: bool) -> None:
    """(B R, R^-1 A) is the same client model: a sum of products does not see it, a mean of factors does.

    FedEx averages factors too, but its residual makes up for it.
    """
    method = build({"name": name}, {"rank": 3})
    first = method.init(SITES, generator(0))
    plain = random_uploads([3, 3])
    turned = []
    for i, (client, state) in enumerate(plain):
        R = torch.linalg.qr(torch.randn(3, 3, generator=generator("R", i), dtype=torch.float64))[0] * (i + 2)
        A = {s: torch.linalg.inv(R) @ x for s, x in state["A"].items()}
        turned.append((client, {"A": A, "B": {s: x @ R for s, x in state["B"].items()}}))
    a, b = (served(method, after(method, first, x), Client("x", 1, 3), SITES) for x in (plain, turned))
    for site in SITES:
        assert torch.allclose(a[site], b[site], rtol=1e-8, atol=1e-8) != changes


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "flexlora", "fedex_lora"])
def test_a_common_factor_of_all_weights_does_not_matter(name: str) -> None:
    method = build({"name": name}, {"rank": 3})
    first = method.init(SITES, generator(0))
    plain = random_uploads([3, 3])
    if name == "ffa_lora":
        plain = [(client, only(state, "B")) for client, state in plain]
    more = [(Client(client.id, 8 * client.examples, 3), state) for client, state in plain]
    a, b = after(method, first, plain), after(method, first, more)
    for site in SITES:
        torch.testing.assert_close(a["B"][site], b["B"][site], rtol=1e-12, atol=1e-12)
