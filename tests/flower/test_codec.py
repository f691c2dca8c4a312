"""The wire format: what goes in comes out, and what is wrong is refused with its reason."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from fedloom.core import State
from fedloom.engines import codec
from fedloom.engines.envelope import WireError, pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8]


def random_state(seed: int) -> State:
    rng = torch.Generator().manual_seed(seed)
    state: State = {}
    for i in range(int(torch.randint(1, 9, (), generator=rng))):
        axes = int(torch.randint(0, 4, (), generator=rng))
        shape = torch.randint(0, 5, (axes,), generator=rng).tolist()
        dtype = DTYPES[int(torch.randint(len(DTYPES), (), generator=rng))]
        x = torch.randn(shape, generator=rng) * 100
        state.setdefault("ABC"[i % 3], {})[f"layers.{i}.q"] = x.abs().to(dtype)
    return state


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        a[role].keys() == b[role].keys()
        and all(
            x.dtype == b[role][site].dtype and x.shape == b[role][site].shape and torch.equal(x, b[role][site])
            for site, x in a[role].items()
        )
        for role in a
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_state_comes_back_bit_for_bit(seed: int) -> None:
    state = random_state(seed)
    assert same(codec.decode(codec.encode(state)), state)


def test_special_numbers_and_views_come_back() -> None:
    x = torch.tensor([[float("nan"), float("inf")], [-0.0, 1e-45]])
    back = codec.decode(codec.encode({"A": {"s": x.T}}))["A"]["s"]
    assert torch.equal(back.view(torch.int32), x.T.contiguous().view(torch.int32))
    assert codec.decode(codec.encode({})) == {}


def test_a_decoded_tensor_owns_its_memory() -> None:
    data = codec.encode({"A": {"s": torch.ones(3)}})
    back = codec.decode(data)["A"]["s"]
    back += 1
    assert torch.equal(codec.decode(data)["A"]["s"], torch.ones(3))


def test_bfloat16_rounds_once_and_widens_exactly() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    data = codec.encode({"A": {"s": x}, "n": {"seed": torch.tensor([2**62])}}, "bfloat16")
    back = codec.decode(data)
    assert back["A"]["s"].dtype == torch.float32 and torch.equal(back["A"]["s"], x.bfloat16().float())
    assert codec.encode(back, "bfloat16") == data
    assert back["n"]["seed"].item() == 2**62
    assert len(data) < 2 * x.numel() + 300


def test_int8_is_within_half_a_step_of_each_row() -> None:
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 16)[:, None]
    x[3] = 0
    back = codec.decode(codec.encode({"A": {"s": x}}, "int8"))["A"]["s"]
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((back - x).abs() <= step * 0.5001).all() and torch.equal(back[3], torch.zeros(40))


def test_int8_does_not_hide_what_the_guard_must_see() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = float("inf")
    back = codec.decode(codec.encode({"A": {"s": x}}, "int8"))["A"]["s"]
    assert back[1].isnan().all() and torch.equal(back[0], torch.ones(4))


def test_feedback_gives_the_sum_of_many_rounds_what_one_round_loses() -> None:
    rng = torch.Generator().manual_seed(0)
    received = {"A": {"s": torch.randn(4, 30, generator=rng)}}
    whole, with_feedback, without = (torch.zeros(4, 30) for _ in range(3))
    lost: State = {}
    for _ in range(50):
        step = torch.randn(4, 30, generator=rng) * 1e-3
        step[:, 0] = 1.0  # one large entry makes the others smaller than a step
        sent = {"A": {"s": received["A"]["s"] + step}}
        data, lost = codec.Feedback.upload(sent, received, lost)
        with_feedback += codec.Feedback.download(data, received)["A"]["s"] - received["A"]["s"]
        data, _ = codec.Feedback.upload(sent, received, {})
        without += codec.Feedback.download(data, received)["A"]["s"] - received["A"]["s"]
        whole += step
    assert (with_feedback - whole).abs().max() < 2 / 127
    assert (with_feedback - whole).abs().mean() < 0.5 * (without - whole).abs().mean()


def test_losses_fit_only_the_same_slice() -> None:
    one = {"A": {"s": torch.ones(2)}, "sketch": {"seed": torch.tensor([1])}}
    other = {"A": {"s": torch.ones(2)}, "sketch": {"seed": torch.tensor([2])}}
    again = {"A": {"s": torch.zeros(2)}, "sketch": {"seed": torch.tensor([1])}}
    assert codec.marks(one) == codec.marks(again) != codec.marks(other)


def table(*entries: Any, body: bytes = b"") -> bytes:
    return pack({"tensors": list(entries)}, [body])


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "no fedloom message"),
        (b"FLM1", "cut short"),
        (pickle.dumps({"A": 1}), "pickle"),
        (pickle.dumps({"A": 1}, protocol=0), "no fedloom message"),
        (pack({"other": 1}, [b""]), "header keys"),
        (pack({"tensors": {}}, [b""]), "header keys"),
        (pack({"tensors": []}), "0 parts"),
        (pack({"tensors": []}, [b"x"]), "trailing"),
        (table(["A", "s", "float32", "raw", [2]], body=bytes(7)), "needs 8 bytes, 7 are left"),
        (table(["A", "s", "float32", "raw", [2]], body=bytes(9)), "trailing"),
        (table(["A", "s", "object", "raw", [2]]), "dtype 'object'"),
        (table(["A", "s", "complex64", "raw", [2]]), "dtype 'complex64'"),
        (table(["A", "s", ["float32"], "raw", [2]]), "dtype"),
        (table(["A", "s", "float32", "zip", [2]]), "form 'zip'"),
        (table(["A", "s", "int64", "int8", [2]]), "form 'int8' for int64"),
        (table(["A", "s", "float32", "raw", [-2]]), "no tensor has"),
        (table(["A", "s", "float32", "raw", [1 << 50]]), "no tensor has"),
        (table(["A", "s", "float32", "raw", [1 << 30, 1 << 30]]), "no tensor has"),
        (table(["A", "s", "float32", "raw", [True]]), "list of integers"),
        (table(["A", "s", "float32", "raw", "2"]), "list of integers"),
        (table(["A", "s", "float32", "raw", [1] * 9]), "list of integers"),
        (table(["A", "s", "float32", "raw"]), "expected [role"),
        (table("A"), "expected [role"),
        (table([1, "s", "float32", "raw", [0]]), "two names"),
        (table(["", "s", "float32", "raw", [0]]), "two names"),
        (table(["A", "s", "float32", "raw", [0]], ["A", "s", "float32", "raw", [0]]), "twice"),
        (table(["A", "s", "bool", "raw", [1]], body=b"\x02"), "neither 0 nor 1"),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason.replace("[", r"\[")):
        codec.decode(data)


@pytest.mark.parametrize("seed", range(30))
def test_any_changed_byte_is_noticed(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    data = bytearray(codec.encode(random_state(seed)))
    at = int(torch.randint(len(data), (), generator=rng))
    data[at] ^= 1 << int(torch.randint(8, (), generator=rng))
    with pytest.raises(WireError):
        codec.decode(bytes(data))
    with pytest.raises(WireError):
        codec.decode(bytes(data[:at]))
    with pytest.raises(WireError):
        codec.decode(bytes(codec.encode(random_state(seed)) + b"\0"))


def test_a_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(WireError, match="complex64"):
        codec.encode({"A": {"s": torch.zeros(1, dtype=torch.complex64)}})


def test_envelope_returns_header_and_parts() -> None:
    header, parts = unpack(pack({"t": 3, "x": [1.5, float("inf")]}, [b"", b"abc"]))
    assert header == {"t": 3, "x": [1.5, float("inf")]} and [bytes(p) for p in parts] == [b"", b"abc"]
    with pytest.raises(WireError, match="expected an object"):
        unpack(pack([1]))  # type: ignore[arg-type]  # what a peer may send
