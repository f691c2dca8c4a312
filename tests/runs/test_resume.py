"""Killed at any instant, a run goes on to the bytes of one that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.errors import RunError
from fedloom.runs.run import Observer

Settings = Callable[..., dict[str, Any]]

# A test session in the background inherits an ignored SIGINT, which Python then leaves ignored: take it back.
COMMAND_LINE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from fedloom.cli.main import main; main()"
)


def adapters(run: Path) -> dict[str, bytes]:
    """Every adapter file of a run."""
    files = [*run.glob("adapter/*"), *run.glob("clients/*/adapter/*")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def killed(config: dict[str, Any], out: Path, call: int) -> bool:
    """Run in a child that gets SIGKILL at the `call`-th rename, sync or write of a file; False if it ended before that."""
    child = os.fork()
    if child == 0:
        left = call

        def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
            def call_or_die(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call_or_die

        os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
        Path.unlink = deadly(Path.unlink)  # type: ignore[method-assign]
        try:
            fedloom.run(config, out) if not (out / "run.toml").exists() else fedloom.resume(out)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("name", ["fslora", "fedsa_lora", "fedlora_optimizer"])
def test_kill_at_every_step_of_writing(name: str, settings: Settings, tmp_path: Path) -> None:
    config = settings(method={"name": name}, train={"rounds": 2, "evaluate_every": 0})
    want = adapters(fedloom.run(config, tmp_path / "whole").path)
    call, died = 1, True
    while died:
        out = tmp_path / f"killed-{call}"
        died = killed(config, out, call)
        if (out / "run.toml").exists():
            fedloom.resume(out)
        else:
            assert died
            fedloom.run(config, out)
        assert adapters(out) == want, f"killed at call {call}"
        rounds = [record["round"] for record in fedloom.resume(out).rounds]
        assert rounds == sorted(set(rounds)) and rounds[:3] == [0, 1, 2]
        # Every point of a round's writing is hit once; steps grow so that the test stays short.
        call += 1 if call < 12 else 5
    assert call > 20


def test_killed_again_while_resuming(settings: Settings, tmp_path: Path) -> None:
    config = settings(method={"name": "fedsa_lora"}, train={"rounds": 3, "evaluate_every": 0})
    want = adapters(fedloom.run(config, tmp_path / "whole").path)
    out = tmp_path / "killed"
    for call in (14, 9, 17):
        killed(config, out, call)
    assert adapters(fedloom.resume(out).path) == want


def test_ctrl_c_ends_within_two_seconds_and_resumes(settings: Settings, tmp_path: Path) -> None:
    config = settings(train={"rounds": 40, "evaluate_every": 0})
    whole = fedloom.run(config, tmp_path / "whole")
    file = tmp_path / "run.toml"
    file.write_text(fedloom.RunConfig.model_validate(config).to_toml())
    out = tmp_path / "stopped"
    command = [sys.executable, "-c", COMMAND_LINE, "run", str(file), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (out / "rounds.jsonl").exists() or len((out / "rounds.jsonl").read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - asked < 2
    assert process.returncode == 130
    assert errors.strip() == f"interrupted; go on with: fedloom resume {out}"
    assert adapters(fedloom.resume(out).path) == adapters(whole.path)


def test_two_processes_cannot_train_in_one_directory(settings: Settings, tmp_path: Path) -> None:
    from fedloom.runs.run_directory import RunDirectory

    out = fedloom.run(settings(train={"rounds": 1}), tmp_path / "run").path
    with RunDirectory.open(out).held(), pytest.raises(RunError, match="another process"):
        fedloom.resume(out)


def test_resume_of_nothing_and_of_a_damaged_checkpoint(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run\.toml"):
        fedloom.resume(tmp_path)
    out = fedloom.run(settings(train={"rounds": 1}), tmp_path / "run").path
    state = max((out / "checkpoint").glob("state-*"))
    state.write_bytes(state.read_bytes()[:-3])
    with pytest.raises(RunError, match="damaged"):
        fedloom.resume(out)
    (out / "checkpoint" / "latest.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        fedloom.resume(out)


def test_full_disk_is_one_error_and_the_run_resumes(settings: Settings, tmp_path: Path) -> None:
    import errno

    config = settings(train={"rounds": 3, "evaluate_every": 0})
    want = adapters(fedloom.run(config, tmp_path / "whole").path)
    for call in (5, 9, 14):
        out, left, sync = tmp_path / f"full-{call}", call, os.fsync

        def full(handle: int) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(handle)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match=r"No space left.*resume"):
            patch.setattr(os, "fsync", full)
            fedloom.run(config, out)
        assert adapters(fedloom.resume(out).path) == want


def done(settings: Settings, tmp_path: Path, **sections: dict[str, Any]) -> Path:
    """A finished run of three rounds."""
    return fedloom.run(settings(train={"rounds": 3, "evaluate_every": 0}, **sections), tmp_path / "run").path


def unfinished(run: Path, t: int = 2) -> None:
    """Take a finished run back to a round, as if it had been stopped there."""
    latest = run / "checkpoint" / "latest.json"
    latest.write_bytes((run / "checkpoint" / f"round-{t:06d}.json").read_bytes())


def test_what_changed_is_named_and_needs_consent(
    settings: Settings, questions: Path, encoder: Path, tmp_path: Path
) -> None:
    data, model = tmp_path / "mine.csv", tmp_path / "model"
    data.write_bytes(questions.read_bytes())
    shutil.copytree(encoder, model)
    run = done(settings, tmp_path, task={"data": str(data)}, model={"name": str(model)})
    unfinished(run)
    rows = data.read_text().splitlines()
    before = {path: path.read_bytes() for path in (data, run / "run.toml", *model.iterdir())}

    def damaged(path: Path, content: bytes) -> dict[str, Any]:
        path.write_bytes(content)
        with pytest.raises(RunError, match="accept-changes") as caught:
            fedloom.resume(run)
        path.write_bytes(before[path])
        return {"message": str(caught.value)}

    swapped = [
        rows[0],
        *(
            line.replace(",person,", ",x,").replace(",place,", ",person,").replace(",x,", ",place,")
            for line in rows[1:]
        ),
    ]
    assert "data" in damaged(data, "\n".join(swapped).encode())["message"]
    assert "data" in damaged(data, "\n".join(rows[:-20]).encode())["message"]
    (weights,) = model.glob("*.safetensors")
    changed = bytearray(before[weights])
    changed[-2] ^= 1
    assert "model" in damaged(weights, bytes(changed))["message"]
    shape = json.loads(before[model / "config.json"])
    epsilon = json.dumps(shape | {"layer_norm_eps": 1e-3}).encode()
    assert "model_config" in damaged(model / "config.json", epsilon)["message"]
    cuts = json.loads(before[model / "tokenizer.json"])
    cuts["normalizer"] = {"type": "Lowercase"}
    assert "tokenizer" in damaged(model / "tokenizer.json", json.dumps(cuts).encode())["message"]
    for old, new in (("seed = 0", "seed = 1"), ("lr = 0.01", "lr = 0.02"), ('name = "fslora"', 'name = "fedit"')):
        text = before[run / "run.toml"].decode()
        assert old in text
        assert "config" in damaged(run / "run.toml", text.replace(old, new).encode())["message"]
    (run / "run.toml").write_text(before[run / "run.toml"].decode().replace("lr = 0.01", "lr = 0.02"))
    fedloom.resume(run, accept_changes=True)
    (accepted,) = json.loads((run / "manifest.json").read_text())["accepted_changes"]
    assert list(accepted["changed"]) == ["config"] and len(set(accepted["changed"]["config"])) == 2


def test_what_clients_keep_is_known_by_its_hash(settings: Settings, tmp_path: Path) -> None:
    run = done(settings, tmp_path, method={"name": "fedsa_lora"})
    unfinished(run)
    first, second = sorted((run / "checkpoint" / "kept").glob("client-[01]-000002.safetensors"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other), second.write_bytes(one)
    with pytest.raises(RunError, match=r"client-0-000002.*not what the checkpoint names"):
        fedloom.resume(run)
    second.write_bytes(other), first.write_bytes(one[:-1] + bytes([one[-1] ^ 1]))
    with pytest.raises(RunError, match="client-0-000002"):
        fedloom.resume(run)
    first.write_bytes(one)
    fedloom.resume(run)


@pytest.mark.parametrize("name", ["fedit", "fedsa_lora", "fedlora_optimizer"])
def test_a_missing_or_damaged_adapter_is_made_again(name: str, settings: Settings, tmp_path: Path) -> None:
    run = done(settings, tmp_path, method={"name": name})
    want = adapters(run)
    for path in [run / "adapter", *sorted(run.glob("clients/*/adapter"))[:1]]:
        (path / "adapter_model.safetensors").write_bytes(b"")
        fedloom.resume(run)
        assert adapters(run) == want
        shutil.rmtree(path)
        fedloom.resume(run)
        assert adapters(run) == want
    records = [record["round"] for record in fedloom.resume(run).rounds]
    assert records == [0, 1, 2, 3, *([4] if name == "fedlora_optimizer" else [])]


def test_the_last_checkpoints_can_be_gone_back_to(settings: Settings, tmp_path: Path) -> None:
    run = done(settings, tmp_path, method={"name": "fedsa_lora"}, run={"keep_checkpoints": 3})
    want = adapters(run)
    states = sorted(path.name for path in (run / "checkpoint").glob("round-*"))
    assert states == [f"round-00000{t}.json" for t in (1, 2, 3)]
    (run / "checkpoint" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="no checkpoint of round 0, expected one of 1, 2, 3"):
        fedloom.resume(run, back_to=0)
    fedloom.resume(run, back_to=1)
    assert adapters(run) == want and (run / "checkpoint" / "mine.txt").exists()
    assert [record["round"] for record in fedloom.resume(run).rounds] == [0, 1, 2, 3]


def test_a_damaged_record_costs_no_other(settings: Settings, tmp_path: Path) -> None:
    run = done(settings, tmp_path)
    unfinished(run)
    lines = (run / "rounds.jsonl").read_bytes().splitlines()
    (run / "rounds.jsonl").write_bytes(b"\n".join([lines[0], b"\xff garbage {", b"{}", b"5", lines[2]]) + b"\n")
    assert [record["round"] for record in fedloom.resume(run).rounds] == [0, 2, 3]


def test_a_run_that_was_moved_writes_nowhere_else(settings: Settings, tmp_path: Path) -> None:
    config = settings(train={"rounds": 3, "evaluate_every": 0})
    want = adapters(fedloom.run(config, tmp_path / "whole").path)

    class Mover(Observer):
        def round(self, record: dict[str, Any]) -> None:
            if record["round"] == 2:
                (tmp_path / "run").rename(tmp_path / "elsewhere")

    with pytest.raises(RunError, match="moved or removed"):
        fedloom.run(config, tmp_path / "run", Mover())
    assert not (tmp_path / "run").exists()
    assert adapters(fedloom.resume(tmp_path / "elsewhere").path) == want


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b'{"format": 2, "round": "x"}', b"9" * 5000])
def test_damaged_checkpoints_and_manifests_are_one_error(content: bytes, settings: Settings, tmp_path: Path) -> None:
    run = done(settings, tmp_path)
    manifest = (run / "manifest.json").read_bytes()
    (run / "checkpoint" / "latest.json").write_bytes(content)
    with pytest.raises(RunError, match="--round 2"):
        fedloom.resume(run)
    unfinished(run)
    (run / "manifest.json").write_bytes(content if content != b"[]" else b"5")
    with pytest.raises(RunError):
        fedloom.resume(run)
    (run / "manifest.json").write_bytes(manifest)
    fedloom.resume(run)
