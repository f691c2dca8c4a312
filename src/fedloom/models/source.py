"""Where the files of a model are: a directory of this machine, an installed package, or a snapshot of a hub's repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.data import hub, packaged
from fedloom.errors import ModelError, nearest
from fedloom.models import weights

_READ = (".json", ".txt", ".model", ".jinja")
"""Of a repository's files beside the weights: configuration, tokenizer, chat template. Never code."""


@dataclass(frozen=True)
class Source:
    """The files of a model."""

    name: str
    """What an adapter names as its base: the directory, or the hub id."""
    revision: str | None
    """Branch, tag or commit of a hub id, where one was asked for."""
    directory: Path


def resolve(name: str) -> str:
    """The directory or hub id behind a model name.

    A packaged name gives its directory, or the hub id of the original where its package is not installed; a GGUF file that
    of the dense model which is made of it once. Raises ModelError for a directory without a model, a file that is none, or a
    path that does not exist.
    """
    if name in packaged.MODELS:
        files = packaged.locate(name)
        if files is None:
            return str(packaged.MODELS[name].hub)
        if files[0].suffix == ".gguf":
            from fedloom.models import gguf

            with quiet():
                return str(gguf.converted(files[0], packaged.weights_sha256(name)))
        return str(files[0].parent)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name!r} is a directory without config.json, expected one that save_pretrained wrote")
        return str(path)
    if path.is_file() and path.suffix == ".gguf":
        from fedloom.models import gguf

        with quiet():
            return str(gguf.converted(path, weights.file_sha256(path)))
    if path.is_file():
        raise ModelError(f"{name!r} is a file, expected a model directory: the one that has config.json in it")
    if name.startswith((".", "/", "~")) or hub.named(name)[0].count("/") > 1 or not name.strip():
        raise ModelError(
            f"there is no model directory {name!r}, expected an existing one, a hub id (owner/name or owner/name@revision), "
            f"or a packaged name: {', '.join(packaged.MODELS)}"
        )
    return name


def fetch(name: str, on_status: Callable[[str], None] = lambda what: None) -> Source:
    """The files of a packaged name, a directory or a hub id; those of a hub are downloaded unless they are here.

    Raises ModelError or HubError for a model that cannot be had.
    """
    found = resolve(name)
    if Path(found).is_dir():
        return Source(found, None, Path(found))
    known = packaged.MODELS
    advice = packaged.absent(name) if name in known else f"Packaged models: {', '.join(known)}{nearest(name, known)}"
    repo, revision = hub.named(found)
    with hub.access("model", found, ModelError, advice) as online:
        try:
            if online:
                return _download(repo, revision, on_status)
        except Exception as error:
            if not hub.passing(error):
                raise
            try:
                return Source(repo, revision, _here(repo, revision))
            except Exception:
                raise error from None
        return Source(repo, revision, _here(repo, revision))


def _here(repo: str, revision: str | None) -> Path:
    """The snapshot that is on this machine. Raises LocalEntryNotFoundError if none is, or not all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    directory = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    try:
        weights.weight_files(directory)
    except ModelError as error:
        raise LocalEntryNotFoundError(str(error)) from None
    return directory


def _download(repo: str, revision: str | None, on_status: Callable[[str], None]) -> Source:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    about = HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in about.siblings or []}
    first = weights.first_of(sizes)
    if "config.json" not in sizes or first is None:
        raise ModelError(f"{repo!r} on the hub is no model of transformers, expected config.json and model.safetensors")

    small = [name for name in sizes if "/" not in name and name.endswith(_READ)]
    directory = Path(snapshot_download(repo, revision=revision, allow_patterns=small))
    commit = directory.name
    index = directory / first
    files = sorted(weights.indexed(index)) if first.endswith(".index.json") else [first]
    missing = [x for x in files if not isinstance(try_to_load_from_cache(repo, x, revision=commit), str)]
    if missing:
        size = sum(sizes.get(name, 0) for name in missing)
        on_status(f"downloading {repo}: {size / 1e9:.2f} GB")
        snapshot_download(repo, revision=commit, allow_patterns=files)
    return Source(repo, revision, directory)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, load reports and advice: what matters of them is raised as an error here."""
    hub.quiet()
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
