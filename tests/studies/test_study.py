"""Study files: what they say, the cells that follow, and one clear message for each way to be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import ConfigError
from fedloom.runs.config import RunConfig
from fedloom.studies import cells, study
from fedloom.studies.study import Study

Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Study]


@pytest.fixture
def write(settings: Settings, tmp_path: Path) -> Write:
    """A study on the tiny encoder, from TOML below `base`; sections change the base run."""

    def make(text: str, **sections: dict[str, Any]) -> Study:
        (tmp_path / "run.toml").write_text(RunConfig.model_validate(settings(**sections)).to_toml())
        path = tmp_path / "study.toml"
        path.write_text(f'base = "run.toml"\n{text}')
        made = study.load(path)
        cells.check(made, path.name)
        return made

    return make


def chosen(made: Study) -> dict[str, dict[str, Any]]:
    return {label: points[0] for label, points in cells.grids(made).items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"compares no methods.*\[methods.fslora\]"),
        ("[methods.fslorra]", r"\[methods.fslorra\]: unknown method 'fslorra'; did you mean 'fslora'"),
        ("[methods.x]", r"\[methods.x\]: unknown method 'x'"),
        ("[methods.fslora]\nsketchy = 1", r"\[methods.fslora\]: fslora has no field 'sketchy'; did you mean 'sketch'"),
        ("[methods.fedit]\ngrid.train.lr = []", r"grid.train.lr is \[\], expected a list of values"),
        ("[methods.fedit]\ngrid.train.lr = 0.1", r"grid.train.lr is 0.1.*for one value write set.train.lr"),
        ("[methods.fedit]\nset.train.lrr = 0.1", r"unknown key 'train.lrr'; did you mean 'lr'"),
        ("[methods.fedit]\ngrid.train.lr = [0.1, -1.0]", r"train.lr: got -1.0"),
        ("[methods.fedit]\nset.clients.ranks = [2, 4]", r"\[methods.fedit\]: fedit follows no rank budget"),
        ("draws = 1\nstatistics = true\n[methods.fedit]", r"statistics = true with draws = 1.*at least 2 draws"),
        ("draws = 0\n[methods.fedit]", r"draws: got 0"),
        ("drawz = 5\n[methods.fedit]", r"unknown key 'drawz'; did you mean 'draws'"),
        ("seeds = [1, 1]\n[methods.fedit]", r"seeds is \[1, 1\], expected different whole numbers"),
        ('score = "f2"\n[methods.fedit]', r"score is 'f2', the run has: accuracy, macro_f1, loss"),
        ("budget.rounds = 9\n[methods.fedit]", r"no method reaches the budget of 9 rounds, they train 3 at most"),
        (
            "budget.rounds = 2\nbudget.bytes = 5\n[methods.fedit]",
            r"expected one of bytes, seconds, joules, rounds, samples",
        ),
        ("budget.joules = 2\n[methods.fedit]", r"joules needs a simulated network"),
        (
            "controls.grid.train.lr = []\n[methods.fedit]",
            r"\[controls\]: grid.train.lr is \[\], expected a list of values",
        ),
        ("[methods.pooled]", r"none of the controls'"),
        ('[methods."../x"]', r"a label is letters, digits"),
    ],
)
def test_wrong_study_files_are_one_clear_message(text: str, message: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=f"^.*study.toml.*{message}"):
        write(text)


def test_a_missing_base_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base is 'nowhere\.toml', expected a run file"):
        study.parse({"base": "nowhere.toml", "methods": {"fedit": {}}}, "s.toml", tmp_path)
    with pytest.raises(ConfigError, match="there is no study file"):
        study.load(tmp_path / "nowhere.toml")


def test_the_quickstart_is_the_default_base() -> None:
    made = study.parse({"methods": {"fslora": {}}}, "s.toml")
    assert made.base["model"]["name"] == "minilm" and made.file.draws == 5 and made.score == "accuracy"


def test_every_draw_is_shared_by_all_methods_and_controls(write: Write) -> None:
    made = write(
        "draws = 2\n[methods.fedit]\n[methods.fslora]\nset.clients.ranks = [2, 4, 4]", clients={"split_seed": 7}
    )
    found = cells.cells(made, chosen(made))
    assert [(c.label, c.draw) for c in found] == [
        (label, draw) for draw in (0, 1) for label in ("fedit", "fslora", "alone", "pooled")
    ]
    for cell in found:
        config = cell.config()
        assert (config.split_seed, config.seed) == (7 + cell.draw, cell.draw)
    ranks = {c.label: c.config().clients.ranks for c in found}
    assert ranks == {"fedit": None, "fslora": [2, 4, 4], "alone": None, "pooled": None}
    assert len({c.key for c in found}) == len(found)


def test_training_seeds_are_crossed_with_draws(write: Write) -> None:
    made = write("draws = 2\nseeds = [3, 4]\n[methods.fedit]")
    found = [c for c in cells.cells(made, chosen(made)) if c.role == "method"]
    assert [(c.config().split_seed, c.config().seed) for c in found] == [(0, 3), (0, 4), (1, 3), (1, 4)]


def test_a_grid_is_tuned_on_draws_of_its_own(write: Write) -> None:
    made = write(
        "draws = 2\ntuning.draws = 2\n[methods.fedit]\ngrid.train.lr = [0.1, 0.2]\ngrid.lora.rank = [2]\n[methods.fslora]"
    )
    tuning = [c for c in cells.tuning_cells(made) if c.label == "fedit"]
    assert [(c.point, c.config().train.lr, c.config().lora.rank) for c in tuning] == 2 * [
        ({"train.lr": lr, "lora.rank": 2}, lr, 2) for lr in (0.1, 0.2)
    ]
    scored = {c.config().split_seed for c in cells.cells(made, chosen(made))}
    assert not scored & {c.config().split_seed for c in tuning}


def test_controls_train_as_much_as_the_clients_together(write: Write) -> None:
    made = write("draws = 2\n[methods.fedlodrop]", train={"local_steps": 5}, clients={"fraction": 0.5, "keep": 0.5})
    pooled, alone = (
        next(c for c in cells.cells(made, chosen(made)) if c.label == x).config() for x in ("pooled", "alone")
    )
    assert (pooled.clients.count, pooled.clients.keep, pooled.train.local_steps) == (1, 1.0, 10)
    assert (alone.clients.count, alone.clients.fraction, alone.train.local_steps) == (3, 1.0, 5)


def test_controls_have_learning_rates_of_their_own(write: Write) -> None:
    def rates(text: str) -> dict[str, list[float]]:
        points = cells.grids(write(text, train={"lr": 0.4}))
        return {label: [point["train.lr"] for point in points[label]] for label in ("alone", "pooled")}

    assert rates("[methods.fedit]") == {"alone": [0.4], "pooled": [0.1, 0.4]}
    tuned = "[methods.fedit]\ngrid.train.lr = [0.2, 0.3]\n[methods.fslora]\ngrid.train.lr = [0.1, 0.2]"
    assert rates(tuned) == {"alone": [0.1, 0.2, 0.3], "pooled": [0.1, 0.2, 0.3]}
    assert rates(f"controls.grid.train.lr = [0.5]\n{tuned}") == {"alone": [0.5], "pooled": [0.5]}


def test_controls_may_be_trained_on_fewer_draws(write: Write) -> None:
    made = write("draws = 3\ncontrols.draws = 1\n[methods.fedit]")
    found = [(c.label, c.draw) for c in cells.cells(made, chosen(made))]
    assert found == [("fedit", 0), ("alone", 0), ("pooled", 0), ("fedit", 1), ("fedit", 2)]


def test_other_settings_have_another_directory_and_the_same_ones_the_same(write: Write) -> None:
    first, again = write("[methods.fedit]"), write("draws = 9\n[methods.fedit]\n[methods.fslora]")
    other = write("[methods.fedit]\nset.train.lr = 0.5")
    key = [next(c.key for c in cells.cells(m, chosen(m)) if c.label == "fedit") for m in (first, again, other)]
    assert key[0] == key[1] != key[2]


def test_wrappers_and_quoted_keys(write: Write) -> None:
    made = write(
        '[methods.wrapped]\nname = "fslora"\nover = { name = "fedex_lora" }\nset = { "train.lr" = 0.5 }\n'
        '[methods."two words"]\nname = "fedit"'
    )
    config = next(iter(cells.cells(made, chosen(made)))).config()
    assert config.train.lr == 0.5
    assert json.loads(json.dumps(config.method.model_dump()))["over"] == {"name": "fedex_lora"}


ROOT = Path(__file__).parents[2]
WRITTEN = [
    path
    for path in (*ROOT.glob("benchmarks/studies/*.toml"), ROOT / "examples/study.toml")
    if path.stem not in ("base", "base-decoder", "fleet")
]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_studies_of_the_repository_are_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    made = study.load(path)
    cells.check(made, path.name)
    assert made.file.draws >= 5 and len(made.file.methods) >= 2


def test_the_study_at_equal_bytes_plans_equal_ranks_times_rounds() -> None:
    made = study.load(ROOT / "benchmarks/studies/bytes.toml")
    planned = {c.label: c.config() for c in cells.cells(made, chosen(made)) if c.role == "method" and c.draw == 0}
    ranks = {label: c.clients.ranks or 4 * [c.lora.rank] for label, c in planned.items()}
    sent = {label: sum(ranks[label]) * c.train.rounds for label, c in planned.items()}  # type: ignore[arg-type]
    assert set(sent.values()) == {96} and len(sent) == 5


def test_the_example_in_the_documentation_is_right(settings: Settings, tmp_path: Path) -> None:
    text = (ROOT / "docs/compare.md").read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "study.toml").write_text(text)
    values = settings(lora={"rank": 8}, clients={"ranks": [2, 4, 8]})
    (tmp_path / "run.toml").write_text(RunConfig.model_validate(values).to_toml())
    made = study.load(tmp_path / "study.toml")
    cells.check(made, "study.toml")
    assert list(made.file.methods) == ["fedit", "fslora", "fslora over fedex"] and made.file.budget is not None
