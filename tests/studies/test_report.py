"""What a comparison says of runs made up by a rule, and the page that shows it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import fedloom
from fedloom.cli.main import call
from fedloom.errors import RunError
from fedloom.studies import results, summary, web
from fedloom.studies.study import Budget
from fedloom.studies.summary import Summary, summarise
from fedloom.studies.tables import cells_of
from fedloom.studies.verdict import verdict

from .made import trace

Settings = Callable[..., dict[str, Any]]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def compared(last: dict[str, list[float]], **options: Any) -> Summary:
    """Methods that end at these scores, draw by draw, from 0.2 over 0.5."""
    traces = {k: [trace(k, draw, [0.2, 0.5, x]) for draw, x in enumerate(scores)] for k, scores in last.items()}
    return summarise("made", "accuracy", traces, dict.fromkeys(traces, "method"), **options)


def test_a_budget_is_spent_to_the_last_round_that_fits() -> None:
    run = trace("x", 0, [0.1, 0.9, 0.5, 0.7], network=(2.0, 5.0))

    def at(**budget: float) -> tuple[int, float, bool]:
        scored = results.at_budget(run, Budget(**budget))
        assert scored is not None
        return scored.round, scored.score, scored.whole

    # Three rounds of 300 bytes, 2 simulated seconds, 5 joules and 10 samples: never the best round, which is the first.
    assert at(bytes=600) == (2, 0.5, True) and at(bytes=899) == (2, 0.5, True) and at(bytes=900) == (3, 0.7, True)
    assert at(bytes=1199) == (3, 0.7, True) and at(bytes=1201) == (3, 0.7, False) and at(bytes=299) == (0, 0.1, True)
    assert at(seconds=4) == (2, 0.5, True) and at(joules=5) == (1, 0.9, True)
    assert at(rounds=3) == (3, 0.7, True) and at(rounds=5) == (3, 0.7, False) and at(samples=20) == (2, 0.5, True)
    none = results.at_budget(run, None)
    assert none is not None and (none.round, none.score) == (3, 0.7)


def test_seconds_are_measured_training_without_a_network() -> None:
    assert trace("x", 0, [0.1, 0.2, 0.3]).spent["seconds"] == [0.0, 1.5, 3.0]


def test_bytes_to_reach_a_score() -> None:
    run = trace("x", 0, [0.1, None, 0.5, 0.7])
    assert results.reach(run, 0.5, True) == (200, 400) and results.reach(run, 0.51, True) == (300, 600)
    assert results.reach(run, 0.8, True) is None
    assert results.reach(run, 0.15, False) == (0, 0)


def test_pairs_are_scipys() -> None:
    scores = {"a": [0.8, 0.82, 0.79, 0.85], "b": [0.7, 0.75, 0.74, 0.71], "c": [0.71, 0.7, 0.75, 0.74]}
    found = compared(scores)
    p = [stats.ttest_rel(scores[x], scores[y]).pvalue for x, y in (("a", "b"), ("a", "c"), ("b", "c"))]
    assert [pair.p for pair in found.pairs] == pytest.approx(p)
    # Holm by hand: sorted ascending, times 3, 2, 1, never decreasing.
    order = np.argsort(p)
    running = np.maximum.accumulate(np.minimum(1, np.array(p)[order] * [3, 2, 1]))
    assert [pair.p_holm for pair in found.pairs] == pytest.approx(running[np.argsort(order)])


def test_a_clear_winner_is_named_with_its_smallest_lead() -> None:
    said = verdict(compared({"a": [0.8, 0.82, 0.81, 0.83], "b": [0.7, 0.73, 0.71, 0.72], "c": [0.6, 0.62, 0.61, 0.64]}))
    assert said[0].startswith(
        "a is better than b and c over 4 draws: accuracy 0.815, ahead of b by 0.100, 95 % interval"
    )


def test_no_winner_where_they_cannot_be_told_apart() -> None:
    found = compared({"a": [0.80, 0.70, 0.90], "b": [0.79, 0.75, 0.80], "c": [0.1, 0.1, 0.1]})
    text = verdict(found)[0]
    d = np.array([0.01, -0.05, 0.10])
    needed = int(np.ceil((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2 * d.var(ddof=1) / d.mean() ** 2))
    assert (
        "No winner can be named: a and b cannot be told apart with 3 draws" in text and f"needs about {needed}" in text
    )
    assert text.endswith("a is better than c.")
    assert 'class="verdict open"' in web.render(found)


def test_one_draw_is_no_statistics() -> None:
    found = compared({"a": [0.9], "b": [0.1]})
    assert found.pairs == [] and "With 1 draw there is no telling methods apart" in verdict(found)[0]
    assert cells_of(found, found.lines[0])[2] == "-"


def test_a_smaller_loss_wins() -> None:
    traces = {k: [trace(k, d, [0.2, 0.5, x + d / 100]) for d in range(3)] for k, x in (("good", 0.9), ("bad", 0.3))}
    for runs in traces.values():
        runs[:] = [results.Trace(t.label, t.draw, t.seed, t.records, "loss", None, t.config, t.manifest) for t in runs]
    found = summarise("made", "loss", traces, dict.fromkeys(traces, "method"))
    assert verdict(found)[0].startswith("good is better than bad")


def test_controls_and_short_budgets_are_told() -> None:
    traces = {
        "a": [trace("a", d, [0.2, 0.5, 0.6 + d / 50]) for d in range(3)],
        "alone": [trace("alone", d, [0.2, None, 0.59 + d / 30], clients={"x": 0.5, "y": 0.7}) for d in range(3)],
        "pooled": [trace("pooled", d, [0.2, 0.5, 0.9]) for d in range(3)],
    }
    roles = {"a": "method", "alone": "control", "pooled": "control"}
    found = summarise("made", "accuracy", traces, roles, Budget(bytes=1e9))
    text = " ".join(verdict(found))
    assert "each client alone (mean) 0.623, pooled data 0.900, the untuned model 0.200" in text
    assert "a cannot be told apart from each client alone (mean), or is worse" in text
    assert "apart from the untuned model" not in text
    assert "a ended before the budget was spent" in text
    assert "standard error of 0.024" in text  # sqrt(0.62 * 0.38 / 400)


def test_dropped_updates_are_in_the_report_with_the_reason() -> None:
    why = {t: {"client-1": "it is <script>alert(1)</script>"} for t in (1, 2, 3, 5)}
    runs = {"a": [trace("a", 0, [0.2] * 7, dropped=why)]}
    page = web.render(summarise("made", "accuracy", runs, {"a": "method"}))
    assert "1-3, 5" in page and "&lt;script&gt;alert" in page and "<script>alert" not in page


class Reader(html.parser.HTMLParser):
    """What a page would fetch or run, its tags balanced, and its data."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.scripts: list[str | None] = []
        self.open: list[str] = []
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.outside += [f"{tag} {key}" for key in ("src", "href", "action", "data", "srcset") if key in values]
        self.outside += [f"{tag} {key}" for key in values if key.startswith("on")]
        if tag == "script":
            self.scripts.append(values.get("type"))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data += data


