from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedloom.core import Client, State, Work
from fedloom.methods import build
from fedloom.methods.fedlease_clusters import clusters, distances, nearest
from fedloom.rng import generator
from fedloom.state import only

from .cases import RANK, SITES, Sent, after, received, start, visited

METHOD = build({"name": "fedlease_clusters", "warmup": 3, "most": 4}, {"rank": RANK, "alpha": 6.0})


def group_of(*directions: Tensor, spread: float = 0.05, key: int = 0) -> list[dict[str, Tensor]]:
    """B's of two layers, each near one of the directions."""
    rng = generator("groups", key)
    return [
        {site: d[:m].repeat(1, RANK) + spread * torch.randn(m, RANK, generator=rng) for site, (m, _) in SITES.items()}
        for d in directions
    ]


AXES = torch.eye(7)[:, :3, None].unbind(1)


def test_distances_by_hand() -> None:
    """Two layers: 1 - cos is 0 and 1, 2 and 1 - 1/sqrt 2; the mean over layers."""
    one = {"s": torch.tensor([[1.0, 0.0]]), "t": torch.tensor([[1.0, 0.0]])}
    two = {"s": torch.tensor([[5.0, 0.0]]), "t": torch.tensor([[0.0, 2.0]])}
    three = {"s": torch.tensor([[-1.0, 0.0]]), "t": torch.tensor([[3.0, 3.0]])}
    D = distances([one, two, three])
    root = 1 - 0.5**0.5
    want = [[0, 0.5, (2 + root) / 2], [0.5, 0, (2 + root) / 2], [(2 + root) / 2, (2 + root) / 2, 0]]
    torch.testing.assert_close(D, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert nearest({"s": torch.tensor([[2.0, 0.1]]), "t": torch.tensor([[0.1, 3.0]])}, [one, two, three]) == 1


@pytest.mark.parametrize("want", [[0, 1, 0, 1, 1, 0], [0, 1, 2, 0, 1, 2, 0]], ids=["two", "three"])
def test_clusters_are_the_groups_there_are(want: list[int]) -> None:
    got = clusters(distances(group_of(*(AXES[k] for k in want))), 4)
    assert len(set(got)) == len(set(want))
    assert len(set(zip(got, want, strict=True))) == len(set(want)), "the same groups, whatever they are called"


def test_clusters_where_there_is_nothing_to_choose() -> None:
    for count, most in ((1, 4), (2, 4), (5, 1)):
        assert clusters(distances(group_of(*[AXES[k % 2] for k in range(count)])), most) == [0] * count


def uploads(state: State, kinds: dict[str, int], key: int) -> list[Sent]:
    made = group_of(*(AXES[k] for k in kinds.values()), key=key)
    rng = generator("A", key)
    return [
        (
            Client(name, 3 + i, RANK),
            {"A": {s: torch.randn(x.shape, generator=rng) for s, x in state["A"].items()}, "B": B},
        )
        for i, (name, B) in enumerate(zip(kinds, made, strict=True))
    ]


def test_experts_are_plain_means_of_their_clusters_from_then_on() -> None:
    state = start(METHOD)
    kinds = {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0}
    first = uploads(state, kinds, 1)
    placed = after(METHOD, state, first)
    label = {name: int(k) for name, k in placed["cluster"].items()}
    assert label["a"] == label["c"] == label["e"] != label["b"] == label["d"]

    # Then "a" and "b" of the old ones, and two that come late: they are placed, and count from the next round on.
    late = {"a": 0, "b": 1, "x": 1, "y": 0}
    second = uploads(state, late, 2)
    later = after(METHOD, placed, second, 2)
    assert int(later["cluster"]["x"]) == label["b"] and int(later["cluster"]["y"]) == label["a"]
    by = {client.id: x for client, x in first}
    now = {client.id: x for client, x in second}
    for site in SITES:
        for role in ("A", "B"):
            for name, members in (("a", "ace"), ("b", "bd")):
                at = f"{role}{label[name]}"
                torch.testing.assert_close(placed[at][site], torch.stack([by[k][role][site] for k in members]).mean(0))
                assert torch.equal(later[at][site], now[name][role][site])
    for name in "abcdexy":
        served = METHOD.serve(later, Client(name, 1, RANK))
        mine = label["a"] if name in "acey" else label["b"]
        assert served == {"A": later[f"A{mine}"], "B": later[f"B{mine}"]}
    assert METHOD.serve(later, Client("new", 1, RANK)) == only(state, "A", "B")
    assert METHOD.serves_personal_models


def test_a_new_client_trains_on_its_own_first_and_keeps_its_head() -> None:
    state = start(METHOD)
    client, own = Client("a", 1, RANK), only(state, "head")
    down = received(METHOD, state, client)
    passes: list[Work] = []

    def trained(work: Work) -> State:
        passes.append(work)
        return {role: {s: x + 1 for s, x in group.items()} for role, group in work.train.items()}

    sent, kept = visited(METHOD, down, client, trained, own=own)
    assert len(passes) == 3 and set(sent) == {"A", "B"} and set(kept) == {"head"}
    assert all(torch.equal(sent["B"][site], state["B"][site] + 3) for site in SITES)
    assert all(torch.allclose(kept["head"][s], x + 3) for s, x in state["head"].items())
    placed = after(METHOD, state, [(client, sent)])
    passes.clear()
    visited(METHOD, received(METHOD, placed, client, 2), client, trained, own=kept, t=2)
    assert len(passes) == 1
