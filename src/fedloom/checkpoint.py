"""Checkpoints of a run: safetensors for states, JSON for the rest.

`latest.json` is the commit point. It names the files of one complete round with their hashes, those of clients by a journal,
and is replaced atomically. The last rounds before it stay, each under its own `round-N.json`; files that none of them names go
with the next round: left-overs of a crash when a process first writes here, then what a round put in the place of another.
A kill at any instant leaves the last complete round. A state is read back in the order of roles and sites that it
was written in: the order of a sum decides its last bit.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedloom.disk import disk_errors, make_folder, sync_folder, write, write_json
from fedloom.errors import RunError
from fedloom.journal import Journal, Line
from fedloom.state import State

FORMAT = 2

_NAME = re.compile(r"(.+)-(\d{6,})\.safetensors")
"""Of a file of a client's state: client, round."""
_OURS = re.compile(r"state-\d{6,}(-done)?\.safetensors|kept-\d{6,}\.jsonl")
"""Of a file of a round, in the folder itself."""
_ROUND = re.compile(r"round-(\d{6,})\.json")


def flatten(state: State) -> dict[str, Tensor]:
    """`{"role/site": tensor}`, contiguous."""
    return {f"{role}/{site}": x.contiguous() for role, group in state.items() for site, x in group.items()}


def encode(state: State) -> bytes:
    """A state as the bytes of a safetensors file that knows the order of its roles and sites, and empty roles."""
    layout = json.dumps({role: list(group) for role, group in state.items()}, separators=(",", ":"))
    return save_tensors(flatten(state), {"layout": layout})


def decode(data: bytes) -> State:
    """Inverse of `encode`. Of a file without a layout, roles and sites come in alphabetical order."""
    flat = load_tensors(data)
    (length,) = struct.unpack_from("<Q", data)
    layout = json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("layout")
    if layout is not None:
        return {role: {site: flat[f"{role}/{site}"] for site in sites} for role, sites in json.loads(layout).items()}
    state: State = {}
    for key in sorted(flat):
        role, site = key.split("/", 1)
        state.setdefault(role, {})[site] = flat[key]
    return state