def test_nine_methods_of_a_hundred_rounds_are_one_small_file_that_needs_nothing_else() -> None:
    rng = np.random.default_rng(0)
    traces = {}
    for k in range(9):
        label = f"method-{k}"
        traces[label] = [
            trace(
                label,
                draw,
                [0.2, *(0.5 + 0.4 * (1 - np.exp(-t / 20)) + rng.normal(0, 0.01) for t in range(100))],
                up=1_234_567 + 1000 * k,
                down=7_654_321,
                network=(1.2345, 3.21),
                clients={f"client-{i}": rng.random() for i in range(20)},
            )
            for draw in range(5)
        ]
    page = web.render(summarise("made", "accuracy", traces, dict.fromkeys(traces, "method")))
    assert len(page.encode()) < 500_000
    reader = Reader()
    reader.feed(page)
    assert (reader.outside, reader.scripts, reader.open) == ([], ["application/json"], [])
    assert "url(" not in page and "@import" not in page and not re.search("https?:", page)
    data = json.loads(reader.data)
    assert len(data["lines"]) == 10 and len(data["pairs"]) == 36
    assert data["lines"][0]["runs"][0]["score"][0] == 0.2 and len(data["lines"][0]["runs"]) == 5
    assert page.count("<figure>") == 4  # rounds, bytes, seconds, joules


