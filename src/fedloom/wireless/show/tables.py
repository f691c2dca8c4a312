"""An allocation as tables on a terminal (rich)."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from fedloom.wireless.allocate import Allocation
from fedloom.wireless.solvers.registry import SOLVERS

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))


def short(value: float) -> str:
    """Three digits in at most seven characters.

    >>> short(0.1608), short(0.00415), short(0.000021)
    ('0.161', '0.00415', '2.1e-05')
    """
    text = f"{value:.3g}"
    return text if len(text) <= 7 else f"{value:.1e}"


def quantity(value: float, unit: str) -> str:
    """Three digits with an SI prefix.

    >>> quantity(12_345_678.0, "bit/s")
    '12.3 Mbit/s'
    """
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def print_allocation(allocation: Allocation, console: Console | None = None) -> None:
    """The plan, its cost in seconds and joules, what it is worth and how well that is known. Fits 80 columns."""
    console = console or Console()
    console.print(plan_table(allocation))
    console.print(cost_table(allocation))
    console.print(summary(allocation), highlight=False, soft_wrap=True)


def plan_table(allocation: Allocation) -> Table:
    """Each device's keep rate, bandwidth and binding constraint."""
    whole = allocation.mode == "subcarrier"
    share = "subcarriers" if whole else "bandwidth"
    table = _table(
        "device", "keep", share, "up", "down", "binding constraint", left=("device", share, "binding constraint")
    )
    for device in allocation.devices:
        table.add_row(
            device.id,
            f"{device.keep:.3f}",
            ranges(device.subcarriers) if device.subcarriers is not None else quantity(device.bandwidth_hz, "Hz"),
            quantity(device.rate_up_bit_s, "bit/s"),
            quantity(device.rate_down_bit_s, "bit/s"),
            ", ".join(device.binds) or "-",
        )
    return table


def cost_table(allocation: Allocation) -> Table:
    """Latency and energy of a round, in parts; the latency limit, one for all, is in the summary."""
    seconds = ("down s", "train s", "up s", "sum s")
    joules = ("send J", "train J", "rest J", "sum J", "limit J")
    table = _table("device", *seconds, *joules, left=("device",))
    for device in allocation.devices:
        numbers = [device.down_s, device.compute_s, device.up_s, device.latency_s]
        numbers += [device.transmit_j, device.compute_j, device.overhead_j, device.energy_j, device.energy_limit_j]
        table.add_row(device.id, *(short(number) for number in numbers))
    return table


def _table(*columns: str, left: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name == "device")
    return table


def ranges(numbers: tuple[int, ...]) -> str:
    """Runs of numbers, short.

    >>> ranges((0, 1, 2, 5, 7, 8))
    '0-2 5 7-8'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


def summary(allocation: Allocation) -> str:
    """The objective in its parts, its bracket, and how the search went."""
    lower = f"{allocation.lower:.8g}" if np.isfinite(allocation.lower) else "not known"
    gap = f" (optimality gap {100.0 * allocation.optimality_gap:.2g} %)" if np.isfinite(allocation.lower) else ""
    what = SOLVERS[allocation.solver].counts if allocation.solver in SOLVERS else "steps"
    slowest = max(device.latency_s for device in allocation.devices)
    return (
        f"latency limit {allocation.latency_limit_s:.4g} s, slowest device {slowest:.4g} s\n"
        f"bound {allocation.objective:.8g} = empirical {allocation.empirical:.6g} + generalisation gap {allocation.gap:.6g}\n"
        f"lower {lower}, upper {allocation.upper:.8g}{gap}\n"
        f"{allocation.solver}: {allocation.nodes} {what} in {allocation.seconds:.2f} s; {allocation.status.value}"
    )
