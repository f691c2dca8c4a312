"""Some of the bad data and models of benchmarks/campaigns.py: trained as wanted, or one short message and nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.bad import data, models
from tests.bad.campaign import Case, here, tried

CASES = [*list(data.cases())[::9], *list(models.cases())[::9]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, tmp_path: Path) -> None:
    outcome, faults = tried(case, tmp_path / "case", here)
    assert not faults, outcome.said
