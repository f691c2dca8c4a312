"""Scores that a run does not write: python after.py keep|turns|sensitivity STUDIES, from this folder.

keep: loss of the final model on its own training rows, and the gap to the held-out loss. turns: the clients' own models on the
held-out rows of their own domain. sensitivity: directions and magnitudes of A and B in a round after the last one, of FedIT.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np

from fedloom.runs import export, sensitivity
from fedloom.runs.experiment import experiment
from fedloom.runs.run_directory import RunDirectory
from fedloom.studies import results
from fedloom.studies.statistics import difference, interval

Table = dict[str, dict[int, float]]
"""Label -> draw -> number."""


def main() -> None:
    what, root = sys.argv[1], Path(sys.argv[2])
    made = {"keep": keep, "turns": turns, "sensitivity": sensitive}[what](root)
    (root / f"after-{what}.json").write_text(json.dumps(made, indent=1))


def cells(study: Path) -> Iterator[tuple[str, int, Path]]:
    """(label, draw, run directory) of the methods' finished runs."""
    for cell in json.loads((study / "study.json").read_text())["cells"]:
        if cell["role"] == "method" and results.finished(study / cell["key"]):
            yield cell["label"], cell["draw"], study / cell["key"]


def keep(root: Path) -> dict[str, Table]:
    train, held_out = defaultdict[str, dict[int, float]](dict), defaultdict[str, dict[int, float]](dict)
    for label, draw, path in cells(root / "keep"):
        run = RunDirectory.open(path)
        e = experiment(run.config())
        train[label][draw] = e.trainer.evaluate(export.read(run.adapter), e.rows.train).loss
        held_out[label][draw] = run.rounds()[-1]["eval"]["loss"]
        e.trainer.close()
    gap: Table = {label: {d: held_out[label][d] - x for d, x in rows.items()} for label, rows in train.items()}
    for name, table in (("training", train), ("held-out", held_out), ("gap", gap)):
        show(name, table)
    dropped = [1 - float(label.split()[1]) for label in gap]
    slopes = [np.polyfit(dropped, [gap[label][d] for label in gap], 1)[0] for d in gap["keep 1"]]
    print("slope of the gap on 1 - keep:", words([float(x) for x in slopes]))
    return {"train": train, "held_out": held_out, "gap": gap}


def turns(root: Path) -> dict[str, Table]:
    own, common = defaultdict[str, dict[int, float]](dict), defaultdict[str, dict[int, float]](dict)
    for label, draw, path in cells(root / "turns"):
        run = RunDirectory.open(path)
        e = experiment(run.config())
        domains = np.asarray(e.tables.eval["domain"])
        totals = np.zeros(3)
        for client in e.clients:
            rows = e.rows.eval.select(np.flatnonzero(domains == client.id))
            adapters = (run.path / "clients" / client.id / "adapter", run.adapter)
            losses = [e.trainer.evaluate(export.read(adapter), rows).loss for adapter in adapters]
            totals += len(rows) * np.array([*losses, 1.0])
        own[label][draw], common[label][draw] = (totals[:2] / totals[2]).tolist()
        e.trainer.close()
    show("own model, own domain", own)
    show("common model, the same rows", common)
    labels = list(own)
    for table, name in ((own, "own"), (common, "common")):
        for other in labels[1:]:
            draws = sorted(table[labels[0]].keys() & table[other].keys())
            pair = difference(
                (labels[0], [table[labels[0]][d] for d in draws]), (other, [table[other][d] for d in draws]), False
            )
            print(
                f"{name}: {labels[0]} ahead of {other} by {pair.gain.mean:.3f}, {pair.gain.low:.3f} to {pair.gain.high:.3f}"
            )
    return {"own": own, "common": common}


def sensitive(root: Path) -> dict[str, dict[str, list[float | None]]]:
    found = defaultdict[str, dict[str, list[float | None]]](dict)
    for label, draw, path in cells(root / "turns"):
        if label == "fedit then all":
            for row in sensitivity.measure(path):
                found[f"{row.convention} against {row.reference}"][str(draw)] = row.values()
    for name, rows in found.items():
        columns = list(zip(*rows.values(), strict=True))
        for title, column in (("dD_A/dD_B", 2), ("dM_B/dM_A", 5), ("per root length", 6), ("relative", 7)):
            told = [x for x in columns[column] if x is not None]
            print(f"{name:28} {title:16} {words(told) if len(told) > 1 else '-'}")
    return found


def show(name: str, table: Table) -> None:
    """A line for each label."""
    for label, rows in table.items():
        print(f"{name:28} {label:30} {words(list(rows.values()))}")


def words(x: list[float]) -> str:
    """Mean and t interval."""
    found = interval(x)
    return f"{mean(x):.3f}, {found.low:.3f} to {found.high:.3f} ({len(x)} draws)"


if __name__ == "__main__":
    main()
