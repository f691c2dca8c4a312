"""The notebook runs as its reader runs it, in an empty folder and offline, and shows on the site what it shows now."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "own_data.ipynb"


def shown(file: Path) -> list[str]:
    """What each cell of code shows, numbers aside."""
    notebook = nbformat.read(file, as_version=4)
    results = [
        [each["data"]["text/plain"] for each in cell.outputs if each.output_type == "execute_result"]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [" ".join(re.sub(r"[\d.]+", "#", "".join(each)).split()) for each in results]


@pytest.mark.slow
def test_the_notebook_goes_from_own_rows_to_a_loaded_adapter(tmp_path: Path) -> None:
    shutil.copy(NOTEBOOK, tmp_path)
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "ran", NOTEBOOK.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert shown(tmp_path / "ran.ipynb") == shown(NOTEBOOK)
    assert sum(map(bool, shown(NOTEBOOK))) == 4
