"""A whole run on a tiny model: what it leaves on disk, and that PEFT computes what fedloom evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom
from fedloom.core import Work
from fedloom.data.batches import collate
from fedloom.errors import ConfigError, DataError, ModelError, RoundError, RunError
from fedloom.runs import export, finished
from fedloom.runs.experiment import Experiment, experiment

from ..methods.cases import RUNS, sections

Settings = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("name", RUNS)
def test_run_leaves_what_the_contract_says_and_peft_agrees(name: str, settings: Settings, tmp_path: Path) -> None:
    config = settings(**sections(name))
    result = fedloom.run(config, tmp_path / "run")

    records = result.rounds
    assert [r["round"] for r in records if r["stage"] != "personal"] == [0, 1, 2, 3]
    assert records[0]["clients"] == [] and records[0]["train_loss"] is None and "accuracy" in records[0]["eval"]
    for record in records:
        assert {"round", "clients", "dropped", "train_loss", "bytes_up", "bytes_down", "seconds"} <= record.keys()
        assert {"total", "train", "evaluate"} <= record["seconds"].keys()
    assert all(r["dropped"] == {} for r in records)
    for file in ("run.toml", "manifest.json", "rounds.jsonl", "checkpoint"):
        assert (result.path / file).exists()
    assert all(expected == found for _, expected, found in finished.verify(result.path))

    adapters = [result.adapter_dir, *sorted((result.path / "clients").glob("*/adapter"))]
    e = made(config)
    assert (len(adapters) > 1) == (e.method.personal_models or e.method.personal_phase)
    for adapter in adapters:
        if (adapter / export.GATED).exists():  # PEFT has no gates
            assert export.read(adapter).train["gate"]
            with pytest.raises(RunError, match="cannot be merged"):
                finished.export_saved(result.path, tmp_path / "merged", None, True)
            continue
        assert (adapter / "adapter_config.json").exists()
        assert_peft_agrees(e, adapter)
    if not e.method.personal_models:
        again = finished.evaluate_saved(result.path)
        last = [r for r in records if r["stage"] != "personal"][-1]["eval"]
        assert again == pytest.approx(last, abs=1e-5)


def made(config: dict[str, Any]) -> Experiment:
    """The experiment of a configuration."""
    return experiment(fedloom.RunConfig.model_validate(config))


def logits(e: Experiment, work: Work) -> torch.Tensor:
    """Of the held-out rows."""
    found = e.trainer.evaluate(work, e.rows.eval).logits
    assert found is not None
    return found


def logits_of(model: Any, e: Experiment) -> torch.Tensor:
    """Of the held-out rows, from a model of transformers or PEFT."""
    rows = e.rows.eval
    batch = collate([(rows, torch.arange(len(rows)).numpy())])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return found


def assert_peft_agrees(e: Experiment, adapter: Path) -> None:
    """The logits of PEFT's model are those that fedloom computes from the saved adapter."""
    from peft import PeftModel

    fresh = experiment(e.config)
    fresh.trainer.close()
    model = PeftModel.from_pretrained(fresh.base.model, str(adapter)).eval()
    torch.testing.assert_close(logits_of(model, e), logits(e, export.read(adapter)), atol=1e-5, rtol=0)


def test_the_evaluated_state_is_the_exported_one(settings: Settings, tmp_path: Path) -> None:
    from fedloom import checkpoint

    config = settings(method={"name": "fedex_lora"})
    result = fedloom.run(config, tmp_path / "run")
    e = made(config)
    _, state, _, done = checkpoint.load(result.path / "checkpoint")
    assert done and state["left"]
    saved = logits(e, export.read(result.adapter_dir))
    torch.testing.assert_close(saved, logits(e, e.global_model(state)), atol=1e-5, rtol=0)


def test_same_seed_same_bytes_and_another_seed_other_bytes(settings: Settings, tmp_path: Path) -> None:
    def bytes_of(seed: int, name: str) -> bytes:
        config = settings() | {"seed": seed}
        return (fedloom.run(config, tmp_path / name).adapter_dir / "adapter_model.safetensors").read_bytes()

    assert bytes_of(0, "a") == bytes_of(0, "b") != bytes_of(1, "c")


