"""Methods end with the same bytes in this process and through a real SuperLink with two SuperNodes.

One method for each way of talking: `test_visits.py` has every case through the same messages, without a SuperLink.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.flower.transport import GridTransport
from fedloom.methods import build
from fedloom.runs import run as runs
from fedloom.runs.config import parse

from ..methods.cases import sections

Settings = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.xdist_group("flower")  # one deployment for all

TALKS = (
    "fedit",
    "ffa_lora",
    "fedsa_lora",  # keeps with clients, and has no common model
    "hetlora",  # sizes that clients choose
    "flexlora",  # unequal ranks
    "fedex_lora",  # an offset that grows
    "fslora",
    "fedlodrop",
    "fedlora_optimizer",  # phases, and a personal one at the end
    "feddpa",  # two works a visit
    "scaffold",  # a wrapper that keeps with clients
    "quantise",  # integers go up
    "fedask",  # two exchanges a round
    "lora_a2",  # indices go up
    "fedlodrop-over-fslora",
)

HELD_OUT = ("fedit", "fedsa_lora", "fedlora_optimizer")
"""Scored on rows of the clients' own: a common model, own models, and such with a personal phase."""

STATELESS = ("ffa_lora", "hetlora", "flexlora", "fedlodrop", "fedlodrop-over-fslora")
"""Their second round sends and does nothing that the first did not: one is enough, and five seconds less."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("**/adapter_model.safetensors"))}


@pytest.mark.parametrize("name", TALKS)
def test_the_same_bytes_in_process_and_through_flower(
    name: str, settings: Settings, transport: GridTransport, tmp_path: Path
) -> None:
    values = settings(
        **sections(name),
        train={"rounds": 1 if name in STATELESS else 2, "evaluate_every": 0, "local_steps": 2},
        engine={"cohort": 1},
    )
    if name in HELD_OUT:
        values["clients"]["holdout"] = 0.3
    here = runs.start(parse(values, "test"), tmp_path / "here")
    values["engine"]["deadline_s"] = 120.0
    far = runs.start(parse(values, "test"), tmp_path / "far", transport=transport)

    assert tensors(tmp_path / "far") == tensors(tmp_path / "here")
    method = build(sections(name)["method"])
    assert len(tensors(tmp_path / "here")) == (4 if method.personal_models or method.personal_phase else 1)
    for ours, theirs in zip(here.rounds, far.rounds, strict=True):
        for key in ("clients", "dropped", "eval", "bytes_up", "bytes_down", "train_loss", "eval_over", "eval_clients"):
            assert theirs.get(key) == ours.get(key), key


def test_the_base_model_was_loaded_once_by_each_node(transport: GridTransport, logs: Path) -> None:
    for log in sorted(logs.glob("worker-*.log")):
        said = re.findall(r"process (\d+), base model loaded (\d+) time", log.read_text())
        assert len(said) > 1 and set(said) == {(said[0][0], "1")}
