"""What is thrown at fedloom, how often, and what became of it: bounded versions of the campaigns of docs/reliability.md.

    python benchmarks/reliability.py [--scale 1.0] [--campaigns federation,uploads,...]

Held is what was promised: a plan or one clear error, a state or a WireError, a message, the bytes of the calm run. A trial that
raises anything else has failed, and the campaign goes on. The generators and oracles are those of the tests.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests import test_screening as screening
from tests.flower import simulated, toys
from tests.flower import test_hostile as hostile_answers
from tests.flower import test_simulated_federation as federation
from tests.flower.direct import Tamper
from tests.methods.cases import CASES, Case, ToyTrainer, engine, flat, start
from tests.runs import test_any_value as run_files

from fedloom.flower import codec, coordinator
from fedloom.flower.message import WireError, pack, unpack
from fedloom.flower.worker import Worker
from fedloom.loop import Record, federate

Trials = Iterator[Callable[[], str]]
"""What each trial does; its result is what became of it, and an exception a broken promise."""


def values(scale: float) -> Trials:
    """Wrong values at any key of a run file."""
    rng = random.Random(1)
    keys = [(key, "fslora") for key in run_files.dotted_keys() if key]
    keys += [(f"method.{field}", method) for method, field in run_files.method_keys()]
    for _ in range(int(4000 * scale)):
        key, method = rng.choice(keys)
        yield partial(run_files.outcome, key, _value(rng), method)


def _value(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(9 if depth else 7)
    if kind < 2:
        return rng.choice([0, -1, 1, 2**40, 2**64, 10**400, rng.randrange(100)])
    if kind < 4:
        return rng.choice([0.0, -0.5, 1e-9, 1e308, float("inf"), float("nan"), rng.random()])
    if kind < 7:
        return rng.choice([True, False, "", "no", ":", "a:b", "../x:Y", "fedit", "[/red]\x1b[2J", "x" * 10**4])
    if kind == 7:
        return [_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["name", "x", "\x1b"]): _value(rng, depth - 1)}


def uploads(scale: float) -> Trials:
    """Absurd uploads of one client of four in eight rounds, with every method: the run without them, bit for bit."""
    for case in CASES[: max(1, int(len(CASES) * scale))]:
        method = case.method()
        without = federate(method, engine(ToyTrainer(), screening.Attacked), start(method), case.clients(), 8)
        for attack in screening.ATTACKS.values():
            yield partial(_attacked, case, attack, flat(without))


def _attacked(case: Case, attack: screening.Attack, without: dict[str, bytes]) -> str:
    method, seen = case.method(), list[Record]()
    at = engine(ToyTrainer(), screening.Attacked)
    at.attack = attack  # type: ignore[attr-defined]
    got = federate(method, at, start(method), case.clients(), 8, on_round=lambda s, r: seen.append(r))
    assert flat(got) == without and all(record.dropped.keys() <= {"b"} for record in seen), case.label
    return "left out"


def tensors(scale: float) -> Trials:
    """Damaged, cut and invented bytes into the decoders of tensors and of messages."""
    rng = random.Random(2)
    state = {"A": {"s": torch.ones(3, 2)}, "n": {"seed": torch.tensor([1])}}
    for _ in range(int(24_000 * scale)):
        data = codec.encode(state, rng.choice(codec.FORMS))
        decode: Callable[[bytes], object] = codec.decode
        if rng.random() < 0.3:
            data, decode = pack({"t": 1, "x": [1, {"a": "b"}]}, [data]), unpack
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) + 1)
            junk = rng.choice([rng.randbytes(rng.randrange(1, 9)), b"[" * 5000, b"9" * 400, b"\xff" * 8, b""])
            data = data[:at] + junk + data[at + rng.choice([0, len(junk), 40]) :]
        yield partial(_read, decode, data)


def _read(decode: Callable[[bytes], object], data: bytes) -> str:
    try:
        decode(data)
    except WireError:
        return "refused"
    return "read"


def answers(scale: float) -> Trials:
    """Hostile answers of one node of four, in each form: it alone is left out."""
    for form in ("raw", "bfloat16", "int8"):
        for tamper in hostile_answers.HOSTILE.values():
            yield partial(_answered, tamper, form)


def _answered(tamper: Tamper, form: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        record, _ = hostile_answers.round_with(tamper, Path(folder), form)
    assert list(record.dropped) == ["a"], record.dropped
    return "left out"


def questions(scale: float) -> Trials:
    """Lies of any JSON in a message to a worker: it answers with a message, and then does its work."""
    rng = random.Random(3)
    head = {"do": "exchange", "session": "s", "t": 1, "exchange": 1, "clients": ["a"], "setup": {"form": "raw"}}
    good = codec.encode(start(hostile_answers.METHOD))
    with tempfile.TemporaryDirectory() as folder:
        worker = toys.sites(hostile_answers.METHOD, hostile_answers.CLIENTS, Path(folder))[0]
        for number in range(1, int(1000 * scale) + 1):
            yield partial(_asked, worker, simulated.hostile(pack(head | {"number": number}, [good]), b"", [b""], rng))
        assert _asked(worker, pack(head | {"session": "new", "number": 1}, [good])) == "answered"


def _asked(worker: Worker, data: bytes) -> str:
    said, _ = unpack(worker.answer(data))
    return "refused" if "refused" in said else "answered"


def federations(scale: float) -> Trials:
    """Seeds of the simulated federation."""
    for seed in range(int(1000 * scale)):
        yield partial(_played, seed)


def _played(seed: int) -> str:
    try:
        played = federation.check(seed)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    return "calm bytes, nobody missing" if not played.missing else "bytes without those recorded as missing"


CAMPAIGNS: dict[str, Callable[[float], Trials]] = {
    "values": values,
    "uploads": uploads,
    "tensors": tensors,
    "answers": answers,
    "questions": questions,
    "federations": federations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--campaigns", default=",".join(CAMPAIGNS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    coordinator.POLL_S = 0.001
    print(json.dumps(describe()))
    print("| campaign | tried | became | failed | seconds of CPU |\n| --- | --- | --- | --- | --- |")
    broken = False
    for name in given.campaigns.split(","):
        count, failed, begun = Counter[str](), Counter[str](), time.process_time()
        for trial in CAMPAIGNS[name](given.scale):
            try:
                count[trial()] += 1
            except Exception as error:
                failed[f"{type(error).__name__}: {error}"] += 1
        broken |= bool(failed)
        became = ", ".join(f"{n} {what}" for what, n in sorted(count.items()))
        tried, seconds = count.total() + failed.total(), time.process_time() - begun
        print(f"| {name} | {tried} | {became} | {dict(failed) or 0} | {seconds:.0f} |", flush=True)
    raise SystemExit(int(broken))


if __name__ == "__main__":
    main()
