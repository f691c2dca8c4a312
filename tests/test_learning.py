"""Real models learn real data: the encoder questions, the decoder answers."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedloom
from fedloom.wireless import allocate, read_fleet
from fedloom.wireless.solvers.baselines import baseline

pytestmark = pytest.mark.slow
Need = Callable[[str], None]
FLEET = Path(__file__).parent.parent / "examples" / "fleet.toml"
QUICKSTART = Path(fedloom.__file__).parent / "quickstart.toml"


@pytest.fixture(autouse=True)
def threads() -> object:
    """All cores: these models are large enough to use them."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


def test_the_quickstart_learns(need: Need, tmp_path: Path) -> None:
    need("minilm")
    need("trec")
    result = fedloom.run(fedloom.load_config(QUICKSTART, ["train.rounds=4"]), tmp_path / "run")
    first, last = result.rounds[0]["eval"]["accuracy"], result.eval["accuracy"]
    # This seed gave 0.885 after four rounds, three seeds 0.865 to 0.900 after six; the commonest class is 0.24 of the rows.
    assert first < 0.35 and last > 0.65
    # Ranks 2, 4, 8, 8 of 18 layers of 384 + 384, four bytes each; a seed of eight bytes to each client.
    sent = result.rounds[1]["bytes_up"]
    assert sent["A"] == sent["B"] == (2 + 4 + 8 + 8) * 18 * 384 * 4
    assert result.rounds[1]["bytes_down"] == sent | {"sketch": 4 * 8}


def test_planned_rates_learn_no_worse_than_one_rate_for_all(need: Need, tmp_path: Path) -> None:
    need("minilm")
    need("trec")
    problem = replace(read_fleet(FLEET).problem(), latency_limit_s=0.35)
    plan = allocate(problem)
    one, rate = baseline(problem, "uniform")
    assert rate is not None and plan.upper < one.value
    scores: dict[str, list[float]] = {"planned": [], "one": []}
    for seed in range(3):
        for name, keep in (("planned", list(plan.keep.values())), ("one", rate.tolist())):
            config = fedloom.load_config(
                QUICKSTART, ["train.rounds=3", "train.evaluate_every=0", "method.name=fedlodrop"]
            )
            clients = config.clients.model_copy(update={"ranks": None, "keep": keep})
            config = config.model_copy(update={"clients": clients, "seed": seed})
            scores[name].append(fedloom.run(config, tmp_path / f"{name}-{seed}").eval["accuracy"])
    noise = statistics.stdev(scores["planned"]) + statistics.stdev(scores["one"])
    assert statistics.mean(scores["planned"]) > statistics.mean(scores["one"]) - noise, scores


@pytest.mark.xdist_group("smollm2")  # one process converts its file for all of them
def test_a_decoder_learns_to_answer(need: Need, tmp_path: Path) -> None:
    need("smollm2")
    need("chatterbot")
    config = {
        "model": {"name": "smollm2"},
        "task": {
            "kind": "causal-lm",
            "data": "chatterbot",
            "prompt": "question",
            "response": "answer",
            "template": "chat",
            "limit": 64,
            "eval_limit": 24,
            "max_length": 64,
        },
        "clients": {"count": 2},
        "method": {"name": "fedlodrop"},
        "train": {"rounds": 2, "local_steps": 6, "batch_size": 4, "lr": 1e-3, "evaluate_every": 0},
    }
    config["clients"]["keep"] = [0.7, 1.0]
    result = fedloom.run(config, tmp_path / "run")
    assert result.rounds[-1]["eval"]["loss"] < result.rounds[0]["eval"]["loss"] - 0.2
