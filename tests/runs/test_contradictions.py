"""What is wrong with a run file is told before anything is written, and an option that would be ignored is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.errors import ConfigError, DataError, FedloomError
from fedloom.models import huggingface
from fedloom.runs import config as configs
from fedloom.runs.contradictions import refuse_contradictions
from fedloom.runs.plan import plan

Settings = Callable[..., dict[str, Any]]

IGNORED: list[tuple[str, dict[str, dict[str, Any]]]] = [
    ("train.momentum", {"train": {"momentum": 0.9}}),
    ("train.int8_products", {"train": {"int8_products": True}, "model": {"quantization": "nf4"}}),
    ("engine.wire", {"engine": {"wire": "int8"}}),
    ("engine.deadline_s", {"engine": {"deadline_s": 5.0}}),
    ("engine.superlink", {"engine": {"superlink": "h:1"}}),
    ("engine.nodes", {"engine": {"nodes": 2}}),
    ("engine.oversample", {"engine": {"oversample": 0.5}}),
    ("engine.root_certificates", {"engine": {"root_certificates": "ca.crt"}}),
    ("engine.patience_s", {"engine": {"patience_s": 5.0}}),
    ("engine.workers", {"engine": {"workers": 2}}),
    ("engine.address", {"engine": {"name": "flower", "address": "h:1"}}),
    ("model.device", {"model": {"device": "split"}}),
    ("engine.cohort", {"engine": {"name": "flower", "cohort": 8}}),
    ("engine.nodes", {"engine": {"name": "flower", "superlink": "h:1", "nodes": 2}}),
    ("engine.root_certificates", {"engine": {"name": "flower", "root_certificates": "ca.crt"}}),
    ("clients.field", {"clients": {"field": "site"}}),
    ("clients.alpha", {"clients": {"alpha": 0.1}}),
    ("clients.classes_per_client", {"clients": {"classes_per_client": 1}}),
    ("task.prompt", {"task": {"prompt": "text"}}),
    ("task.response", {"task": {"response": "text"}}),
    ("task.template", {"task": {"template": "alpaca"}}),
    ("task.label", {"task": {"kind": "causal-lm", "label": "site"}}),
    ("task.text", {"task": {"kind": "causal-lm", "text": "prompt"}}),
    ("task.max_new_tokens", {"task": {"kind": "causal-lm", "max_new_tokens": 3}}),
    ("task.proxy_data", {"task": {"proxy_data": "x.csv"}}),
    ("clients.ranks", {"clients": {"ranks": [1, 2, 3, 4]}}),
    ("clients.keep", {"clients": {"keep": [1.0, 1.0, 1.0, 1.0]}}),
    ("engine.quorum", {"engine": {"quorum": 99}}),
    ("engine.quorum", {"engine": {"quorum": 2}, "clients": {"fraction": 0.3}}),
]


@pytest.mark.parametrize(("key", "sections"), IGNORED, ids=[f"{i}-{key}" for i, (key, _) in enumerate(IGNORED)])
def test_an_option_that_would_be_ignored_is_refused(
    key: str, sections: dict[str, dict[str, Any]], settings: Settings, tmp_path: Path
) -> None:
    values = settings(**sections)
    values["task"] = {"data": "unread.csv"} | sections.get("task", {})
    with pytest.raises(ConfigError, match=rf"cannot follow: {key} ") as caught:
        fedloom.run(values, tmp_path / "run")
    assert not (tmp_path / "run").exists() and len(str(caught.value).splitlines()) == 1


def test_all_of_them_are_named_at_once(settings: Settings, tmp_path: Path) -> None:
    wrong = {key: value for key, value in [("wire", "int8"), ("nodes", 2), ("quorum", 9)]}
    with pytest.raises(ConfigError) as caught:
        fedloom.run(settings(engine=wrong, train={"momentum": 0.5}), tmp_path / "run")
    told = str(caught.value).splitlines()
    assert len(told) == 5 and all(any(key in line for line in told) for key in ("momentum", *wrong))


def test_a_resolved_run_file_names_every_default_and_is_accepted(settings: Settings) -> None:
    config = configs.parse(settings(), "it")
    refuse_contradictions(plan(configs.parse(configs.toml.loads(config.to_toml(), "it"), "it")), engine="inprocess")


def test_a_quorum_above_the_clients_of_a_field(settings: Settings, tmp_path: Path) -> None:
    by_field = settings(clients={"partition": "by-field", "field": "site"}, engine={"quorum": 3})
    del by_field["clients"]["count"]
    with pytest.raises(ConfigError, match=r"quorum is 3, but a round asks 2 of 2 clients"):
        fedloom.run(by_field, tmp_path / "run")
    assert not (tmp_path / "run").exists()


METRICS = [
    (["nonsense"], {}, "there is no metric 'nonsense'"),
    (["acuracy"], {}, "did you mean 'accuracy'"),
    (["rouge_l"], {}, "rouge_l scores a causal-lm"),
    (["perplexity"], {}, "perplexity scores a causal-lm"),
    (["pearson"], {}, "pearson scores a regression"),
    (["accuracy"], {"kind": "regression"}, "accuracy scores a classification"),
    (["accuracy"], {"kind": "causal-lm"}, "accuracy scores a classification"),
    (["f1"], {}, "f1 is for two classes, and the data has 3"),
]


@pytest.mark.parametrize(
    ("names", "task", "match"), METRICS, ids=[f"{n[0]}-{i}" for i, (n, _, _) in enumerate(METRICS)]
)
def test_wrong_metrics_are_told_before_the_model_is_loaded(
    names: list[str],
    task: dict[str, Any],
    match: str,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface, "load_base", lambda *args, **options: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=match):
        fedloom.run(settings(task={"metrics": names, **task}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_flower_is_there_before_anything_is_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = {"name": "flower", "superlink": "h:1", "root_certificates": "nowhere.crt"}
    with pytest.raises(ConfigError, match=r"there is no file 'nowhere\.crt'"):
        fedloom.run(settings(engine=engine), tmp_path / "run")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match=r"is not installed, which engine\.name = 'flower' needs"):
        fedloom.run(settings(engine={"name": "flower"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


LATE: list[tuple[dict[str, dict[str, Any]], type[FedloomError], str]] = [
    ({"task": {"eval_data": "eval.csv"}}, DataError, "label 'animal'"),
    ({"task": {"text": ["text", "site", "label"]}}, DataError, "got 3 text columns"),
    ({"task": {"kind": "regression"}}, DataError, "regression needs finite numbers"),
    ({"network": {"fleet": "nowhere.toml"}}, ConfigError, "nowhere.toml"),
    ({"clients": {"keep": "nowhere.json"}}, ConfigError, "nowhere.json"),
]


@pytest.mark.parametrize(("sections", "error", "match"), LATE)
def test_what_the_rows_show_is_told_before_anything_is_written(
    sections: dict[str, dict[str, Any]],
    error: type[FedloomError],
    match: str,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "eval.csv").write_text("text,label\nwho is king,animal\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        fedloom.run(settings(**sections), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["eval.csv"]
