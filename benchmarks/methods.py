"""The quickstart with every method, five paired draws of partition and hold-out: accuracy, difference to FedIT, bytes.

    fedloom compare benchmarks/studies/methods.toml --out runs/methods       (about an hour of one core)
    fedloom compare benchmarks/studies/methods_tuned.toml --out runs/methods_tuned
    python benchmarks/methods.py runs/methods runs/methods_tuned

Two lines need no federation: the commonest class, and tf-idf with logistic regression on all training rows.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from fedloom.runs.config import RunConfig
from fedloom.runs.tables import tables
from fedloom.studies import summary
from fedloom.studies.statistics import LEVEL, Interval, difference, holm, interval
from fedloom.studies.summary import Line


def without_federation(config: dict[str, object]) -> tuple[float, float]:
    """Held-out accuracy of the commonest class, and of tf-idf + logistic regression, on the rows of one draw."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = tables(RunConfig.model_validate(config))
    text, label = rows.text[0], "label"
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit(rows.train[text], rows.train[label])
    common = statistics.mode(rows.train[label])
    return (
        statistics.mean(float(y == common) for y in rows.eval[label]),
        float(model.score(rows.eval[text], rows.eval[label])),
    )


def scores(line: Line) -> list[float]:
    """By draw; of the clients' own models where there is a personal phase."""
    if line.personal is None:
        return [line.by_draw[draw] for draw in sorted(line.by_draw)]
    traces = sorted(line.traces, key=lambda trace: trace.draw)
    return [trace.personal["eval"][trace.score] for trace in traces if trace.personal is not None]


def shown(x: Interval, sign: str = "") -> str:
    return f"{x.mean:{sign}.3f} ± {x.high - x.mean:.3f}"


def rows(lines: list[Line], reference: list[float]) -> list[str]:
    """Lines of the table: an asterisk where scores are means over the clients' own models, and "cannot tell" where the paired
    t test says so, Holm's correction over all lines."""
    all_scores = [scores(line) for line in lines]
    against = [difference((x.label, y), ("fedit", reference)) for x, y in zip(lines, all_scores, strict=True)]
    told_apart = [p < LEVEL for p in holm([d.p for d in against])]
    table = []
    for line, mine, gap, clear in zip(lines, all_scores, against, told_apart, strict=True):
        own = " *" if line.of_clients or line.personal is not None else ""
        name = f"`{line.label}`" if line.role == "method" else line.label
        gain = "" if mine == reference else f"{shown(gap.gain, '+')}{'' if clear else ' (cannot tell)'}"
        cells = [name + own, shown(interval(mine)), gain, f"{line.up / 1e6:.2f} MB", f"{line.down / 1e6:.2f} MB"]
        table.append(f"| {' | '.join(cells)} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("more", type=Path, nargs="*", help="of the same draws: a line stands for one of its name")
    asked = parser.parse_args()
    first = summary.read([asked.study], "accuracy")
    fedit = next(line for line in first.lines if line.label == "fedit")
    reference = scores(fedit)
    print("| | held-out accuracy | against `fedit`, paired | up | down |\n|---|---|---|---|---|")
    plain = [without_federation(t.config) for t in sorted(fedit.traces, key=lambda trace: trace.draw)]
    for name, values in zip(("commonest class", "tf-idf + logistic regression"), zip(*plain, strict=True), strict=True):
        print(f"| {name} | {shown(interval(values))} | | | |")
    lines = {line.label: line for path in [asked.study, *asked.more] for line in summary.read([path], "accuracy").lines}
    print("\n".join(rows(sorted(lines.values(), key=lambda line: line.role != "method"), reference)))


if __name__ == "__main__":
    main()
