"""lm-evaluation-harness scores a saved adapter: its own task file, against the scores that fedloom finds in process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.cli.main import call
from fedloom.errors import ConfigError

pytest.importorskip("lm_eval")
from fedloom.runs.harness import evaluate_tasks

TASK = """
task: ours
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "Question : {{q}} Answer :"
doc_to_choice: "{{c}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_harness_and_fedloom_score_alike(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "ours.jsonl"
    rows = [{"q": f"w{i} w{i + 1}", "c": [f"w{i + 2} w3 w4", f"w{2 * i}", "yes no"], "a": i % 3} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ours.yaml").write_text(TASK.replace("FILE", str(file)))
    told = fedloom.run(
        {
            "model": {"name": str(decoder), "dtype": "float32"},
            "task": {
                "kind": "causal-lm",
                "data": str(file),
                "eval_data": str(file),
                "template": "Question : {q} Answer : {response}{end}",
                "response": "a",
                "choices": "c",
                "metrics": ["choice", "choice_per_char"],
            },
            "clients": {"count": 2},
            "method": {"name": "fedit"},
            "train": {"rounds": 2, "lr": 5e-2},
        },
        tmp_path / "run",
    ).eval
    assert call(["evaluate", str(tmp_path / "run"), "--tasks", str(tmp_path / "ours.yaml")]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ours ")]
    assert shown == [f"ours acc {told['choice']:.6f}", f"ours acc_norm {told['choice_per_char']:.6f}"]
    with pytest.raises(ConfigError, match="no task 'arc_esy'; did you mean 'arc_easy'"):
        evaluate_tasks(tmp_path / "run", ["arc_esy"])
    (tmp_path / "none.yaml").write_text("a: b")
    with pytest.raises(ConfigError, match="expected a line `task: NAME`"):
        evaluate_tasks(tmp_path / "run", [str(tmp_path / "none.yaml")])


def test_tasks_are_for_models_that_write(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fedloom.run(settings(train={"rounds": 0}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"is a classification, expected a run of task\.kind = 'causal-lm'"):
        evaluate_tasks(tmp_path / "run", ["arc_easy"])
