from __future__ import annotations

import builtins
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import checkpoint
from fedloom.checkpoint import ClientStates
from fedloom.errors import RunError
from fedloom.state import State


def state(t: int) -> State:
    return {
        "A": {"layers.0.q/proj": torch.full((2, 3), float(t)), "e": torch.zeros(2, 0)},
        "B": {"layers.0.q/proj": torch.randn(4, 2, generator=torch.Generator().manual_seed(t)).double()},
        "mask": {"seed": torch.tensor([2**62 + t])},
        "ranks": {"c": torch.tensor(t), "half": torch.ones(2, dtype=torch.bfloat16)},
    }


def same(a: State, b: State) -> bool:
    return {role: set(group) for role, group in a.items()} == {role: set(group) for role, group in b.items()} and all(
        x.dtype == b[role][site].dtype and torch.equal(x, b[role][site])
        for role, group in a.items()
        for site, x in group.items()
    )


def own(k: str, t: int) -> State:
    return {"B": {"s": torch.full((2, 2), float(10 * t + ord(k)))}}


def save(folder: Path, t: int, kept: ClientStates) -> None:
    for k in "ab":
        kept.put(k, own(k, t), t)
    checkpoint.save(folder, t, state(t), kept)


def check(folder: Path, *rounds: int) -> int:
    """The checkpoint is whole and of one of the rounds."""
    t, got, kept, done = checkpoint.load(folder)
    assert t in rounds and not done
    assert same(got, state(t))
    assert kept.clients() == ["a", "b"]
    for k in "ab":
        stored = kept.get(k)
        assert stored is not None and same(stored, own(k, t))
    return t


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoint"
    kept = ClientStates(folder / "kept")
    assert kept.get("a") is None and kept.clients() == []
    save(folder, 3, kept)
    assert check(folder, 3) == 3
    save(folder, 4, kept)
    assert check(folder, 4) == 4
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == [
        "kept-000003.jsonl",
        "kept/a-000004.safetensors",
        "kept/b-000004.safetensors",
        "latest.json",
        "round-000004.json",
        "state-000004.safetensors",
    ], "what is not named is swept away"


def test_tensors_that_are_not_contiguous_or_views_of_one(tmp_path: Path) -> None:
    x = torch.arange(12.0)
    given: State = {"A": {"s": x[:6].view(2, 3)}, "B": {"s": x[6:].view(2, 3).T}}
    checkpoint.save(tmp_path, 1, given, ClientStates())
    assert same(checkpoint.load(tmp_path)[1], given)


def test_the_same_state_is_the_same_bytes(tmp_path: Path) -> None:
    for name in "xy":
        checkpoint.save(tmp_path / name, 1, state(1), ClientStates())
    files = [(tmp_path / name / "state-000001.safetensors").read_bytes() for name in "xy"]
    assert files[0] == files[1]


def test_done_is_told_apart(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 2, state(2), ClientStates())
    checkpoint.save(tmp_path, 2, state(2), ClientStates(), done=True)
    assert checkpoint.load(tmp_path)[0] == 2 and checkpoint.load(tmp_path)[3]
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-000002-done.safetensors"]


def test_in_memory(tmp_path: Path) -> None:
    kept = ClientStates()
    kept.put("b", own("b", 1), 1)
    kept.put("a", {}, 1)
    stored = kept.get("b")
    assert kept.clients() == ["b"] and stored is not None and same(stored, own("b", 1)) and kept.get("a") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_staged_counts_once_it_is_committed(tmp_path: Path, on_disk: bool) -> None:
    kept = ClientStates(tmp_path / "kept" if on_disk else None)
    kept.stage("a", own("a", 1), 1)
    assert kept.get("a") is None and kept.clients() == []
    kept.discard()
    kept.commit()
    assert kept.get("a") is None, "a round that did not end leaves nothing"
    kept.stage("a", own("a", 2), 2)
    kept.commit()
    kept.stage("a", own("a", 3), 3)
    stored = kept.get("a")
    assert stored is not None and same(stored, own("a", 2))


def test_what_was_kept_since_the_checkpoint_does_not_count(tmp_path: Path) -> None:
    kept = ClientStates(tmp_path / "kept")
    save(tmp_path, 1, kept)
    kept.put("a", own("a", 2), 2)
    assert check(tmp_path, 1) == 1


