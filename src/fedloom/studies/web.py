"""The report: one HTML file with its charts, styles and numbers inside; nothing is fetched and no script runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedloom import __version__, disk
from fedloom.runs.run_directory import RunDirectory
from fedloom.studies import charts, results, summary, svg
from fedloom.studies.results import Trace
from fedloom.studies.statistics import Difference
from fedloom.studies.study import LOWER_IS_BETTER
from fedloom.studies.summary import Line, Summary, differences
from fedloom.studies.tables import COLUMNS, NAMES, cells_of, data_of, size
from fedloom.studies.verdict import number, reversed_, verdict, winner

MOST_ROWS = 60
"""Rows of a table of clients or of dropped updates; the numbers of the others are in the run directories."""


def write(s: Summary, path: Path) -> Path:
    """Write the report of a comparison or of one run. Raises RunError if it cannot be written."""
    with disk.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, render(s).encode())
    return path


def if_asked(path: Path) -> None:
    """Write RUN/report.html of a finished run whose run file says so (track.report)."""
    if RunDirectory.open(path).config().track.report:
        write(summary.read([path]), path / "report.html")


def render(s: Summary) -> str:
    """The page."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    source = (files("fedloom.studies") / "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(page(s))


def page(s: Summary) -> dict[str, Any]:
    """What the template shows, by name."""
    one = len(s.methods) == 1 and len(s.methods[0].traces) == 1
    return {
        "version": __version__,
        "title": s.name,
        "subtitle": _subtitle(s),
        "verdict": verdict(s),
        "open": len(s.methods) > 1 and winner(s) is None,
        "score": s.score,
        "columns": [s.score if c == "score" else c for c in COLUMNS],
        "lines": _lines(s),
        "notes": _notes(s),
        "charts_title": "How it went" if one else "Score over rounds and over what was spent",
        "legend": [{"swatch": Markup(svg.swatch(i)), "label": line.label} for i, line in enumerate(s.methods)],
        "banded": s.draws > 1,
        "charts": _charts(s, one),
        "pairs": _pairs(s.pairs),
        "pairs_note": "p-values are Holm's over all pairs (in colour: told apart), draws needed are for power 0.8 at 5 %.",
        "split": _split(s),
        **_strips(s),
        "rounds": _rounds(s.methods[0].traces[0]) if one else None,
        "dropped": _dropped(s),
        "failed": list(s.failed.items()),
        "clients": [_clients(line) for line in s.methods],
        "differences": _differences(s) if len(s.methods) > 1 else None,
        "tuning": _tuning(s),
        "tuning_note": "Chosen on draws of their own, from which no score is taken.",
        "environment": _environment(s),
        "hashes": _hashes(s),
        "data": Markup(_json(data_of(s))),
    }


