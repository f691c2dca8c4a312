"""The command line as a user meets it: output, exit codes, one message for an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom import methods
from fedloom.cli.main import app, call
from fedloom.cli.show import out as console
from fedloom.runs.run import Observer, start

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def file(settings: Settings, tmp_path: Path) -> Path:
    """A run file on the tiny encoder."""
    path = tmp_path / "my.toml"
    path.write_text(fedloom.RunConfig.model_validate(settings(train={"rounds": 2})).to_toml())
    return path


def test_run_evaluate_export_verify_sensitivity(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    chosen = ["--set", "method.name=fedit", "--set", "train.lr=2e-2", "--set", "task.text=text"]
    assert call(["run", str(file), *chosen, "--out", run]) == 0
    text = capsys.readouterr().out
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("round ")] == [
        "round 0",
        "round 1",
        "round 2",
    ]
    assert f"adapter: {run}/adapter" in text and f"fedloom evaluate {run}" in text
    assert f"fedloom run {file} --set method.name=" in text
    config = (tmp_path / "run" / "run.toml").read_text()
    assert 'name = "fedit"' in config and "lr = 0.02" in config

    assert call(["evaluate", run]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    last = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[-1])["eval"]
    assert {name: float(x) for name, x in shown.items()} == pytest.approx(last, abs=1e-5)

    assert call(["export", run, str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    capsys.readouterr()
    assert call(["verify", run]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"ok"}
    (tmp_path / "run" / "run.toml").write_text(config + "\n")
    assert call(["verify", run]) == 1
    assert "WRONG config" in capsys.readouterr().out

    assert call(["sensitivity", run]) == 0
    report = capsys.readouterr().out
    assert len([line for line in report.splitlines() if line.split()[:1][0:] and line.split()[0] in
                ("col", "row", "rank", "feature")]) == 16  # fmt: skip
    assert "1.7" in report and "41" in report and "convention unknown" in report
    assert call(["resume", run]) == 0


def test_verify_of_an_unfinished_run(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(Observer):
        def round(self, record: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(fedloom.RunConfig.model_validate(settings()), tmp_path / "run", Stopped())
    assert call(["verify", str(tmp_path / "run")]) == 0
    said = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["-", "adapter:"] in said and ["ok", "adapter"] not in said and ["ok", "config"] in said


@pytest.mark.parametrize("width", [60, 100, 160])
def test_methods_are_listed_for_any_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", width)
    assert call(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    listed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert sorted(listed) == sorted(methods.names()), "each once, its name whole"
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings[0] == "averaging" and "robust means, over another method" in headings


def test_a_method_is_explained_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    for name in methods.names():
        assert call(["methods", name]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert " ".join(methods.get(name).paper.split()) in text and "rank" in text and "alpha" in text
    assert call(["methods", "fslora"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "a random k-subset" in text and 'sketch "uniform" of "uniform" | "balanced" | "importance"' in text
    assert "importance_mix 0.5 float, above 0, at most 1" in text


def test_methods_as_json_hold_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["methods", "--json"]) == 0
    said = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert list(said) == methods.names()
    assert said["fedex_lora"]["down"] == ["A", "B", "head", "left", "right"]
    assert call(["methods", "fedex_lora", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == said["fedex_lora"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "fslorra"], "did you mean 'fslora'"),
        (["run", "nowhere.toml"], "no run file nowhere.toml"),
        (["resume", "nowhere"], "nowhere is no run directory"),
        (["verify", "nowhere"], "nowhere is no run directory"),
        (["run", "--set", "train.rounds"], "expected KEY=VALUE"),
        (["run", "--set", "train.roundz=3"], "did you mean 'rounds'"),
        (["run", "--sett", "x"], "No such option"),
        (["trian"], "trian"),
    ],
)
def test_wrong_input_is_one_message_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert "Traceback" not in captured.err and captured.out == ""


def test_broken_toml_and_broken_jsonl_name_the_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = 0\n[model\n")
    assert call(["run", str(broken)]) == 2
    assert "line 2" in capsys.readouterr().err
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "who", "label": "a"}\n{"text": "wh\n')
    assert call(["run", str(file), "--set", f"task.data={data}", "--out", str(tmp_path / "r")]) == 2
    assert "line 2" in capsys.readouterr().err
    data.write_text("")
    assert call(["run", str(file), "--set", f"task.data={data}", "--out", str(tmp_path / "s")]) == 2
    assert "empty" in capsys.readouterr().err


def test_a_hub_that_is_not_reached_is_one_error(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("model.name=someone/some-model", "task.data=someone/some-data", "task.data=glue/cola"):
        assert call(["run", str(file), "--set", key, "--out", str(tmp_path / key.replace("/", "-"))]) == 2
        captured = capsys.readouterr().err
        assert captured.startswith("error: ") and "hub" in captured.lower() and "Traceback" not in captured


def commands() -> list[str]:
    return [str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback]


@pytest.mark.parametrize("command", commands())
def test_help_fits_80_columns_and_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: fedloom {command}" in " ".join(text.split()) and f"Usage: fedloom {command}" in text
    assert max(map(len, text.splitlines())) <= 80 and "..." not in text.replace("RUN...|STUDY", "") and "\\" not in text
    for line in text.partition("Arguments:")[2].partition("Options:")[0].splitlines():
        assert not line or len(line.split()) > 1, "an argument says what it is"


def test_the_list_of_commands_has_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "..." not in text.partition("Commands:")[2]
    assert all(f"\n  {command} " in text for command in commands())


def test_the_shell_completes_commands() -> None:
    told = {"_FEDLOOM_COMPLETE": "complete_bash", "COMP_WORDS": "fedloom me", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from fedloom.cli.main import main; main()"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | told,
    )
    assert done.stdout.split() == ["methods"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fedloom.cli.main import call; call(['--help']); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'flwr') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"