def test_a_report_of_runs_and_of_one_run(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for seed in (0, 1):
        for name in ("fedit", "fedsa_lora"):
            path = tmp_path / f"{name}-{seed}"
            fedloom.run(settings(method={"name": name}, train={"rounds": 2}) | {"seed": seed}, path)
            runs.append(path)
    found = summary.read(runs)
    assert [(line.label, sorted(line.by_draw)) for line in found.methods] == [("fedit", [0, 1]), ("fedsa_lora", [0, 1])]
    assert len(found.pairs) == 1 and found.methods[1].of_clients
    page = web.render(found)
    assert "Spread over clients" in page and "What differs between the configurations" in page

    out = tmp_path / "one.html"
    assert call(["report", str(runs[0]), "--out", str(out), "--figures", "pdf"]) == 0
    assert "Round by round" in out.read_text() and f"report:  {out}" in capsys.readouterr().out
    assert (tmp_path / "one-rounds.pdf").read_bytes().startswith(b"%PDF")
    assert call(["report", str(runs[0]), "--out", str(out), "--score", "loss"]) == 0
    assert "loss, smaller is better" in out.read_text()
    capsys.readouterr()
    assert call(["report", str(runs[0]), "--out", str(out), "--score", "bleu"]) == 2
    assert "no run has a score named 'bleu'" in capsys.readouterr().err
    assert call(["report", str(tmp_path / "nowhere")]) == 2
    assert "is no run directory" in capsys.readouterr().err
    assert call(["report", str(runs[0]), "--out", str(out), "--figures", "gif"]) == 2


def test_a_damaged_study_is_told(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        summary.read([tmp_path])
    (tmp_path / "study.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="study format 99, expected 1"):
        summary.read([tmp_path])


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (600, True)])
def test_a_browser_shows_it_without_network(width: int, dark: bool, tmp_path: Path) -> None:
    """Drawn, not wider than the window, in the asked colours; and no request or script error is logged."""
    from PIL import Image

    scores = {"a": [0.8, 0.82, 0.81], "b": [0.7, 0.73, 0.71]}
    page = web.write(compared(scores), tmp_path / "report.html")
    picture = tmp_path / "page.png"
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    flags += ["--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'user'}"]
    flags += [f"--window-size={width},1500", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--enable-logging=stderr", f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (1500, width)
    background = pixels[-1, 2]
    assert (background.mean() < 64) if dark else (background.mean() > 240)
    # The curves of both methods are there, in their colours; nothing touches the right edge.
    for colour in ((0x6D, 0xB3, 0xFF), (0xFF, 0x9A, 0x5C)) if dark else ((0x0B, 0x6B, 0xCB), (0xD1, 0x54, 0x0A)):
        assert int((np.abs(pixels - colour).max(axis=2) < 12).sum()) > 200
    assert np.abs(pixels[:, -3:] - background).max() < 8


def test_rounds_are_whole_numbers_and_few_curves_are_marked_one_by_one() -> None:
    page = web.render(compared({"a": [0.8, 0.82, 0.81], "b": [0.7, 0.73, 0.71]}))
    rounds = page.split("<figure>")[1]
    ticks = re.findall(r'text-anchor="middle">([\d.]+)</text>', rounds)
    assert ticks == ["0", "1", "2"]
    assert rounds.count("<circle") == 6 and "a: 0.81 at 2 rounds" in rounds


def test_seeds_are_averaged_within_a_draw_and_the_spread_is_split() -> None:
    # As in the statistics' own case by hand: partition 0, interaction 1.75, seed 0.5 (here in hundredths).
    table = {"a": [[0.5, 1.5], [1.5, 2.5], [2.5, 3.5]], "b": [[2.5, 3.5], [5.5, 6.5], [2.5, 3.5]]}
    traces = {
        label: [
            trace(label, draw, [0.0, x / 10], seed=seed) for draw, row in enumerate(rows) for seed, x in enumerate(row)
        ]
        for label, rows in table.items()
    }
    found = summarise("made", "accuracy", traces, dict.fromkeys(traces, "method"))
    assert found.lines[0].by_draw == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3})
    assert found.pairs[0].gain.n == 3 and found.pairs[0].gain.mean == pytest.approx(-0.2)
    assert found.split is not None and found.split.seed is not None
    assert (found.split.partition, found.split.interaction, found.split.seed) == pytest.approx((0, 0.0175, 0.005))
    assert "partition 0 %, method x partition 78 %, training seed 22 %" in web.render(found)


def test_megabytes_are_counted_as_on_the_leaderboard() -> None:
    run = [trace("a", 0, [0.1, 0.2, 0.3], up=1024**2, down=3 * 1024**2 // 2)]
    assert "leaderboard counts: a 5.00." in web.render(summarise("made", "accuracy", {"a": run}, {"a": "method"}))
