"""Look at a finished run: score it again, export it, check its hashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedloom.data import partition
from fedloom.disk import write_new_folder
from fedloom.errors import RunError
from fedloom.models import peft
from fedloom.runs import evaluate, export
from fedloom.runs.config import parse
from fedloom.runs.experiment import experiment
from fedloom.runs.run_directory import RunDirectory, digest_file, digest_files
from fedloom.text import shown


def adapter_of(run: RunDirectory, client: str | None) -> Path:
    """The adapter directory of the run, or of one of its clients. Raises RunError if it is not there."""
    known = sorted(p.name for p in (run.path / "clients").glob("*"))
    # A client is one of those names, never a path that leads out of the run.
    path = run.adapter if client is None else run.path / "clients" / client / "adapter"
    if (client is None or client in known) and any(
        (path / name).is_file() for name in ("adapter_config.json", export.GATED)
    ):
        return path
    if client is None:
        raise RunError(f"{run.path} has no adapter yet: finish it with `fedloom resume {run.path}`")
    raise RunError(
        f"{run.path} holds no model of client {shown(client)}: "
        + (f"it has {', '.join(known)}" if known else "its method keeps nothing with the clients")
    )


def evaluate_saved(path: Path, client: str | None = None, device: str | None = None) -> dict[str, float]:
    """Metric -> value of a saved adapter on the run's held-out rows, of a client's on those that it is scored on in the run.

    On another `device` than the run's, as model.device.
    """
    run = RunDirectory.open(path)
    adapter = adapter_of(run, client)
    config = run.config()
    if device is not None:
        config = parse(config.model_dump() | {"model": config.model.model_dump() | {"device": device}}, "--device")
    e = experiment(config)
    return evaluate.score(e, export.read(adapter), evaluate.common(e) if client is None else evaluate.own(e, client))


def export_saved(
    path: Path,
    dest: Path,
    client: str | None = None,
    merge: bool = False,
    on_warning: Callable[[str], None] = lambda what: None,
) -> None:
    """Copy a saved adapter to `dest`, or write the model with the adapter merged. `dest` must be new or empty.

    It is written beside `dest` and renamed: what is there is whole. Raises RunError if it cannot be written.
    """
    run = RunDirectory.open(path)
    adapter = adapter_of(run, client)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise RunError(f"{dest} exists and is not empty, expected a new or empty directory: choose another name")
    if not merge:
        write_new_folder(dest, lambda folder: _copy(adapter, folder))
        return
    work = export.read(adapter)
    if "gate" in work.train:
        raise RunError(
            f"{adapter} weighs its ranks by the input, and cannot be merged into weights: export it without --merge"
        )
    e = experiment(run.config())
    e.trainer.close()  # the model's own layers are merged into
    if e.base.quantization is not None:
        on_warning(
            f"the base was {e.base.quantization} while it was trained: the model is written dense, of rounded weights, in "
            f"{str(e.dtype).removeprefix('torch.')}"
        )
    A, B, head = work.train["A"], work.train["B"], work.train.get("head")
    tokenizer, labels = e.base.tokenizer, e.tables.labels or None
    write_new_folder(
        dest, lambda folder: peft.merge(e.base.model, A, B, work.scale, {}, head, folder, tokenizer, labels)
    )


def _copy(adapter: Path, folder: Path) -> None:
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def verify(path: Path) -> list[tuple[str, str | None, str | None]]:
    """(what, hash in the manifest, hash now) for everything that the manifest hashes; an unfinished run has no adapter's."""
    run = RunDirectory.open(path)
    expected = dict(run.manifest().get("hashes", {}))
    e = experiment(run.config())
    found: dict[str, str | None] = {"config": digest_file(run.config_file), **e.hashes}
    found["partition"] = partition.digest(partition.load_partition(run.partition_file))
    found["adapter"] = digest_files(run.adapter) if run.adapter.is_dir() else None
    clients = expected.pop("clients", {})
    rows = [(name, value, found.get(name)) for name, value in expected.items()]
    for client, value in clients.items():
        path = run.path / "clients" / client / "adapter"
        rows.append((f"adapter of {client}", value, digest_files(path) if path.is_dir() else None))
    return rows