def test_causal_lm_with_generated_answers(decoder: Path, dialogues: Path, settings: Settings, tmp_path: Path) -> None:
    config = settings(
        model={"name": str(decoder)},
        task={
            "kind": "causal-lm",
            "data": str(dialogues),
            "template": "question",
            "metrics": ["perplexity", "exact_match", "rouge_l"],
            "max_new_tokens": 2,
        },
        train={"rounds": 2, "lr": 3e-2},
    )
    result = fedloom.run(config, tmp_path / "run")
    assert result.rounds[-1]["eval"]["loss"] < result.rounds[0]["eval"]["loss"]
    assert result.rounds[-1]["eval"]["perplexity"] > 1
    assert {"exact_match", "rouge_l"} <= result.eval.keys()
    assert finished.evaluate_saved(result.path) == pytest.approx(result.eval, abs=1e-5)


def test_regression(settings: Settings, tmp_path: Path) -> None:
    data = tmp_path / "scores.jsonl"
    data.write_text(
        "".join(json.dumps({"text": "how old " + "far " * (i % 5), "label": i % 5}) + "\n" for i in range(40))
    )
    result = fedloom.run(settings(task={"kind": "regression", "data": str(data)}), tmp_path / "run")
    assert {"pearson", "spearman"} <= result.eval.keys()


def test_partition_by_field_gives_one_client_a_value(settings: Settings, tmp_path: Path) -> None:
    config = settings(clients={"partition": "by-field", "field": "site"})
    del config["clients"]["count"]
    result = fedloom.run(config, tmp_path / "run")
    assert result.rounds[1]["clients"] == ["north", "south"]


def test_sampled_clients_differ_by_round_and_repeat_by_seed(settings: Settings, tmp_path: Path) -> None:
    config = settings(clients={"count": 6, "fraction": 0.5}, train={"rounds": 4, "evaluate_every": 0})
    first = [r["clients"] for r in fedloom.run(config, tmp_path / "a").rounds]
    assert first == [r["clients"] for r in fedloom.run(config, tmp_path / "b").rounds]
    assert all(len(c) == 3 for c in first[1:]) and len({tuple(c) for c in first[1:]}) > 1


def test_server_proxy_trains_on_the_server_alone(settings: Settings, questions: Path, tmp_path: Path) -> None:
    config = settings(
        method={"name": "fedlora_optimizer", "global_phase": "server_proxy"}, task={"proxy_data": str(questions)}
    )
    result = fedloom.run(config, tmp_path / "run")
    assert [r["clients"] for r in result.rounds][2] == ["server"]
    assert result.rounds[2]["stage"] == "server" and result.rounds[2]["train_loss"] > 0
    assert result.rounds[2]["bytes_up"] == result.rounds[2]["bytes_down"] == {}, "nothing crosses"
    config["task"].pop("proxy_data")
    with pytest.raises(ConfigError, match="proxy_data"):
        fedloom.run(config, tmp_path / "other")


def test_diverged_clients_are_dropped_with_a_reason_and_all_dropped_is_an_error(
    settings: Settings, tmp_path: Path
) -> None:
    config = settings(train={"lr": 1e30, "clip": 0, "rounds": 2})
    with pytest.raises(RoundError, match=r"round \d: 0 of 3 clients .* usable") as caught:
        fedloom.run(config, tmp_path / "run")
    assert caught.value.exit_code == 1
    assert json.loads((tmp_path / "run/checkpoint/latest.json").read_text())["done"] is False


