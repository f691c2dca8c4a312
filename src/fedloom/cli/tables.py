"""The tables that commands print: methods, and the sensitivity report."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table

from fedloom.methods import get, names

if TYPE_CHECKING:
    from fedloom.runs.sensitivity import Row


def print_methods(console: Console, name: str | None) -> None:
    """All methods, a line each; or one with its fields, their defaults and meaning, and its paper."""
    if name is None:
        table = Table(box=None, pad_edge=False)
        for column in ("method", "budgets", "what it does", "paper"):
            table.add_column(column, no_wrap=column in ("method", "budgets"))
        for each in names():
            cls = get(each)
            table.add_row(each, ", ".join(sorted(cls.budgets)) or "-", _summary(cls), cls.paper)
        console.print(table)
        return
    cls = get(name)
    console.print(f"{cls.name}: {cls.paper}\n", soft_wrap=True)
    console.print(inspect.getdoc(cls) or "", soft_wrap=True, markup=False)
    table = Table(box=None, pad_edge=False)
    for column in ("field", "default", "meaning"):
        table.add_column(column)
    meanings = _meanings(cls)
    for f in fields(cast(Any, cls)):
        default = ("fedit" if f.name == "over" else "") if f.default is MISSING else repr(f.default)
        table.add_row(f.name, default, meanings.get(f.name, ""))
    console.print()
    console.print(table, markup=False)


def _summary(cls: type) -> str:
    module = inspect.getmodule(cls)
    first = (inspect.getdoc(module) or "").splitlines()[0]
    return first.partition(": ")[2].rstrip(".") or first


def _meanings(cls: type) -> dict[str, str]:
    """Field -> the docstring that stands under it in the source."""
    found = {}
    for each in reversed(cls.__mro__[:-1]):
        try:
            source = inspect.getsource(each)
        except (OSError, TypeError):
            continue
        for match in re.finditer(r'^    (\w+): [^\n=]+= [^\n]+\n    """(.*?)"""', source, re.DOTALL | re.MULTILINE):
            found[match[1]] = " ".join(match[2].split())
    return found


def print_sensitivity(console: Console, rows: list[Row]) -> None:
    """One line for each convention and reference, with the published values and their caveat below."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("norms", "against", "dD A", "dD B", "dD A/B", "dM A", "dM B", "dM B/A", "/sqrt(n)", "rel.")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(row.convention, row.reference, *(("-" if x is None else f"{x:.3g}") for x in row.values()))
    console.print(table)
    console.print(
        "\ndD: mean of 1 - cos between a vector and its reference; dM: mean change of its length; -: undefined.\n"
        "Published values, convention unknown: dD A/B about 1.7, dM B/A about 41 (LLaMA2-7B, Dolly; arXiv 2510.11274).\n"
        "A ratio of lengths grows with sqrt(out / rank) under `col` whatever is learnt: the last two columns give dM B/A\n"
        "per sqrt(length n of the vectors), and of changes relative to the lengths themselves.",
        soft_wrap=True,
    )