class ClientStates:
    """What clients keep between rounds: in memory, or one file a client in a folder so that thousands cost no memory.

    What is staged counts once it is committed; a file is new at each round and named by it, and counts on disk once a
    checkpoint names it.
    """

    def __init__(
        self,
        folder: Path | None = None,
        files: dict[str, str] | None = None,
        hashes: dict[str, str] | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.folder = folder
        self.files = dict(files or {})
        """Client id -> file name."""
        self.hashes = dict(hashes or {})
        """File name -> sha256, where it is known."""
        self.journal = journal or Journal()
        """Of the checkpoint that was read or written last."""
        self.changed: set[str] = set()
        """Clients that keep another file than the journal says."""
        self.bygone: list[tuple[int, str]] = []
        """(first round that does not name it, file): of this process, and not swept yet."""
        self._looked = False
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
        return None if name is None else _read_state(self.folder / name, self.hashes.get(name))

    def stage(self, client: str, state: State, t: int) -> None:
        """Keep a state for a client once round t is committed; an empty one is not stored."""
        if not state:
            return
        if self.folder is None:
            self._staged[client] = state
            return
        name = f"{client}-{t:06d}.safetensors"
        make_folder(self.folder)
        data = encode(state)
        write(self.folder / name, data, listed=False)
        self._staged_files[client] = name
        self.hashes[name] = hashlib.sha256(data).hexdigest()

    def commit(self) -> None:
        """What was staged counts from now on."""
        self._memory |= self._staged
        if self._staged_files and self.folder is not None:
            with disk_errors(self.folder):
                sync_folder(self.folder)
        for client, name in sorted(self._staged_files.items()):  # they may be staged from several threads
            before = self.files.get(client)
            if before is not None and before != name:
                self._drop(before, _parts(name)[1])
            self.files[client] = name
            self.changed.add(client)
        self._staged, self._staged_files = {}, {}

    def discard(self) -> None:
        """Forget what was staged."""
        for name in self._staged_files.values():
            self._drop(name, 0)
        self._staged, self._staged_files = {}, {}

    def _drop(self, name: str, t: int) -> None:
        self.hashes.pop(name, None)
        self.bygone.append((t, name))

    def lines(self, clients: Iterable[str]) -> Iterator[Line]:
        """Of the journal."""
        return ((client, name := self.files[client], self.hashes.get(name, "")) for client in clients)

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

    def swept(self, folder: Path, metas: Iterable[dict[str, Any]], oldest: int) -> list[Path]:
        """Files of clients that no checkpoint to be kept names, the `oldest` of which is a round; at first, all there are."""
        assert self.folder is not None
        if not self._looked:
            self._looked, self.bygone = True, []
            read = ((meta["round"], Journal.read(folder, meta["kept"], "start again")[1]) for meta in metas)
            kept = sorted((t, set(files.values())) for t, files in read)
            for (_, before), (t, after) in pairwise(kept):
                self.bygone += [(t, name) for name in sorted(before - after)]  # of an earlier process
            named = set().union(*(names for _, names in kept))
            there = [path for path in self.folder.glob("*") if _NAME.fullmatch(path.name) and path.name not in named]
            return [*there, *self.folder.glob("*.new")]
        gone = [name for t, name in self.bygone if t <= oldest]
        self.bygone = [(t, name) for t, name in self.bygone if t > oldest]
        # A round that is done again has files of the same names.
        return [self.folder / name for name in gone if self.files.get(_parts(name)[0]) != name]

    def clients(self) -> list[str]:
        """Ids of the clients that keep something, sorted."""
        return sorted(self._memory if self.folder is None else self.files)


def save(folder: Path, t: int, state: State, client_states: ClientStates, done: bool = False, keep: int = 1) -> None:
    """Write the checkpoint of round t; `done` once nothing is left to train. The last `keep` checkpoints stay."""
    make_folder(folder)
    data = encode(state)
    name = f"state-{t:06d}{'-done' if done else ''}.safetensors"
    write(folder / name, data)
    kept, files = client_states, client_states.files
    kept.journal.add(folder, t, kept.lines(sorted(kept.changed)), len(files), lambda: kept.lines(sorted(files)))
    kept.changed.clear()
    meta = {
        "format": FORMAT,
        "round": t,
        "done": done,
        "state": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "kept": kept.journal.meta(),
    }
    write_json(folder / f"round-{t:06d}.json", meta)
    write_json(folder / "latest.json", meta)
    with disk_errors(folder):
        _sweep(folder, kept, meta, keep)


def load(folder: Path, t: int | None = None) -> tuple[int, State, ClientStates, bool]:
    """(round, state, client states, done) of the newest complete checkpoint, or of round t. Changes nothing.

    Raises RunError if there is none, it is damaged, or it was written by another version.
    """
    meta = _meta(folder, t)
    instead = f"restore it from a copy, go back ({_rounds_text(folder)}), or start the run again"
    data = _read(folder / meta["state"], instead)
    digest = hashlib.sha256(data).hexdigest()
    if digest != meta["sha256"]:
        raise RunError(
            f"{folder / meta['state']} is damaged: sha256 is {digest[:12]}..., expected {meta['sha256'][:12]}...; {instead}"
        )
    journal, files, hashes = Journal.read(folder, meta["kept"], instead)
    return meta["round"], decode(data), ClientStates(folder / "kept", files, hashes, journal), meta["done"]


def rounds(folder: Path) -> list[int]:
    """The rounds whose checkpoints are there, the newest last."""
    return sorted(int(match[1]) for path in folder.glob("round-*.json") if (match := _ROUND.fullmatch(path.name)))


def _rounds_text(folder: Path) -> str:
    there = rounds(folder)[:-1]
    return f"fedloom resume RUN --round {there[-1]}" if there else "no earlier round is kept"


def _meta(folder: Path, t: int | None) -> dict[str, Any]:
    """The checked contents of latest.json, or of a round's own file."""
    path = folder / ("latest.json" if t is None else f"round-{t:06d}.json")
    instead = f"restore it from a copy, go back ({_rounds_text(folder)}), or start the run again"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if t is None:
            raise RunError(f"{folder} holds no checkpoint (no latest.json): the run never finished round 0") from None
        there = ", ".join(map(str, rounds(folder))) or "none"
        raise RunError(f"{folder} holds no checkpoint of round {t}, expected one of {there}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}): {instead}") from error
    if not isinstance(meta, dict):
        raise RunError(f"{path} is damaged: {instead}")
    if meta.get("format") != FORMAT:
        raise RunError(
            f"{folder} has checkpoint format {meta.get('format')!r}, expected {FORMAT}: use the fedloom version that wrote it"
        )
    shapes = {"round": int, "done": bool, "state": str, "sha256": str, "kept": dict}
    for key, kind in shapes.items():
        if type(meta.get(key)) is not kind:
            raise RunError(f"{path} is damaged ({key} is {str(meta.get(key))[:40]!r}): {instead}")
    kept = meta["kept"]
    if type(kept.get("bytes")) is not int or not isinstance(kept.get("sha256"), str):
        raise RunError(f"{path} is damaged (kept is {str(kept)[:40]!r}): {instead}")
    named = [meta["state"], *([] if kept.get("journal") is None else [kept["journal"]])]
    if not all(isinstance(name, str) and Path(name).name == name for name in named) or meta["round"] < 0:
        raise RunError(f"{path} is damaged (it names no files of a checkpoint): {instead}")
    return meta


def _sweep(folder: Path, kept: ClientStates, latest: dict[str, Any], keep: int) -> None:
    """Remove the files of rounds that no checkpoint to be kept names; what is not ours stays."""
    earlier = [t for t in rounds(folder) if t < latest["round"]]
    stay = {latest["round"], *earlier[len(earlier) - max(0, keep - 1) :]}
    metas = [latest]
    for t in rounds(folder):
        path = folder / f"round-{t:06d}.json"
        if t in stay:
            metas.append(json.loads(path.read_text()))
        else:
            path.unlink(missing_ok=True)
    named = {meta["state"] for meta in metas} | {meta["kept"]["journal"] for meta in metas}
    stale = [path for path in folder.glob("*") if _OURS.fullmatch(path.name) and path.name not in named]
    if kept.folder is not None:
        stale += kept.swept(folder, metas, min(stay))
    for path in [*stale, *folder.glob("*.new")]:
        path.unlink(missing_ok=True)


def _parts(name: str) -> tuple[str, int]:
    """(client, round) of a file's name."""
    client, _, t = name.removesuffix(".safetensors").rpartition("-")
    return client, int(t)


def _read(path: Path, instead: str = "restore it from a copy, or start again") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): {instead}") from error


def _read_state(path: Path, sha256: str | None) -> State:
    data = _read(path)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise RunError(
            f"{path} is not what the checkpoint names (its sha256 differs): restore it from a copy, or start again"
        )
    try:
        return decode(data)
    except Exception as error:  # safetensors raises its own error class
        raise RunError(f"{path} is damaged ({error}): restore it from a copy, or start the run again") from error
