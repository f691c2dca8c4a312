"""What a person sees: a table that grows by the round on a terminal, plain lines otherwise."""

from __future__ import annotations

from typing import Any

from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedloom.cli.show import Plain
from fedloom.flows import title
from fedloom.runs.experiment import Experiment
from fedloom.runs.run import Observer
from fedloom.text import printable


def size(n: int) -> str:
    """Bytes for people, in decimal units.

    >>> size(0), size(999), size(123_456), size(7_654_321)
    ('0 B', '999 B', '123 kB', '7.65 MB')
    """
    value = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            return f"{value:.3g} {unit}" if unit != "B" else f"{n} B"
        value /= 1000
    raise AssertionError


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


class Terminal(Observer):
    """The rounds as a table. Use as a context manager: it gives the terminal back."""

    def __init__(self, console: Plain) -> None:
        self.console = console
        self.metrics: list[str] = []
        self.table: Table | None = None
        self.live: Live | None = None

    def __enter__(self) -> Terminal:
        if self.console.is_terminal:
            self.live = Live(Spinner("dots", "starting"), console=self.console, transient=False, refresh_per_second=8)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.update(self.table if self.table is not None else "", refresh=True)
            self.live.stop()

    def doing(self, what: str) -> None:
        if self.live is None:
            return
        spinner = Spinner("dots", Text(printable(what)))
        if self.table is None:
            self.live.update(spinner)
            return
        grid = Table.grid()
        grid.add_row(self.table)
        grid.add_row(spinner)
        self.live.update(grid)

    def warning(self, what: str) -> None:
        self.console.print(f"warning: {what}", style="yellow", soft_wrap=self.live is None)

    def assembled(self, experiment: Experiment) -> None:
        c, method, parts = experiment.config, experiment.method, experiment
        trained = parts.parameters[0]
        head = parts.head_parameters
        own = sum(map(len, parts.held_out.values()))
        held_out = f"{own} held out by the clients" if own else f"{len(parts.rows.eval)} held out"
        self.console.print(
            f"{title(method)} on {c.task.data}: {len(parts.clients)} clients, "
            f"{len(parts.rows.train) - own} training rows, {held_out}",
            soft_wrap=self.live is None,  # a line of a log is one line
        )
        kind = str(parts.dtype).removeprefix("torch.")
        if parts.base.quantization is not None:
            kind = f"{parts.base.quantization}, computed in {kind}"
        self.console.print(
            f"{c.model.name} ({parts.base.family}, {kind} on {parts.device}), "
            f"rank {method.rank} on {len(parts.sites)} layers: {trained:,} adapter parameters"
            + (f" and {head:,} of the head" if head else ""),
            soft_wrap=self.live is None,
        )
        self.metrics = ["loss", *(name for name in parts.tables.metrics if name != "loss")]
        names = ["round", *(f"held-out {name}" for name in self.metrics), "training loss", "up", "down", "seconds"]
        self.table = Table(box=None, pad_edge=False)
        for name in names:
            self.table.add_column(name, justify="right")

    def round(self, record: dict[str, Any]) -> None:
        scores = record.get("eval", {})
        label = "personal" if record["stage"] == "personal" else str(record["round"])
        cells = [
            label,
            *(_number(scores.get(name)) for name in self.metrics),
            _number(record["train_loss"]),
            size(sum(record["bytes_up"].values())),
            size(sum(record["bytes_down"].values())),
            f"{record['seconds']['total']:.1f}",
        ]
        if self.table is not None and self.live is not None:
            self.table.add_row(*cells)
            self.live.update(self.table)
        else:
            named = " ".join(f"{name} {_number(scores.get(name))}" for name in self.metrics or scores)
            self.console.print(
                f"round {label}: {named} training_loss {cells[-4]} up {cells[-3]} down {cells[-2]} seconds {cells[-1]}",
                soft_wrap=True,
            )
        for client, why in record["dropped"].items():
            told = f"round {label}: client {client} dropped: {why}"
            self.console.print(told, style="yellow", soft_wrap=self.live is None)
