"""`fedloom plan` and `fedloom audit`: privacy before a run, and after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.show import out, say

if TYPE_CHECKING:
    from collections.abc import Mapping


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="A run file with [privacy].")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file. Repeatable.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """What epsilon, noise and bytes [privacy] will come to, before any training.

    Example: fedloom plan my.toml --set privacy.target_epsilon=8
    """
    from fedloom.data import hub
    from fedloom.runs import config
    from fedloom.runs.experiment import experiment
    from fedloom.runs.forecast import forecast

    hub.quiet()
    made = forecast(experiment(config.load(file, set_ or []))).to_dict()
    if json:
        out.print_json(data=made)
        return
    warnings = made.pop("warnings")
    _table({name: value for name, value in made.items() if value is not None})
    if made["unit"] is not None and made["epsilon"] is None:
        say("epsilon            infinite: no promise")
    for text in warnings:
        say(f"warning: {text}")


def audit(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Attack a finished run as its adversary would: what the model tells of rows, and whether its promise can be true.

    Example: fedloom audit runs/fedit-trec
    """
    from fedloom.data import hub
    from fedloom.runs import audit as audits

    hub.quiet()
    report = audits.audit(path)
    if json:
        out.print_json(data=report)
        return
    for title, values in report.items():
        if isinstance(values, dict):
            say(f"\n{title}")
            _table(values, indent="  ")
        else:
            say(f"\n{title}: {values}")
    say(f"\nwritten: {path / 'audit.json'}")


def _table(values: Mapping[str, Any], indent: str = "") -> None:
    for name, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        say(f"{indent}{name:<18} {shown}")