def _json(value: object) -> str:
    """JSON that cannot end its element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _subtitle(s: Summary) -> str:
    task = s.lines[0].traces[0].config
    better = "smaller is better" if s.score in LOWER_IS_BETTER else "larger is better"
    told = (
        f"{Path(task['model']['name']).name} on {Path(task['task']['data']).name}; {s.score}, {better}; {s.draws} draw"
        + "s" * (s.draws != 1)
    )
    if s.budget is None:
        return told + "; scored after the last round"
    amount = size(s.budget.amount) if s.budget.kind == "bytes" else f"{s.budget.amount:g} {s.budget.kind}"
    return told + f"; scored where {amount} are spent"


def _lines(s: Summary) -> list[dict[str, Any]]:
    swatches = {line.label: Markup(svg.swatch(i)) for i, line in enumerate(s.methods)}
    return [
        {"control": line.role != "method", "swatch": swatches.get(line.label), "cells": cells_of(s, line)}
        for line in s.lines
    ]


def _notes(s: Summary) -> list[str]:
    notes = ["A score is that of the round named, never of the best one; it is the mean over draws."]
    if s.target is not None:
        notes.append(f"The target is {s.score} {number(s.target)}.")
    if any(line.error is not None for line in s.lines):
        errors = ", ".join(f"{NAMES.get(x.label, x.label)} {x.error:.3f}" for x in s.lines if x.error is not None)
        notes.append(f"Standard error of one score from the size of the test set alone: {errors}.")
    simulated = any(trace.simulated for line in s.methods for trace in line.traces)
    notes.append(f"Seconds are {'those of the simulated network' if simulated else 'measured, of training alone'}.")
    megabytes = ", ".join(f"{line.label} {(line.up + line.down) / 1024**2:.2f}" for line in s.methods)
    notes.append(f"Up and down by then in MB of 1024^2 bytes, as FlowerTune's leaderboard counts: {megabytes}.")
    for line in s.lines:
        if line.personal is not None:
            notes.append(
                f"{line.label} after its personal phase: {number(line.personal.mean)} (mean of clients' models)."
            )
    return notes


def _charts(s: Summary, one: bool) -> list[dict[str, Any]]:
    references = [(NAMES[x.label], x.score.mean) for x in s.lines if x.label in NAMES]
    made = []
    for kind in charts.AXES:
        drawn = charts.over(s, kind)
        label = charts.label_of(kind, [t for line in s.methods for t in line.traces])
        if drawn and (chart := svg.curves(drawn, label, s.score, references, kind)):
            made.append({"caption": f"{s.score} over {label}", "svg": Markup(chart)})
    if one:
        drawn = charts.losses(s.methods[0])
        if chart := svg.curves([x for x in drawn if x.x], "rounds", "loss", unit="rounds"):
            caption = Markup("loss: ") + Markup(", ").join(Markup(svg.swatch(x.index)) + x.label for x in drawn)
            made.append({"caption": caption, "svg": Markup(chart)})
    return made


def _pairs(pairs: Sequence[Difference]) -> list[dict[str, Any]]:
    if not pairs:
        return []
    # One pair with a huge interval would hide all others: the axis is that of the gains, and intervals are cut at its ends.
    reach = 2.5 * max(abs(pair.gain.mean) for pair in pairs) or 1.0
    shown = []
    for found in sorted(pairs, key=lambda pair: pair.p):
        pair = found if found.gain.mean >= 0 else reversed_(found)
        g = pair.gain
        told = f"{pair.first} minus {pair.second}: {number(g.mean)}, {number(g.low)} to {number(g.high)}"
        shown.append(
            {
                "names": f"{pair.first} - {pair.second}",
                "bar": Markup(svg.bar(g.low, g.mean, g.high, (-reach, reach), told, pair.separate)),
                "gain": f"{g.mean:+.4f}",
                "interval": f"{g.low:+.4f} to {g.high:+.4f}",
                "p": f"{pair.p_holm:.3f}",
                "wins": f"{pair.wins} of {g.n}",
                "improvement": f"{pair.improvement:.2f}",
                "needed": "-" if pair.draws_needed is None else str(pair.draws_needed),
                "apart": "yes" if pair.separate else "no",
            }
        )
    return shown


def _split(s: Summary) -> dict[str, Any] | None:
    if s.split is None or s.split.total == 0:
        return None
    named = [("partition", s.split.partition), ("method x partition", s.split.interaction)]
    if s.split.seed is None:
        named[1] = ("method x partition, with the training seed", s.split.interaction)
    else:
        named.append(("training seed", s.split.seed))
    words = ", ".join(f"{name} {100 * x / s.split.total:.0f} %" for name, x in named)
    return {"words": f"Share of a score's variance within a method: {words}.", "svg": Markup(svg.shares(named))}


def _strips(s: Summary) -> dict[str, Any]:
    found = []
    for i, line in enumerate(s.lines):
        trace = line.traces[0]
        record = trace.personal or trace.records[-1]
        each = {k: x[s.score] for k, x in record.get("eval_clients", {}).items() if x.get(s.score) is not None}
        if each and line.label in (*[x.label for x in s.methods], "alone"):
            found.append((i, line, each))
    values = [x for _, _, each in found for x in each.values()]
    if not values:
        return {"strips": None}
    low, high = min(values), max(values)
    ends = (low, high) if high > low else (low - 0.5, low + 0.5)
    return {
        "strips": [
            {
                "label": NAMES.get(line.label, line.label),
                "svg": Markup(svg.strip(list(each.items()), ends, i, f"{line.label}, {s.score} by client")),
                "worst": number((min if s.higher_is_better else max)(each.values())),
                "mean": number(sum(each.values()) / len(each)),
                "best": number((max if s.higher_is_better else min)(each.values())),
            }
            for i, line, each in found
        ],
        "strip_ends": f"{number(ends[0])} to {number(ends[1])}",
        "strips_draw": found[0][1].traces[0].draw,
    }


def _rounds(trace: Trace) -> dict[str, Any]:
    metrics = list(dict.fromkeys(name for r in trace.records for name in r.get("eval", {})))
    records = trace.records + ([trace.personal] if trace.personal else [])
    body = [
        [
            "personal" if r["stage"] == "personal" else r["round"],
            *(_told(r.get("eval", {}).get(name)) for name in metrics),
            _told(r["train_loss"]),
            len(r["clients"]),
            len(r["dropped"]),
            size(sum(r["bytes_up"].values())),
            size(sum(r["bytes_down"].values())),
            f"{r['seconds']['total']:.1f}",
        ]
        for r in records
    ]
    columns = ["round", *(f"held-out {name}" for name in metrics), "training loss", "clients", "dropped"]
    return {"columns": [*columns, "up", "down", "seconds"], "body": body}


def _told(x: float | None) -> str:
    return "-" if x is None else f"{x:.4f}"


def _dropped(s: Summary) -> list[tuple[object, ...]]:
    groups: dict[tuple[str, int, str, str], list[int]] = {}
    for label, draw, at, client, why in results.dropped(
        t for line in s.lines if line.label != "untuned" for t in line.traces
    ):
        groups.setdefault((label, draw, client, why), []).append(at)
    rows: list[tuple[object, ...]] = [
        (label, draw, _runs(rounds), client, why) for (label, draw, client, why), rounds in groups.items()
    ]
    return _cut(rows)


def _runs(numbers: Iterable[int]) -> str:
    """
    >>> _runs([1, 2, 3, 7])
    '1-3, 7'
    """
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _cut(rows: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    if len(rows) <= MOST_ROWS:
        return rows
    return [*rows[:MOST_ROWS], (f"and {len(rows) - MOST_ROWS} more",) + ("",) * (len(rows[0]) - 1)]


def _clients(line: Line) -> dict[str, Any]:
    trace = line.traces[0]
    known = trace.manifest.get("clients", {})
    columns = list(dict.fromkeys(key for values in known.values() for key in values))
    total: dict[str, list[int]] = {}
    for record in trace.records:
        for client, (down, up) in record.get("bytes_clients", {}).items():
            got = total.setdefault(client, [0, 0, 0])
            got[0], got[1], got[2] = got[0] + 1, got[1] + up, got[2] + down
    body: list[tuple[object, ...]] = []
    for client, values in known.items():
        rounds, up, down = total.get(client, [0, 0, 0])
        body.append((client, *(values.get(key, "") for key in columns), rounds, size(up), size(down)))
    return {
        "title": f"{line.label}, draw {trace.draw}",
        "columns": ["client", *columns, "rounds", "up", "down"],
        "body": _cut(body),
    }


def _differences(s: Summary) -> dict[str, Any] | None:
    found = differences(s.lines)
    if not found:
        return None
    labels = [line.label for line in s.methods]
    body = [[key, *("-" if values[x] is None else values[x] for x in labels)] for key, values in found.items()]
    return {"columns": ["key", *labels], "body": body}


def _tuning(s: Summary) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for tried in s.tuning:
        point = ", ".join(f"{key} = {value}" for key, value in tried["point"].items())
        mean = number(sum(tried["scores"]) / len(tried["scores"])) if tried["scores"] else "failed"
        rows.append((tried["label"], point, mean, "chosen" if tried["chosen"] else ""))
    return rows


def _environment(s: Summary) -> list[tuple[str, str]]:
    manifest = s.lines[0].traces[0].manifest
    told = {**manifest.get("versions", {}), **{k: str(v) for k, v in manifest.get("environment", {}).items()}}
    numbers = {key: f"{manifest[key]:,}" for key in ("lora_parameters", "head_parameters") if key in manifest}
    rows = {f"{key} rows": f"{n:,}" for key, n in manifest.get("rows", {}).items()}
    return [
        (key, str(value)) for key, value in ({"fedloom": manifest.get("fedloom", "")} | told | numbers | rows).items()
    ]


def _hashes(s: Summary) -> dict[str, Any]:
    names = ("config", "model", "data", "eval_data", "partition", "adapter")
    body: list[tuple[object, ...]] = []
    for line in s.lines:
        for trace in line.traces if line.label != "untuned" else []:
            hashes = trace.manifest.get("hashes", {})
            body.append((line.label, trace.draw, trace.seed, *((hashes.get(name) or "-")[:12] for name in names)))
    return {"columns": ["run", "draw", "seed", *names], "body": body}
