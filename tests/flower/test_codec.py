"""The wire format: what goes in comes out, and what is wrong is refused with its reason."""

from __future__ import annotations

import json
import pickle
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.flower import codec
from fedloom.flower.message import MAGIC, WireError, dumps, loads, pack, printable, unpack
from fedloom.state import State

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


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
    assert codec.encode(codec.decode(codec.encode(state))) == codec.encode(state)


def test_special_numbers_and_views_come_back() -> None:
    x = torch.tensor([[float("nan"), float("inf")], [-0.0, 1e-45]])
    back = codec.decode(codec.encode({"A": {"s": x.T, "t": x[:1], "u": x[:1]}}))["A"]
    assert torch.equal(back["s"].view(torch.int32), x.T.contiguous().view(torch.int32))
    assert back["t"].shape == back["u"].shape == (1, 2)
    assert len(codec.encode({"A": {"s": torch.zeros(1000)[:2]}})) < 200


def test_empty_states_and_roles_come_back() -> None:
    for state in ({}, {"right": {}}, {"right": {}, "left": {"q": torch.ones(2)}}):
        assert codec.decode(codec.encode(state)).keys() == state.keys()
    assert codec.decode(codec.encode({"A": {"a/b": torch.ones(1)}}))["A"].keys() == {"a/b"}


def test_a_decoded_tensor_owns_its_memory() -> None:
    data = codec.encode({"A": {"s": torch.ones(3)}})
    back = codec.decode(data)["A"]["s"]
    back += 1
    assert torch.equal(codec.decode(data)["A"]["s"], torch.ones(3))


def test_bfloat16_rounds_once_and_widens_exactly() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    native = torch.randn(3).bfloat16()
    whole = torch.tensor([[3, 4]], dtype=torch.int8)
    data = codec.encode({"A": {"s": x}, "n": {"seed": torch.tensor([2**62]), "b": native, "w": whole}}, "bfloat16")
    back = codec.decode(data)
    assert back["A"]["s"].dtype == torch.float32 and torch.equal(back["A"]["s"], x.bfloat16().float())
    assert same(codec.decode(codec.encode(back, "bfloat16")), back)
    assert back["n"]["seed"].item() == 2**62
    assert back["n"]["b"].dtype == torch.bfloat16 and torch.equal(back["n"]["b"], native)
    assert len(data) < 2 * x.numel() + 400
    assert torch.equal(codec.decode(codec.encode({"n": {"w": whole, "b": native}}, "int8"))["n"]["w"], whole)


def test_int8_is_within_half_a_step_of_each_row() -> None:
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 16)[:, None]
    x[3] = 0
    back = codec.decode(codec.encode({"A": {"s": x}}, "int8"))["A"]["s"]
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((back - x).abs() <= step * 0.5001).all() and torch.equal(back[3], torch.zeros(40))


def test_int8_does_not_hide_what_the_server_must_see() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = float("inf")
    back = codec.decode(codec.encode({"A": {"s": x}}, "int8"))["A"]["s"]
    assert back[1].isnan().all() and torch.equal(back[0], torch.ones(4))


def test_int8_passes_scalars_and_tensors_without_numbers() -> None:
    state = {"A": {"s": torch.tensor(2.0), "none": torch.zeros(0, 2), "row": torch.zeros(2, 0)}}
    back = codec.decode(codec.encode(state, "int8"))["A"]
    assert back["s"].item() == pytest.approx(2.0) and back["none"].shape == (0, 2) and back["row"].shape == (2, 0)


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


def tensors(metadata: dict[str, str] | None = None, body: bytes = b"", **entries: Any) -> bytes:
    """Bytes in safetensors' format, right or wrong; names have / for their __."""
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    table |= {name.replace("__", "/"): entry for name, entry in entries.items()}
    header = json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + body


