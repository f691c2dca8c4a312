"""Killed at any instant, a run goes on to the bytes of one that was never stopped."""

from __future__ import annotations

import os
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
    (state,) = (out / "checkpoint").glob("state-*")
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
