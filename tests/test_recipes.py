"""Recipes: every file is a right run and study, and its stand-in really runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from fedloom import recipes
from fedloom.cli.main import call
from fedloom.data.tokenize import encode_causal
from fedloom.errors import ConfigError
from fedloom.runs import config as configs
from fedloom.runs.plan import plan
from fedloom.studies import cells, study

Need = Callable[[str], None]
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("small", [False, True], ids=["published", "stand-in"])
def test_every_recipe_is_a_run_and_a_study(name: str, small: bool) -> None:
    recipe = recipes.get(name)
    values = recipes.stand_in(recipe.run) if small else recipe.run
    config = configs.parse(values, name)
    plan(config)
    made = study.parse(recipe.study, name, base=values)
    cells.check(made, name)
    assert config.method.name in made.file.methods and len(made.file.methods) >= 2
    assert bool(recipes.needs(values)) is not small
    assert plan(config).method.name == plan(configs.parse(recipe.run, name)).method.name
    assert recipe.status in ("exact", "partly", "trend") and recipe.source
    assert (recipe.status == "exact") == (not recipe.gaps)
    if isinstance(recipe.target, dict):
        assert set(made.file.methods) & set(recipe.target), "no target is a method's"
    else:
        assert recipe.target == "unknown" and recipe.status == "trend"


def test_there_is_a_recipe_for_each_published_setting() -> None:
    assert len([name for name in recipes.names() if "flowertune" in name]) == 5
    assert {"fslora-glue", "fslora-commonsense", "fedlodrop-glue", "fedlora-optimizer-dolly"} <= set(recipes.names())
    assert {"lora-a2-banking77", "fedex-glue"} <= set(recipes.names())


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")  # one process converts its file for all of them
def test_flowertune_rows_are_the_protocols(need: Need) -> None:
    """One text, `{preamble}\\n### Instruction:\\n{instruction}\\n### Response: {response}`, whose loss begins behind the colon.

    SmolLM2's tokens are stored.
    """
    need("smollm2")
    from fedloom.models import huggingface

    tokenizer = huggingface.load_base("smollm2", kind="causal-lm", num_labels=1, seed=0).tokenizer
    rows = Dataset.from_dict(
        {"instruction": ["Name three colours."], "input": ["Of a flag."], "output": ["Red, white and blue."]}
    )
    name, flag, both = [5820, 1296, 14797, 30], [6228, 253, 7048, 30], [5820, 1296, 14797, 30, 3513, 253, 7048, 30]
    asked = {"general-nlp": name, "finance": both, "code": both, "medical": flag, "smollm2-flowertune": name}
    for recipe in recipes.names():
        if "flowertune" in recipe:
            task = recipes.get(recipe).run["task"]
            coded = encode_causal(rows, tokenizer, "prompt", task["response"], task["template"], task["max_length"])
            before = [
                19798, 314, 354, 5785, 338, 6601, 253, 3856, 30, 9517, 253, 2426, 338, 13674, 32873, 260, 3116, 30, 198,
                3757, 20880, 42, 198, *asked[recipe.removeprefix("flowertune-")], 198, 3757, 14212, 42,
            ]  # fmt: skip
            assert coded.tokens.tolist() == [*before, 3950, 28, 2537, 284, 4461, 30]
            assert coded.starts is not None and coded.starts.tolist() == [len(before)]
            assert tokenizer.decode(before).startswith(PREAMBLE)


def test_flowertune_is_within_its_protocol() -> None:
    fixed = {"general-nlp": (20, 0.1), "finance": (50, 0.1), "medical": (20, 0.1), "code": (10, 0.2)}
    for name, (count, fraction) in fixed.items():
        config = configs.parse(recipes.get(f"flowertune-{name}").run, name)
        assert (config.clients.count, config.clients.fraction, config.clients.partition) == (count, fraction, "iid")
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (32, 64.0, 0.075)
        assert (config.train.rounds, config.train.local_steps, config.train.batch_size) == (200, 10, 16)
        assert (config.train.lr, config.train.lr_last, config.train.schedule) == (5e-5, 1e-6, "constant")


def test_an_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fslora-glue'"):
        recipes.get("fslora-gleu")
    for command in (["run", "recipe:fslora-gleu"], ["compare", "recipe:fslora-gleu"], ["recipes", "fslora-gleu"]):
        assert call(command) == 2
        assert "did you mean 'fslora-glue'" in capsys.readouterr().err
    assert call(["run", "my.toml", "--stand-in"]) == 2
    assert "--stand-in is for recipes" in capsys.readouterr().err


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipes.names())
    assert call(["recipes", "fedex-glue"]) == 0
    assert capsys.readouterr().out == recipes.get("fedex-glue").text


def test_what_a_recipe_needs_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["run", "recipe:fedlodrop-glue", "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr()
    assert "needs model FacebookAI/roberta-large" in told.out and "needs data glue/rte" in told.out
    assert told.err.startswith("error: ") and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stand_in_runs_and_compares(need: Need, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("minilm")
    need("trec")
    run, out = tmp_path / "run", tmp_path / "out"
    assert call(["run", "recipe:lora-a2-banking77", "--stand-in", "--set", "train.rounds=1", "--out", str(run)]) == 0
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert call(["compare", "recipe:lora-a2-banking77", "--stand-in", "--draws", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "not as published: the paper's classifier is frozen" in text and (out / "report.html").exists()
