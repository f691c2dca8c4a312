"""`fedloom run --dry-run`: what a run would load, train, send and take, in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.cli.show import out, say
from fedloom.cli.terminal import Terminal, size

if TYPE_CHECKING:
    from fedloom.runs.config import RunConfig
    from fedloom.runs.dry_run import DryRun


def rehearse(config: RunConfig) -> None:
    """Print what a rehearsal found."""
    from fedloom.runs.dry_run import dry_run

    with Terminal(out) as terminal:
        found = dry_run(config, terminal)
    say("")
    for name, told in _lines(found):
        say(f"{name:<10}{told}")
    say("nothing was written; times are estimates from two rounds of one step")


def _lines(d: DryRun) -> list[tuple[str, str]]:
    from fedloom.studies.clock import duration

    up, down = int(d.up_bytes), int(d.down_bytes)
    kept = f"{size(d.frozen_bytes)}" + (f" of {size(d.room_bytes)}" if d.frozen_bytes <= d.room_bytes else "")
    room = (
        "" if d.frozen_bytes <= d.room_bytes else f", for which there are {size(d.room_bytes)}: the rest is made anew"
    )
    frozen = f"the first {d.frozen_blocks} blocks are frozen: computed once for each row, {kept}{room}"
    return [
        ("load", f"{d.model} as {d.dtype} on {d.device}, {size(d.base_bytes)}; {duration(d.load_s)}"),
        ("rows", f"{d.rows} to train on, {d.held_out} held out; the longest has {d.longest_row} tokens"),
        (
            "train",
            f"{d.sampled} of {d.clients} clients a round, {min(d.cohort, d.sampled)} in one pass ({d.why_cohort})",
        ),
        ("", f"{d.trained:,} parameters on {d.layers} layers" + (f", {d.head:,} of the head" if d.head else "")),
        *([("", frozen)] if d.frozen_blocks else []),
        ("memory", f"about {size(d.memory_bytes)}, base and training, beside Python and its libraries"),
        ("send", f"a round {size(up)} up, {size(down)} down; {d.rounds} rounds {size(d.rounds * (up + down))}"),
        ("time", f"about {duration(d.total_s)}: a round {duration(d.round_s)}, scoring {duration(d.evaluation_s)}"),
    ]