WRONG: list[tuple[str, dict[str, dict[str, Any]], type[Exception], str]] = [
    ("misspelt key", {"train": {"roundz": 3}}, ConfigError, "train.roundz.*did you mean 'rounds'"),
    ("wrong type", {"train": {"lr": "fast"}}, ConfigError, "train.lr: got 'fast'"),
    ("unknown method", {"method": {"name": "fslorra"}}, ConfigError, "did you mean 'fslora'.*known: fedit"),
    (
        "unknown field",
        {"method": {"name": "fslora", "sketchy": 1}},
        ConfigError,
        "no field 'sketchy'.*did you mean 'sketch'",
    ),
    ("wrong choice", {"method": {"name": "fslora", "sketch": "ballanced"}}, ConfigError, "did you mean 'balanced'"),
    ("rank above a layer", {"lora": {"rank": 17}}, (ConfigError, ModelError), "17"),
    ("rank 0", {"lora": {"rank": 0}}, ConfigError, "lora.rank: got 0"),
    ("client rank 0", {"clients": {"ranks": [0, 2]}}, ConfigError, "rank 0, expected 1 to 4"),
    ("client rank too large", {"clients": {"ranks": [2, 8]}}, ConfigError, "rank 8, expected 1 to 4"),
    (
        "keep 0",
        {"clients": {"keep": 0.0}, "method": {"name": "fedlodrop"}},
        ConfigError,
        r"clients\.keep: got 0\.0, expected greater than 0",
    ),
    (
        "keep above 1",
        {"clients": {"keep": [0.5, 1.5]}, "method": {"name": "fedlodrop"}},
        ConfigError,
        r"clients\.keep: got 1\.5",
    ),
    ("keep unused", {"clients": {"keep": 0.5}, "method": {"name": "fedit"}}, ConfigError, "fedit follows no keep"),
    (
        "ranks unused",
        {"clients": {"ranks": [2, 4]}, "method": {"name": "fedit"}},
        ConfigError,
        "fedit follows no rank budget, got rank 2.*expected 4",
    ),
    ("two budgets", {"train": {"local_steps": 1, "local_epochs": 1}}, ConfigError, "expected one of them"),
    ("too many clients", {"clients": {"count": 1000}}, DataError, "1000"),
    ("missing column", {"task": {"label": "lable"}}, DataError, "'lable'.*did you mean 'label'"),
    ("no target", {"lora": {"targets": ["q_proj"]}}, ModelError, "q_proj"),
    ("no model", {"model": {"name": "./nowhere"}}, ModelError, "nowhere"),
    ("no data", {"task": {"data": "nowhere.csv"}}, DataError, "nowhere.csv"),
]


@pytest.mark.parametrize(("sections", "error", "match"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input_is_one_clear_error(
    sections: dict[str, dict[str, Any]], error: type[Exception], match: str, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match) as caught:
        fedloom.run(settings(**sections), tmp_path / "run")
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


def test_label_unseen_in_training(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "eval.csv").write_text("text,label\nwho is king,animal\n")
    with pytest.raises(DataError, match="animal"):
        fedloom.run(settings(task={"eval_data": str(tmp_path / "eval.csv")}), tmp_path / "run")


def test_existing_directory_is_not_touched(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        fedloom.run(settings(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_other_formats_are_refused(settings: Settings, tmp_path: Path) -> None:
    result = fedloom.run(settings(train={"rounds": 1}), tmp_path / "run")
    manifest = json.loads((result.path / "manifest.json").read_text())
    (result.path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(RunError, match="format 99"):
        fedloom.resume(result.path)


def test_verify_sees_a_changed_adapter(settings: Settings, tmp_path: Path) -> None:
    result = fedloom.run(settings(train={"rounds": 1}), tmp_path / "run")
    weights = result.adapter_dir / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert [name for name, expected, found in finished.verify(result.path) if expected != found] == ["adapter"]


def test_export_merged_model_computes_the_same(settings: Settings, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    result = fedloom.run(settings(method={"name": "fedex_lora"}), tmp_path / "run")
    finished.export_saved(result.path, tmp_path / "merged", merge=True)
    e = made(settings())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ours = logits(e, export.read(result.adapter_dir))
    torch.testing.assert_close(logits_of(model, e), ours, atol=1e-5, rtol=0)
    with pytest.raises(RunError, match="not empty"):
        finished.export_saved(result.path, tmp_path / "merged")
    with pytest.raises(RunError, match="client 'x'"):
        finished.export_saved(result.path, tmp_path / "other", client="x")
