from __future__ import annotations

import pytest

from fedloom.core import Client
from fedloom.describe import Description, Field, describe
from fedloom.errors import ConfigError
from fedloom.loop import one_round
from fedloom.methods import get, names

from .methods.cases import CASES, EXAMPLES, engine, start


@pytest.mark.parametrize(
    "name, down, up, kept, begins, sums",
    [
        ("fedit", "A B head", "A B head", "", "received", True),
        ("ffa_lora", "B frozen head", "B head", "", "received", True),
        ("fedsa_lora", "A", "A", "B head", "A received, B head kept", True),
        ("fedex_lora", "A B head left right", "A B head", "", "received", False),
        ("feddpa", "A B head", "A B head", "local_A local_B", "A B head received, local_A local_B kept", True),
        ("fslora", "A B head sketch", "A B head", "", "received", True),
        ("scaffold", "A B c_A c_B c_head head", "A B c_A c_B c_head head", "c_A c_B c_head", "received", True),
        ("flasc", "head top", "change head", "", "received", False),
        ("flora", "fresh head left right", "A B head", "", "head received, A new, B zero", False),
        ("rolora", "A B head", "A B head", "", "received", True),
        ("fednova", "A B head", "nova_A nova_B nova_head nova_tau", "", "received", True),
        ("median", "A B head", "A B head", "", "received", False),
        ("fedlora_optimizer", "A B head", "A B head turn", "", "turn zero, A B head received", False),
    ],
)
def test_what_a_method_sends_keeps_and_starts_from(
    name: str, down: str, up: str, kept: str, begins: str, sums: bool
) -> None:
    seen = describe(name)
    assert (sorted(seen.down), sorted(seen.up), sorted(seen.kept)) == (down.split(), up.split(), kept.split())
    assert seen.start == begins and (seen.secure_sum == "yes") is sums


@pytest.mark.parametrize("name", names())
def test_the_roles_are_those_that_a_run_counts(name: str) -> None:
    """Against the byte counts of the loop on another problem, of the first two rounds."""
    case = next(case for case in CASES if case.table["name"] == name and "over" not in case.table)
    method, at = case.method(), engine()
    state, down, up = start(method), set[str](), set[str]()
    for t in (1, 2):
        state, record = one_round(method, at, state, [Client(k, n, method.rank) for k, n in EXAMPLES.items()], t)
        down |= set(record.down.as_dict())
        up |= set(record.up.as_dict())
    seen = describe(name)
    assert down <= set(seen.down) and up <= set(seen.up)
    assert seen.budgets == tuple(sorted(get(name).budgets)) and seen.group == get(name).group


def test_fields_have_their_defaults_choices_bounds_and_words() -> None:
    fields = {f.name: f for f in describe("fslora").fields}
    assert fields["sketch"].choices == ("uniform", "balanced", "importance") and fields["sketch"].default == "uniform"
    assert "a random k-subset" in fields["sketch"].meaning
    assert fields["importance_mix"].bounds == "above 0, at most 1" and fields["importance_mix"].type == "float"
    assert fields["over"] == Field("over", "table", None, meaning="")
    assert {f.name for f in describe("fedit").fields if f.section == "lora"} == {"rank", "alpha", "rslora"}
    assert {f.name: f.bounds for f in describe("fedadam").fields}["beta2"] == "at least 0, below 1"


def test_what_an_option_does_is_said_for_every_field_of_the_wrappers() -> None:
    for name in (
        "fedprox",
        "clip_updates",
        "quantise",
        "trimmed_mean",
        "multi_krum",
        "norm_filter",
        "fedadam",
        "fedavgm",
    ):
        assert all(f.meaning for f in describe(name).fields if f.name != "over"), name


def test_summaries_are_one_line_and_differ() -> None:
    said = [describe(name).summary for name in names()]
    assert all(len(x) <= 128 and "\n" not in x and not x.endswith(".") for x in said)
    assert len(set(said)) == len(said)


def test_a_third_partys_method_is_described_too() -> None:
    seen = describe("fedloom.methods.fedit:FedIT")
    assert isinstance(seen, Description) and seen.up == ("A", "B", "head")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fedit'"):
        describe("fedti")