def entry(dtype: str, shape: Any, end: int, start: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "no safetensors"),
        (pickle.dumps({"A": 1}), "no safetensors"),
        (pickle.dumps({"A": 1}, protocol=0), "no safetensors"),
        (struct.pack("<Q", 1 << 60), "no safetensors"),
        (tensors(body=b"x"), "no safetensors"),
        (tensors(A__s=entry("F32", [2], 8), body=bytes(7)), "no safetensors"),
        (tensors(A__s=entry("F32", [2], 8), body=bytes(9)), "no safetensors"),
        (tensors(A__s=entry("F32", [2], 4), body=bytes(4)), "no safetensors"),
        (tensors(A__s=entry("object", [2], 8), body=bytes(8)), "no safetensors"),
        (tensors(A__s=entry("F32", [-2], 8), body=bytes(8)), "no safetensors"),
        (tensors(A__s=entry("F32", [1 << 40, 1 << 40], 8), body=bytes(8)), "no safetensors"),
        (tensors(A__s=entry("F32", [0, 1 << 62, 1 << 62], 0)), "no safetensors"),
        (tensors(A__s=entry("F32", [True], 4), body=bytes(4)), "no safetensors"),
        (tensors(A__s=entry("F32", "2", 8), body=bytes(8)), "no safetensors"),
        (tensors(A__s=["F32", [2]]), "no safetensors"),
        (tensors(As=entry("F32", [1], 4), body=bytes(4)), "expected role/site"),
        (tensors(A__=entry("F32", [1], 4), body=bytes(4)), "expected role/site"),
        (tensors(A__s=entry("BOOL", [1], 1), body=b"\x02"), "neither 0 nor 1"),
        (tensors({"form": "zip"}, A__s=entry("F32", [1], 4), body=bytes(4)), "form 'zip'"),
        (tensors({"form": "int8"}, A__s=entry("I8", [0, 2], 0)), "no float32 step"),
        (tensors({"form": "int8"}, A__s=entry("I8", [2], 2), body=bytes(2)), "no float32 step"),
        (
            tensors({"form": "int8"}, __=entry("F32", [2], 8), A__s=entry("I8", [2], 10, 8), body=bytes(10)),
            "1 steps of",
        ),
        (tensors({"form": "int8"}, __=entry("F16", [1], 2), A__s=entry("I8", [2], 4, 2), body=bytes(4)), "no float32"),
        (tensors({"form": "int8"}, __=entry("F32", [1, 1], 4), A__s=entry("I8", [1], 5, 4), body=bytes(5)), "no float"),
        (tensors(__=entry("F32", [1], 4), body=bytes(4)), "1 steps of no row"),
        (tensors(__A__s=entry("F32", [1], 4), body=bytes(4)), "expected role/site"),
        (tensors({"B/s": "raw"}), "metadata 'B/s' of no tensor"),
        (tensors({"/": "empty"}), "of no tensor"),
        (tensors({"A/": "empty"}, A__s=entry("F32", [1], 4), body=bytes(4)), "of no tensor"),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        codec.decode(data)


@pytest.mark.parametrize("seed", range(30))
def test_any_changed_byte_of_a_message_is_noticed(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    whole = pack({"t": 1}, [codec.encode(random_state(seed))])
    data = bytearray(whole)
    at = int(torch.randint(len(data), (), generator=rng))
    data[at] ^= 1 << int(torch.randint(8, (), generator=rng))
    for wrong in (bytes(data), bytes(data[:at]), whole + b"\0"):
        with pytest.raises(WireError):
            unpack(wrong)


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 3))
def test_any_bytes_are_a_state_or_refused(junk: bytes, at: int, form: int) -> None:
    good = codec.encode({"A": {"s": torch.ones(3, 2)}, "n": {"seed": torch.tensor([1])}}, codec.FORMS[form % 3])
    at %= len(good)
    for data in (junk, good[:at] + junk, good[:at] + junk + good[at + len(junk) :]):
        try:
            state = codec.decode(data)
        except WireError:
            continue
        assert all(torch.is_tensor(x) for group in state.values() for x in group.values())


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(junk: bytes) -> None:
    for data in (junk, MAGIC + junk, pack({"t": 1}, [b"x"]) + junk):
        try:
            header, _ = unpack(data)
        except WireError:
            continue
        assert isinstance(header, dict)


def test_a_role_or_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(WireError, match="safetensors"):
        codec.encode({"A": {"s": torch.zeros(1, dtype=torch.complex128)}})
    with pytest.raises(WireError, match="role 'A/B'"):
        codec.encode({"A/B": {"s": torch.zeros(1)}})


def test_a_message_returns_header_and_parts() -> None:
    header, parts = unpack(pack({"t": 3, "x": [1.5, 2]}, [b"", b"abc"]))
    assert header == {"t": 3, "x": [1.5, 2]} and [bytes(p) for p in parts] == [b"", b"abc"]
    with pytest.raises(WireError, match="expected an object"):
        unpack(pack([1]))  # type: ignore[arg-type]  # what a peer may send
    with pytest.raises(WireError, match="a pickle"):
        unpack(pickle.dumps({"A": 1}))
    with pytest.raises(WireError, match="no fedloom message"):
        unpack(b"")
    with pytest.raises(WireError, match="cut short"):
        unpack(MAGIC)


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"[" * 100_000, "nested"),
        (b"[" * 17 + b"]" * 17, "nested deeper"),
        (b"1" * 400, "400 digits"),
        (b'{"x": -123456789012345678901}', "integer of 22"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"1e999", "no float"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b" " * (1 << 25), "bytes of JSON"),
    ],
)
def test_json_beyond_reason_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        loads(text)


def test_json_of_reason_passes() -> None:
    value = {"a": [2**64 - 1, -(2**63), 1e300, None, True, "\ud800"]}
    assert loads(dumps(value)) == value
    with pytest.raises(ValueError, match="JSON"):
        dumps({"x": float("nan")})


@given(st.text())
def test_what_a_peer_says_is_made_printable(text: str) -> None:
    said = printable(text)
    assert said.isprintable() and len(said) <= 200
