"""A run on disk: safetensors for states, JSON for the rest; written, synced, then renamed.

`latest.json` is the commit point. It names the files of one complete round with their hashes and is replaced atomically;
files that it does not name are left-overs of a crash and go with the next round. A kill at any instant leaves the last
complete round.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedloom.errors import RunError
from fedloom.state import State

FORMAT = 1

_NAME = re.compile(r"(.+)-(\d{6,})\.safetensors")
"""Of a file of a client's state: client, round."""


def flatten(state: State) -> dict[str, Tensor]:
    """`{"role/site": tensor}`, contiguous."""
    return {f"{role}/{site}": x.contiguous() for role, group in state.items() for site, x in group.items()}


def unflatten(flat: dict[str, Tensor]) -> State:
    """Inverse of `flatten` (roles without a tensor are lost)."""
    state: State = {}
    for key in sorted(flat):
        role, site = key.split("/", 1)
        state.setdefault(role, {})[site] = flat[key]
    return state


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing into one RunError that says what is lost: nothing."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Nothing is lost: free space or fix the permissions, "
            "then resume the run"
        ) from error


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all: beside it, synced, then renamed over it."""
    with disk_errors(path):
        beside = path.with_name(path.name + ".new")
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """As `write`, for a JSON value."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


class ClientStates:
    """What clients keep between rounds: in memory, or one file a client in a folder so that thousands cost no memory.

    What is staged counts once it is committed; a file is new at each round and named by it, and counts on disk once a
    checkpoint names it.
    """

    def __init__(self, folder: Path | None = None, files: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.files = dict(files or {})
        """Client id -> file name."""
        self._memory: dict[str, State] = {}
        self._staged_files: dict[str, str] = {}
        self._staged: dict[str, State] = {}

    @staticmethod
    def before(folder: Path, t: int) -> ClientStates:
        """What was kept last in a round before t: a server that was killed may ask for a round again. Writes nothing."""
        newest: dict[str, tuple[int, str]] = {}
        for path in folder.glob("*.safetensors"):
            if (match := _NAME.fullmatch(path.name)) and int(match[2]) < t:
                client, at = match[1], int(match[2])
                newest[client] = max(newest.get(client, (-1, "")), (at, path.name))
        return ClientStates(folder, {client: name for client, (_, name) in newest.items()})

    def get(self, client: str) -> State | None:
        """What the client kept, or None if it never did."""
        if self.folder is None:
            return self._memory.get(client)
        name = self.files.get(client)
        return None if name is None else unflatten(_read_tensors(self.folder / name))

    def stage(self, client: str, state: State, t: int) -> None:
        """Keep a state for a client once round t is committed; an empty one is not stored."""
        if not state:
            return
        if self.folder is None:
            self._staged[client] = state
            return
        name = f"{client}-{t:06d}.safetensors"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / name, save_tensors(flatten(state)))
        self._staged_files[client] = name

    def commit(self) -> None:
        """What was staged counts from now on."""
        self._memory |= self._staged
        self.files |= self._staged_files
        self.discard()

    def discard(self) -> None:
        """Forget what was staged."""
        self._staged, self._staged_files = {}, {}

    def put(self, client: str, state: State, t: int) -> None:
        """Stage and commit."""
        self.stage(client, state, t)
        self.commit()

    def forget_others(self, clients: Iterable[str]) -> None:
        """Remove files of these clients that are not the ones named here: of rounds that do not count, and bygone ones."""
        if self.folder is None:
            return
        named, ours = set(self.files.values()), set(clients)
        for path in self.folder.glob("*.safetensors"):
            if path.name not in named and (match := _NAME.fullmatch(path.name)) and match[1] in ours:
                path.unlink(missing_ok=True)

    def clients(self) -> list[str]:
        """Ids of the clients that keep something, sorted."""
        return sorted(self._memory if self.folder is None else self.files)


def save(folder: Path, t: int, state: State, client_states: ClientStates, done: bool = False) -> None:
    """Write the checkpoint of round t; `done` once nothing is left to train."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors(flatten(state))
    name = f"state-{t:06d}{'-done' if done else ''}.safetensors"
    write(folder / name, data)
    latest = {
        "format": FORMAT,
        "round": t,
        "done": done,
        "state": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "kept": client_states.files,
    }
    write_json(folder / "latest.json", latest)
    with disk_errors(folder):
        _sweep(folder, name, client_states.files)


def load(folder: Path) -> tuple[int, State, ClientStates, bool]:
    """(round, state, client states, done) of the newest complete checkpoint. Changes nothing: a run may write the next one.

    Raises RunError if there is none, it is damaged, or it was written by another version.
    """
    latest = folder / "latest.json"
    try:
        meta = json.loads(latest.read_text())
    except FileNotFoundError:
        raise RunError(f"{folder} holds no checkpoint (no latest.json): the run never finished round 0") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{latest} cannot be read ({error}): restore it from a copy, or start the run again") from error
    if not isinstance(meta, dict):
        raise RunError(f"{latest} is damaged: restore it from a copy, or start the run again")
    if meta.get("format") != FORMAT:
        raise RunError(
            f"{folder} has checkpoint format {meta.get('format')!r}, expected {FORMAT}: use the fedloom version that wrote it"
        )
    try:
        t, done, name, want, files = (meta[key] for key in ("round", "done", "state", "sha256", "kept"))
    except KeyError as error:
        raise RunError(f"{latest} is damaged (no {error}): restore it from a copy, or start the run again") from error
    data = _read(folder / name)
    digest = hashlib.sha256(data).hexdigest()
    if digest != want:
        raise RunError(
            f"{folder / name} is damaged: sha256 is {digest[:12]}..., expected {want[:12]}...; "
            "restore it from a copy, or start the run again"
        )
    return int(t), unflatten(load_tensors(data)), ClientStates(folder / "kept", files), bool(done)


def _sweep(folder: Path, state: str, kept: dict[str, str]) -> None:
    """Remove what the checkpoint does not name."""
    named = set(kept.values())
    stale = [path for path in folder.glob("state-*") if path.name != state]
    stale += [path for path in (folder / "kept").glob("*") if path.name not in named]
    for path in stale:
        path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): restore it from a copy, or start again") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(_read(path))
    except Exception as error:  # safetensors raises its own error class
        raise RunError(f"{path} is damaged ({error}): restore it from a copy, or start the run again") from error
