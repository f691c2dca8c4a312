"""The secure sum: exact over whoever is left, for every pattern of drop-outs; what must not be opened is refused."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedloom.errors import ConfigError, RoundError, RunError
from fedloom.privacy import graph
from fedloom.privacy.exchange import OWN, Aggregator, Masked, Party, Shares, Terms
from fedloom.privacy.fixed_point import FixedPoint
from fedloom.privacy.keys import RunKey
from fedloom.privacy.memory import Memory

KEYS = {f"c{i:03d}": RunKey() for i in range(150)}
"""Made once: X25519 is the slow part."""


class Sum:
    """A secure sum of n clients that goes well, to be spoilt by tests."""

    def __init__(self, n: int, bits: int = 64, size: int = 3) -> None:
        self.ids = list(KEYS)[:n]
        keys = {i: KEYS[i].public for i in self.ids}
        grid = FixedPoint(n, 1.0, 64 if bits == 64 else 32)
        self.terms = Terms("run", 1, keys, grid)
        self.memories = {i: Memory() for i in self.ids}
        self.parties = {i: self.party(i) for i in self.ids}
        rng = torch.Generator().manual_seed(n)
        self.words = {i: grid.encode(torch.rand(size, generator=rng) * 2 - 1) for i in self.ids}
        self.server = Aggregator(self.terms)

    def party(self, i: str, terms: Terms | None = None) -> Party:
        return Party(i, KEYS[i], terms or self.terms, self.memories[i])

    def upload(self, *without: str) -> dict[str, Masked]:
        """Everybody masks, but those `without` are not heard."""
        made = {i: self.parties[i].mask(self.words[i]) for i in self.ids if i not in without}
        for i, one in made.items():
            self.server.take(i, one)
        return made

    def answer(self, *without: str) -> dict[str, Shares]:
        """The shares of all who are present but `without`."""
        present = self.server.present
        return {i: self.parties[i].unmask(present, self.server.boxes_for(i)) for i in present if i not in without}

    def plain(self, present: Collection[str]) -> Tensor:
        """The sum that must come out, of Python's integers."""
        bits = self.terms.fixed.bits
        total = [sum(int(self.words[i][k]) for i in present) for k in range(len(next(iter(self.words.values()))))]
        return torch.tensor([(x + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for x in total])


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("n", [2, 3, 10, 30])
def test_the_opened_sum_is_the_plain_sum_bit_for_bit(n: int, bits: int) -> None:
    at = Sum(n, bits, size=17)
    at.upload()
    total = at.server.open(at.answer())
    assert torch.equal(total.long(), at.plain(at.ids))


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_pattern_of_drop_outs(n: int) -> None:
    """Each client is there, lost before its upload, or lost after it: exact if enough are left, else no sum at all."""
    opened = 0
    for pattern in product(("there", "before", "between"), repeat=n):
        at = Sum(n)
        fate = dict(zip(at.ids, pattern, strict=True))
        lost = [i for i, what in fate.items() if what == "before"]
        silent = [i for i, what in fate.items() if what == "between"]
        at.upload(*lost)
        t = graph.threshold(n)
        enough = len(at.server.present) - len(silent) >= t
        try:
            total = at.server.open(at.answer(*silent))
        except RoundError:
            assert not enough, fate
        else:
            assert enough and torch.equal(total, at.plain(at.server.present)), fate
            opened += 1
    assert opened == {3: 7, 4: 9, 5: 11}[n]  # one lost in n places and two ways, or none


def test_a_sparse_graph_with_drop_outs() -> None:
    at = Sum(150)
    around, t = at.terms.graph()
    k, threshold = graph.degree(150)
    assert t == threshold and {len(some) for some in around.values()} == {k} and k < 80
    assert all(i in around[j] for i, some in around.items() for j in some)
    lost, silent = at.ids[3:140:14], at.ids[5:140:14]
    at.upload(*lost)
    assert torch.equal(at.server.open(at.answer(*silent)), at.plain(at.server.present))
    other, _ = replace(at.terms, attempt=bytes(16)).graph()
    assert other != around


def test_degrees_of_sparse_graphs() -> None:
    assert graph.degree(200, 0.05, 0.1) == (24, 11)
    assert graph.degree(200, 0.1, 0.2) == (44, 20)
    assert graph.degree(1000, 0.05, 0.1) == (36, 18)
    with pytest.raises(ConfigError, match="no group of at most 255"):
        graph.degree(300, 0.5, 0.5)


def test_masks_and_boxes_are_small_beside_the_upload() -> None:
    """Below one per cent at 10 clients and 1.8 MB of float32, which are 3.6 MB of 64-bit words."""
    at = Sum(10, size=450_000)
    at.server.take("c000", at.parties["c000"].mask(at.words["c000"]))
    overhead = at.server.overhead("c000")
    assert overhead == 9 * (10 * 16 + 16) + 10 * 16
    assert overhead < 0.01 * 1_800_000


# refusals


def test_a_changed_share_is_seen_and_other_shares_are_used() -> None:
    at = Sum(5)
    at.upload()
    good = at.answer()

    def spoilt(*who: str) -> dict[str, Shares]:
        """The own-seed shares of c000 from these clients, one bit changed."""
        made = {i: {j: dict(by) for j, by in shares.items()} for i, shares in good.items()}
        for i in who:
            share = made[i]["c000"][OWN]
            made[i]["c000"][OWN] = bytes([share[0] ^ 1]) + share[1:]
        return made

    want = at.plain(at.ids)
    assert torch.equal(at.server.open(spoilt("c001")), want)  # 4 of 5 are needed
    with pytest.raises(RoundError, match="the mask of 'c000' do not fit what it announced"):
        at.server.open(spoilt("c001", "c002"))
    with pytest.raises(RoundError, match="3 clients gave shares for the mask of 'c000', expected at least 4 of 5"):
        at.server.open({i: good[i] for i in at.ids[:3]})


@pytest.mark.parametrize("what", ["changed", "swapped", "missing", "of another attempt"])
def test_a_box_that_does_not_open_gives_no_share(what: str) -> None:
    at, other = Sum(4), Sum(4)
    at.upload()
    other.upload()
    boxes = at.server.boxes_for("c000")
    if what == "changed":
        boxes["c001"] = boxes["c001"][:-1] + bytes([boxes["c001"][-1] ^ 1])
    elif what == "swapped":
        boxes["c001"], boxes["c002"] = boxes["c002"], boxes["c001"]
    elif what == "missing":
        del boxes["c001"]
    else:
        boxes["c001"] = other.server.boxes_for("c000")["c001"]
    with pytest.raises(RoundError, match=r"the box of client 'c001' for 'c000' (does not open|is missing)"):
        at.parties["c000"].unmask(at.ids, boxes)


def test_a_swapped_public_key_gives_no_sum() -> None:
    """A server that puts its own key in place of a client's gets boxes that the client cannot open."""
    at = Sum(3)
    false = replace(at.terms, keys=at.terms.keys | {"c001": RunKey().public})
    with pytest.raises(RoundError, match="under a key that is not its own"):
        at.party("c001", false)
    at.parties["c000"] = at.party("c000", false)
    at.upload()
    with pytest.raises(RoundError, match=r"the box of client 'c00[01]' for 'c00[01]' does not open"):
        at.answer()


def test_an_attempt_is_masked_for_once_also_after_a_restart(tmp_path: Path) -> None:
    at = Sum(3)
    path = tmp_path / "secure.json"
    at.memories["c000"] = Memory(path)
    at.party("c000").mask(at.words["c000"])
    at.memories["c000"] = Memory(path)
    with pytest.raises(RoundError, match="has masked for this attempt before"):
        at.party("c000").mask(at.words["c000"])
    path.write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        Memory(path)


def test_a_client_restarted_between_the_messages_answers_and_again_for_the_same_set(tmp_path: Path) -> None:
    at = Sum(3)
    path = tmp_path / "secure.json"
    at.memories["c000"] = Memory(path)
    at.parties["c000"] = at.party("c000")
    at.upload()
    at.memories["c000"] = Memory(path)
    at.parties["c000"] = at.party("c000")
    first = at.answer()
    at.memories["c000"] = Memory(path)
    at.parties["c000"] = at.party("c000")
    assert at.answer() == first
    assert torch.equal(at.server.open(first), at.plain(at.ids))
    assert json.loads(path.read_text()).keys() == {"shares", "opened"}


def test_a_second_set_is_refused_and_so_is_a_second_attempt_after_the_first_was_opened() -> None:
    at = Sum(4)
    at.upload()
    at.answer()
    with pytest.raises(RoundError, match="opens no second one: the difference of two sums is what one client sent"):
        at.parties["c000"].unmask(at.ids[:3], at.server.boxes_for("c000"))
    again = replace(at.terms, attempt=bytes(16))
    with pytest.raises(RoundError, match="it masks for no second one"):
        at.party("c000", again).mask(at.words["c000"])


@pytest.mark.parametrize(
    "present, why",
    [
        (["c001", "c002", "c003"], "without itself"),
        (["c000", "c001", "c002", "x"], "holds 'x', which was not asked"),
        (["c000"], "a sum of 1 clients is not opened"),
        (["c000", "c001"], "fewer than 3 of the group of 'c000'"),
    ],
)
def test_sets_that_must_not_be_opened(present: list[str], why: str) -> None:
    at = Sum(4)
    at.upload()
    with pytest.raises(RoundError, match=why):
        at.parties["c000"].unmask(present, at.server.boxes_for("c000"))
    at.answer()  # nothing was given away: the real set opens


def test_sums_below_min_clients_are_refused() -> None:
    at = Sum(3)
    at.terms = replace(at.terms, least=3)
    at.parties = {i: at.party(i) for i in at.ids}
    at.server = Aggregator(at.terms)
    at.upload("c002")
    with pytest.raises(RoundError, match="a sum of 2 clients is not opened, expected at least 3"):
        at.answer()
    with pytest.raises(RoundError, match="2 of 3 clients sent a masked upload, expected at least 3"):
        at.server.open({})
    few = replace(at.terms, keys={i: at.terms.keys[i] for i in at.ids[:2]})
    with pytest.raises(RoundError, match=r"a sum of 2 clients, expected at least 3 \(privacy.min_clients\)"):
        at.party("c000", few)


def test_a_client_opens_only_what_it_masked_for() -> None:
    at = Sum(3)
    at.upload("c002")
    at.parties["c002"] = at.party("c002", replace(at.terms, attempt=bytes(16)))
    with pytest.raises(RoundError, match="asked to open a sum that it did not mask for"):
        at.parties["c002"].unmask(at.ids, at.server.boxes_for("c002"))


def test_answers_that_do_not_fit_are_refused() -> None:
    at = Sum(3, size=4)
    made = at.upload("c002")
    with pytest.raises(RoundError, match="'c000' sent two uploads"):
        at.server.take("c000", made["c000"])
    with pytest.raises(RoundError, match="'x' was not asked"):
        at.server.take("x", made["c000"])
    late = at.parties["c002"].mask(at.words["c002"][:2])
    with pytest.raises(RoundError, match="'c002' sent 2 words, expected 4"):
        at.server.take("c002", late)
    with pytest.raises(RoundError, match="boxes for others than its neighbours"):
        at.server.take("c002", replace(late, boxes={}))


def test_clients_that_were_sent_different_models_give_no_sum() -> None:
    at = Sum(3)
    for i in at.ids:
        at.server.take(i, at.parties[i].mask(at.words[i], digest=b"other" if i == "c001" else b"same"))
    assert not torch.equal(at.server.open(at.answer()), at.plain(at.ids))


def test_shares_that_are_revealed_are_those_that_open_the_sum_and_no_other() -> None:
    """Never both the own seed of a client and a seed that it shares: the two together would open its upload."""
    at = Sum(5)
    at.upload("c004")
    for i, shares in at.answer().items():
        assert shares.keys() == set(at.ids[:4]), i
        assert all(by.keys() == {OWN, "c004"} for by in shares.values())
