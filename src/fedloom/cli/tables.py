"""The tables that commands print: methods, and the sensitivity report."""

from __future__ import annotations

import inspect
import json
import re
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.describe import Description, Field, describe
from fedloom.methods import get, names

if TYPE_CHECKING:
    from fedloom.runs.sensitivity import Row


def print_methods(console: Console, name: str | None, as_json: bool) -> None:
    """All methods under their headings; or one with its fields. Facts are watched, not written down: see `describe`."""
    found = [describe(each) for each in ([name] if name is not None else names())]
    if as_json:
        said = [each.to_dict() for each in found]
        console.print_json(json.dumps(said if name is None else said[0]))
    elif name is None:
        _list_methods(console, sorted(found, key=lambda each: each.wrapper))
    else:
        _explain_method(console, found[0])


def _list_methods(console: Console, found: list[Description]) -> None:
    """A list rather than a table with columns: it stays readable from 60 columns of a terminal on."""
    under = describe("fedit")
    width = max(len(each.name) for each in found) + 2
    for group, over in dict.fromkeys((each.group, each.wrapper) for each in found):
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(no_wrap=True, width=width)
        table.add_column()
        for each in (each for each in found if (each.group, each.wrapper) == (group, over)):
            facts = Text(f"{'; '.join(_facts(each, under))}. {_short(each.paper)}".strip(), style="dim")
            table.add_row(f"  {each.name}", Text(f"{each.summary}\n").append(facts))
        heading = Text(group, style="bold").append(", over another method" if over else "", style="not bold dim")
        console.print(heading, table, sep="\n")
    console.print(
        "\nTensors are named by role (A, B: the factors; head: the task's; others are the method's own); +: besides those of "
        "the method under it. Clients start from what they receive unless it says otherwise. "
        "`fedloom methods NAME` explains one.",
        markup=False,
        highlight=False,
    )


def _facts(each: Description, under: Description) -> list[str]:
    """What sets a method apart; of a wrapper, from the method under it."""

    def roles(here: tuple[str, ...], below: tuple[str, ...]) -> str:
        return " ".join(role for role in here if not (each.wrapper and role in below))

    down, up, kept = roles(each.down, under.down), roles(each.up, under.up), roles(each.kept, under.kept)
    more = "+" if each.wrapper else ""
    told = [f"follows {' '.join(each.budgets)}"] if each.budgets else []
    if set(down.split()) == set(up.split()) and down:
        told.append(f"{more}{down} both ways")
    else:
        told += [f"{more}{names} {way}" for names, way in ((down, "down"), (up, "up")) if names]
    told += [f"{more}{kept} stays"] if kept else []
    told += [f"starts from {each.start}"] if each.start != "received" else []
    told += ["two exchanges a round"] if each.exchanges == 2 else []
    told += ["proxy data"] if each.proxy_data else []
    return [*told, "secure sum" if each.secure_sum == "yes" else "no secure sum"]


def _short(paper: str) -> str:
    """First author and arXiv id."""
    arxiv = re.search(r"arXiv \S+", paper)
    return f"{paper.partition(',')[0]}, {arxiv[0]}" if arxiv else ""


def _explain_method(console: Console, each: Description) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(text, markup=False, highlight=False, style=style)

    say(f"{each.name}: {each.summary}", "bold")
    say(f"{each.paper}\n")
    paragraphs = (inspect.getdoc(get(each.name)) or "").split("\n\n")
    say("\n\n".join(" ".join(text.split()) for text in paragraphs))
    facts = Table.grid(padding=(0, 2), pad_edge=False)
    personal = {"no": "no", "yes": "every client ends with a model of its own", "after": "trained after the last round"}
    rows = {
        "group": each.group + (", goes over another method; facts are those over fedit" if each.wrapper else ""),
        "follows": " ".join(each.budgets) or "no budget",
        "down": " ".join(each.down),
        "up": " ".join(each.up) + (f", in {each.exchanges} exchanges a round" if each.exchanges > 1 else ""),
        "stays": " ".join(each.kept) or "nothing",
        "start": each.start,
        "secure sum": each.secure_sum if each.secure_sum == "yes" else f"no: {each.secure_sum}",
        "personal": personal[each.personal],
        **({"proxy data": "the server trains on rows of its own: task.proxy_data"} if each.proxy_data else {}),
    }
    for key, value in rows.items():
        facts.add_row(Text(key, style="dim"), Text(value))
    console.print("", facts, sep="\n")
    for section in ("method", "lora"):
        if mine := [f for f in each.fields if f.section == section]:
            say(f"\n[{section}]", "bold")
            console.print(_field_table(mine))
    if each.wrapper:
        say("\n[method.over] is another method's table, with its name; rank, alpha and rslora stand in [lora].")


def _field_table(found: list[Field]) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for f in found:
        allowed = "of " + " | ".join(json.dumps(x) for x in f.choices) if f.choices else f.type
        default = "fedit" if f.name == "over" else json.dumps(f.default)
        text = Text(default).append("  " + ", ".join(x for x in (allowed, f.bounds) if x), style="dim")
        table.add_row(f.name, text.append(f"\n{f.meaning}" if f.meaning else "", style="not dim"))
    return table


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
