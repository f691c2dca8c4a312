from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, Method, Trained, Visit, Work
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.rng import generator
from fedloom.state import State

from .cases import EXAMPLES, HEAD_BYTES, INS, OUTS, RANK, SITES, ToyTrainer, after, engine, start, state, visited

FIRST = state([[1.0, 2.0]], [[1.0], [0.0], [2.0]])
CLIENT = Client("a", 1, 1)
CLIENTS = [Client(k, n, RANK) for k, n in EXAMPLES.items()]


def quantise(lora: dict[str, int] | None = None, **fields: object) -> Method:
    return build({"name": "quantise", **fields}, lora or {"rank": 1})


def change(A: list[list[float]], B: list[list[float]]) -> object:
    moved = state(A, B)

    def trained(work: Work) -> State:
        return {r: {s: x + moved[r][s] for s, x in group.items()} for r, group in work.train.items()}

    return trained


def test_quantise_by_hand() -> None:
    """8 bits: the largest entry is 127 steps. What was rounded off is kept, and given back with the next upload."""
    method = quantise()
    trained = change([[12.7, -0.27]], [[0.0], [0.0], [0.0]])
    sent, kept = visited(method, FIRST, CLIENT, trained)  # type: ignore[arg-type]
    assert sent["A"]["s"].dtype == torch.int8 and sent["A"]["s"].tolist() == [[127, -3]]
    torch.testing.assert_close(sent["step_A"]["s"], torch.tensor([0.1]))
    torch.testing.assert_close(kept["error_A"]["s"], torch.tensor([[0.0, 0.03]]), rtol=0, atol=1e-6)
    assert sent["B"]["s"].tolist() == [[0], [0], [0]] and not kept["error_B"]["s"].any()
    new = after(method, FIRST, [(CLIENT, sent)])
    torch.testing.assert_close(new["A"]["s"], torch.tensor([[13.7, 1.7]]))
    assert new["B"]["s"].tolist() == FIRST["B"]["s"].tolist()
    again, _ = visited(method, FIRST, CLIENT, trained, own=kept)  # type: ignore[arg-type]
    assert again["A"]["s"].tolist() == [[127, -2]]


def test_four_bits_share_a_byte() -> None:
    """Seven levels a side: 7, -3 in steps of 1 are 15 and 5 after adding 8."""
    method = quantise(bits=4)
    sent, _ = visited(method, FIRST, CLIENT, change([[7.0, -3.0]], [[-7.0], [3.0], [6.4]]))  # type: ignore[arg-type]
    assert sent["A"]["s"].tolist() == [15 | 5 << 4]
    assert sent["B"]["s"].dtype == torch.uint8 and len(sent["B"]["s"]) == 2
    new = after(method, FIRST, [(CLIENT, sent)])
    assert new["A"]["s"].tolist() == [[8.0, -1.0]]
    assert new["B"]["s"].tolist() == [[-6.0], [3.0], [8.0]]


def test_stochastic_rounding_is_right_on_average() -> None:
    method = quantise({"rank": 8}, rounding="stochastic", feedback=False)
    sites = {"s": (50, 40)}
    received: State = {"A": {"s": torch.zeros(8, 40)}, "B": {"s": torch.zeros(50, 8)}}
    x = torch.randn(8, 40, generator=generator("x"))
    total, n = torch.zeros(8, 40), 400
    for i in range(n):
        visit = Visit(1, Client("a", 1, 8), sites, generator("draw", i))
        flow = method.client(received, {}, visit)
        work = flow.send(None)
        assert isinstance(work, Work)
        with pytest.raises(StopIteration) as stop:
            flow.send(Trained({"A": {"s": x}, "B": work.train["B"]}, 1, 1.0, 0.0))
        sent = stop.value.value[0]
        total += sent["A"]["s"] * sent["step_A"]["s"]
        step = float(sent["step_A"]["s"])
        assert float((sent["A"]["s"] * step - x).abs().max()) <= step * 1.0001
    # Each draw is off by at most a step with deviation below step / 2: five deviations of the mean.
    assert float((total / n - x).abs().max()) < 5 * step / 2 / n**0.5
    assert float((x / step).frac().abs().max()) > 0.1, "nearest would be biased here"


@pytest.mark.parametrize("bits, bound", [(8, 0.003), (4, 0.05)])
def test_feedback_keeps_the_federation_near_full_precision(bits: int, bound: float) -> None:
    """The distance from what is learnt at full precision, relative to all that is learnt, after ten rounds of SGD."""
    lora = {"rank": RANK}
    trainer = ToyTrainer(optimizer="sgd", lr=0.05)
    plain = build({"name": "fedit"}, lora)
    first = start(plain)
    want = federate(plain, engine(trainer), first, CLIENTS, 10)

    def off(feedback: bool) -> float:
        method = quantise(lora, bits=bits, feedback=feedback)
        got = federate(method, engine(trainer), first, CLIENTS, 10)
        return max(float((got["B"][s] - want["B"][s]).norm() / (want["B"][s] - first["B"][s]).norm()) for s in SITES)

    assert off(True) < bound and off(True) < 0.5 * off(False)


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_up_are_a_quarter_or_an_eighth(bits: int) -> None:
    method = quantise({"rank": RANK}, bits=bits)
    _, record = one_round(method, engine(), start(method), CLIENTS, 1)
    full = 4 * RANK * (OUTS + INS) + HEAD_BYTES
    steps = 4 * (2 * len(SITES) + 2)
    for down, up in record.per_client.values():
        assert down == full and 0 <= up - steps - full * bits // 32 <= 3  # an odd number of them ends in half a byte


def test_an_upload_that_is_not_finite_is_dropped() -> None:
    method = quantise(feedback=False)
    sent, _ = visited(method, FIRST, CLIENT, change([[float("nan"), 1.0]], [[0.0], [0.0], [0.0]]))  # type: ignore[arg-type]
    assert sent["step_A"]["s"].isnan().all() and sent["A"]["s"].dtype == torch.int8


def test_feedback_needs_clients_that_train_the_same_tensors() -> None:
    method = quantise({"rank": 4}, over={"name": "fslora"})
    with pytest.raises(
        ConfigError, match=r"got rank 2 for client 'a': remove ranks from .clients., or set feedback = false"
    ):
        method.check(Client("a", 1, 2))
    quantise({"rank": 4}, over={"name": "fslora"}, feedback=False).check(Client("a", 1, 2))


def test_sizes_that_the_client_chooses_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="quantise cannot go over hetlora: of what comes back A/first has a size that the client chooses",
    ):
        quantise({"rank": 4}, over={"name": "hetlora"})
