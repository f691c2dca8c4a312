from __future__ import annotations

import pytest
import torch

from fedloom import lora
from fedloom.core import Client, State, Visit
from fedloom.methods import build
from fedloom.rng import generator
from fedloom.state import only

from .cases import SITES, after, frozen, random_uploads, served, start, state, update, uploads

LORA = {"rank": 2, "alpha": 3.0}
CLIENT = Client("x", 1, 2)


def test_frlora_by_hand() -> None:
    """W = diag(8, 2), rank 1, scale 2: B0 = A0 = 2 e1, W - s B0 A0 = diag(0, 2). Uploads of mean B [4 4] and A [2 3] add
    2 [8 12; 8 12] - 2 [4 0; 0 0]."""
    method = build({"name": "frlora"}, {"rank": 1, "alpha": 2.0})
    at = method.init_from({"s": (2, 2)}, generator(0), lambda site: torch.diag(torch.tensor([8.0, 2.0])))
    torch.testing.assert_close(at["A"]["s"], torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(at["B"]["s"], torch.tensor([[2.0], [0.0]]))
    torch.testing.assert_close(at["left"]["s"], torch.diag(torch.tensor([-8.0, 0.0])))
    one, two = state([[1.0, 2.0]], [[3.0], [5.0]]), state([[5.0, 6.0]], [[7.0], [1.0]])
    new = after(method, at, uploads((3, one), (1, two)))
    torch.testing.assert_close(new["left"]["s"] - at["left"]["s"], torch.tensor([[8.0, 24.0], [16.0, 24.0]]))
    assert new["A"] is at["A"] and new["B"] is at["B"], "the next round starts from the same factors"


@pytest.mark.parametrize("rslora", [False, True])
def test_the_start_is_the_principal_part_and_the_model_the_original_one(rslora: bool) -> None:
    method = build({"name": "frlora"}, LORA | {"rslora": rslora})
    at = start(method)
    s = lora.scale(3.0, 2, rslora)
    for site, W in frozen().items():
        U, S, Vh = torch.linalg.svd(W)
        want = (U[:, :2] * S[:2]) @ Vh[:2]
        torch.testing.assert_close(s * at["B"][site] @ at["A"][site], want.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            at["B"][site].T @ at["B"][site], at["A"][site] @ at["A"][site].T, rtol=1e-4, atol=1e-5
        )
        assert served(method, at, CLIENT, SITES)[site].abs().max() < 1e-6


def test_every_round_adds_what_the_averaged_factors_changed() -> None:
    method = build({"name": "frlora"}, LORA)
    at: State = start(method, dtype=torch.float64)
    first = only(at, "A", "B")
    for t in (1, 2, 3):
        sent = random_uploads([2, 2, 2], key=t)
        before = served(method, at, CLIENT, SITES)
        at = after(method, at, sent, t)
        total = sum(client.examples for client, _ in sent)
        for site, x in served(method, at, CLIENT, SITES).items():
            A, B = (sum(c.examples / total * u[role][site] for c, u in sent) for role in ("A", "B"))
            want = before[site] + 1.5 * (B @ A - first["B"][site] @ first["A"][site])
            torch.testing.assert_close(x, want, rtol=1e-10, atol=1e-10)
            assert torch.equal(at["A"][site], first["A"][site])


def test_a_wrapper_keeps_the_start() -> None:
    plain, wrapped = build({"name": "frlora"}, LORA), build({"name": "fslora", "over": {"name": "frlora"}}, LORA)
    a, b = start(plain), start(wrapped)
    for role in ("A", "B", "left"):
        for site in a[role]:
            assert torch.equal(a[role][site], b[role][site])
    assert set(b) - set(a) == {"sketch", "idle"}
    model = update(wrapped.model(wrapped.serve(b, CLIENT), {}, Visit(1, CLIENT, SITES)))
    assert all(x.abs().max() < 1e-6 for x in model.values())


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (8, 9)])
def test_principal_triplets_are_those_of_the_dense_svd(shape: tuple[int, int]) -> None:
    rng = generator("principal")
    W = torch.randn(*shape, generator=rng, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    W = (U * 0.8 ** torch.arange(len(S))) @ Vh  # falls by a fifth from one to the next
    U, S, Vh = lora.principal(W, 4, generator(0))
    want = torch.linalg.svd(W)
    torch.testing.assert_close(S, want.S[:4], rtol=1e-9, atol=0)
    torch.testing.assert_close((U * S) @ Vh, (want.U[:, :4] * want.S[:4]) @ want.Vh[:4], rtol=0, atol=1e-7)
    again = lora.principal(W, 4, generator(0))
    assert all(torch.equal(x, y) for x, y in zip((U, S, Vh), again, strict=True))
