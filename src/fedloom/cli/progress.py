"""What a person sees of a study: a line for each cell, and what is known of the time left."""

from __future__ import annotations

from rich.console import Console

from fedloom.studies.cells import Cell
from fedloom.studies.runner import Progress


class Cells(Progress):
    """Plain lines, which a log can hold too."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def cell(self, cell: Cell, left: str) -> None:
        self._say(f"{_name(cell)}: running ({left})")

    def ended(self, cell: Cell, trouble: str) -> None:
        self._say(f"{_name(cell)}: {'failed: ' + trouble if trouble else 'done'}")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def _name(cell: Cell) -> str:
    point = "".join(f" {key.rpartition('.')[2]}={value}" for key, value in cell.point.items())
    return f"{cell.key.rpartition('-')[0]}{point}"