def test_reading_does_not_disturb_a_run_that_is_writing(tmp_path: Path) -> None:
    """Between a state's file and the `latest.json` that names it, someone else may look at the run."""
    kept = ClientStates(tmp_path / "kept")
    save(tmp_path, 1, kept)
    real = checkpoint.write_json

    def look_first(path: Path, value: Any) -> None:
        check(tmp_path, 1)
        real(path, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_json", look_first)
        save(tmp_path, 2, kept)
    assert check(tmp_path, 2) == 2


class Killed(BaseException):
    """Not an OSError: nothing may catch it."""


def interrupt(patch: pytest.MonkeyPatch, nth: int, error: Callable[[], BaseException]) -> list[int]:
    """Fail at the nth call of anything that touches the disk, before it does it; a write is torn in the middle."""
    calls = [0]

    def fails() -> bool:
        calls[0] += 1
        return calls[0] == nth

    def wrap(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if fails():
                raise error()
            return real(*args, **kwargs)

        patch.setattr(module, name, call)

    for name in ("replace", "fsync", "unlink", "mkdir"):
        wrap(os, name)
    real_open = io.open

    def opens(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode and "+" not in mode:
            return real_open(file, mode, *args, **kwargs)
        if fails():
            raise error()
        handle = real_open(file, mode, *args, **kwargs)
        write = handle.write

        class Torn:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                handle.close()

            def write(self, data: bytes) -> int:
                if fails():
                    write(data[: len(data) // 2])
                    handle.flush()
                    raise error()
                return int(write(data))

            def __getattr__(self, name: str) -> Any:
                return getattr(handle, name)

        return Torn()

    patch.setattr(io, "open", opens)
    patch.setattr(builtins, "open", opens)
    return calls


def attempt(folder: Path, nth: int, error: Callable[[], BaseException], kind: type[BaseException]) -> bool:
    """Save round 2 over round 1 and fail at the nth call; whether it was reached."""
    kept = ClientStates(folder / "kept")
    save(folder, 1, kept)
    with pytest.MonkeyPatch.context() as patch:
        calls = interrupt(patch, nth, error)
        try:
            save(folder, 2, kept)
        except kind as failure:
            if isinstance(failure, RunError):
                assert "No space left on device" in str(failure) and "Nothing is lost" in str(failure)
    return calls[0] >= nth


def test_killed_at_any_call_the_old_or_the_new_round_loads_whole(tmp_path: Path) -> None:
    seen, nth = [], 0
    while True:
        nth += 1
        folder = tmp_path / str(nth)
        reached = attempt(folder, nth, Killed, Killed)
        seen.append(check(folder, 1, 2))
        # And the run goes on from there.
        t, _, kept, _ = checkpoint.load(folder)
        save(folder, t + 1, kept)
        check(folder, t + 1)
        left = {path.name for path in folder.rglob("*") if path.is_file()}
        assert left == {
            "latest.json",
            f"round-{t + 1:06d}.json",
            f"state-{t + 1:06d}.safetensors",
            "kept-000001.jsonl",
            *(f"{k}-{t + 1:06d}.safetensors" for k in "ab"),
        }
        if not reached:
            break
    assert nth > 20 and seen == sorted(seen) and set(seen) == {1, 2}


def test_full_disk_at_any_call_is_one_error_and_loses_nothing(tmp_path: Path) -> None:
    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    nth, reached = 0, True
    while reached:
        nth += 1
        reached = attempt(tmp_path / str(nth), nth, full, RunError)
        check(tmp_path / str(nth), 1, 2)
    assert nth > 20


def test_a_write_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), rename(a, b))[1])
    checkpoint.write(tmp_path / "x", b"1")
    assert order == ["sync", "rename", "sync"]


def test_a_round_writes_what_changed_and_sweeps_what_it_put_in_place_of(tmp_path: Path) -> None:
    """The journal grows by a line for each client of a round, begins anew when most is bygone, and can be gone back in."""
    kept = ClientStates(tmp_path / "kept")
    for client in range(50):
        kept.stage(f"c{client}", own("a", 0), 0)
    kept.commit()
    checkpoint.save(tmp_path, 0, state(0), kept)
    first = (tmp_path / "kept-000000.jsonl").read_bytes()
    for t in range(1, 4):
        kept.put("c7", own("a", t), t)
        kept.stage("c8", own("a", t), t)
        kept.discard()
        checkpoint.save(tmp_path, t, state(t), kept, keep=2)
    assert (tmp_path / "kept-000000.jsonl").read_bytes()[: len(first)] == first
    assert len((tmp_path / "kept-000000.jsonl").read_bytes().splitlines()) == 53
    there = {path.name for path in (tmp_path / "kept").iterdir()}
    assert there == {f"c{k}-000000.safetensors" for k in range(50) if k != 7} | {
        f"c7-00000{t}.safetensors" for t in (2, 3)
    }
    for t in (2, 3):
        stored = checkpoint.load(tmp_path, t)[2].get("c7")
        assert stored is not None and same(stored, own("a", t))
    back = checkpoint.load(tmp_path, 2)[2]
    checkpoint.save(tmp_path, 2, state(2), back, keep=4)
    back.put("c9", own("b", 3), 3)
    checkpoint.save(tmp_path, 3, state(3), back, keep=2)
    files = checkpoint.load(tmp_path)[2].files
    assert (files["c7"], files["c9"]) == ("c7-000002.safetensors", "c9-000003.safetensors")
    for t in range(4, 30):
        for client in range(50):
            back.stage(f"c{client}", own("a", t), t)
        back.commit()
        checkpoint.save(tmp_path, t, state(t), back)
    (journal,) = tmp_path.glob("kept-*.jsonl")
    assert journal.name == "kept-000024.jsonl" and len(journal.read_bytes().splitlines()) == 50 * 6
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {f"c{k}-000029.safetensors" for k in range(50)}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_an_earlier_process_kept_is_swept_in_its_turn(tmp_path: Path, keep: int) -> None:
    kept = ClientStates(tmp_path / "kept")
    for t in range(9):
        if t in (3, 4):
            kept = checkpoint.load(tmp_path)[2]
        kept.put("a", own("a", t), t)
        checkpoint.save(tmp_path, t, state(t), kept, keep=keep)
        there = {path.name for path in (tmp_path / "kept").iterdir()}
        assert there == {f"a-{i:06d}.safetensors" for i in range(max(0, t + 1 - keep), t + 1)}


def test_damaged_or_missing_journal(tmp_path: Path) -> None:
    save(tmp_path, 1, ClientStates(tmp_path / "kept"))
    file = tmp_path / "kept-000001.jsonl"
    data = file.read_bytes()
    file.write_bytes(data + b"behind what counts")
    check(tmp_path, 1)
    file.write_bytes(data.replace(b"a-000001", b"b-000001"))
    with pytest.raises(RunError, match="is not what the checkpoint names"):
        checkpoint.load(tmp_path)
    file.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no checkpoint \(no latest.json\)"):
        checkpoint.load(tmp_path)


def test_another_format(tmp_path: Path) -> None:
    save(tmp_path, 1, ClientStates(tmp_path / "kept"))
    meta = json.loads((tmp_path / "latest.json").read_text())
    (tmp_path / "latest.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(RunError, match="format 99, expected 2: use the fedloom version that wrote it"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 2}', "\udcff"], ids=repr)
def test_damaged_pointer(tmp_path: Path, text: str) -> None:
    save(tmp_path, 1, ClientStates(tmp_path / "kept"))
    (tmp_path / "latest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=r"latest\.json"):
        checkpoint.load(tmp_path)


def test_damaged_or_missing_state(tmp_path: Path) -> None:
    save(tmp_path, 1, ClientStates(tmp_path / "kept"))
    file = tmp_path / "state-000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match="is damaged: sha256 is"):
        checkpoint.load(tmp_path)
    file.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load(tmp_path)


def test_damaged_or_missing_kept_state(tmp_path: Path) -> None:
    save(tmp_path, 1, ClientStates(tmp_path / "kept"))
    file = tmp_path / "kept" / "a-000001.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    kept = checkpoint.load(tmp_path)[2]
    with pytest.raises(RunError, match="is not what the checkpoint names"):
        kept.get("a")
    assert kept.get("b") is not None
    file.unlink()
    with pytest.raises(RunError):
        kept.get("a")
