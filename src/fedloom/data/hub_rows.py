"""Rows of a hub's data set at one commit: from the hub, or from the cache that `datasets` keeps on this machine.

Without the hub, `datasets` takes whatever commit it stored last, whichever was asked for: so we remember what revisions meant.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedloom.data import hub
from fedloom.disk import cache_dir


def rows(name: str, config: str | None, split: str, revision: str | None, online: bool) -> Any:
    """The `datasets.Dataset` of one split of `owner/name`. Raises whatever the hub's clients do."""
    import datasets
    from huggingface_hub import HfApi

    datasets.disable_progress_bars()
    commit = _remembered(name, revision)
    if online:
        try:
            commit = str(HfApi().dataset_info(name, revision=revision).sha)
        except Exception as error:
            if commit is None or not hub.passing(error):
                raise
            online = False
    if online:
        found = datasets.load_dataset(name, config, split=split, revision=commit)
        _remember(name, revision, str(commit))
        return found
    if commit is not None:
        return _stored(name, config, split, commit)
    if revision is not None:
        raise ConnectionError(f"nothing is known here of revision {revision!r}")
    return datasets.load_dataset(name, config, split=split)


def _stored(name: str, config: str | None, split: str, commit: str) -> Any:
    """A split from the cache of `datasets`. Raises ConnectionError if this commit is not there."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, _, last = name.rpartition("/")
    own = camelcase_to_snakecase(last)
    root = Path(datasets.config.HF_DATASETS_CACHE) / (f"{owner}___{own}" if owner else own)
    found = sorted(root.glob(f"{config or '*'}/*/{commit}/dataset_info.json"))
    if len(found) != 1:
        raise ConnectionError(f"{len(found)} configurations of {name} at {commit[:12]} are stored in {root}")
    config, version = found[0].parts[-4:-2]
    builder = Cache(dataset_name=own, repo_id=name, config_name=config, version=version, hash=commit)
    return builder.as_dataset(split=split)


def _memory(name: str, revision: str | None) -> Path:
    key = hashlib.sha256(f"{name}@{revision or 'main'}".encode()).hexdigest()
    return cache_dir() / "revisions" / key


def _remembered(name: str, revision: str | None) -> str | None:
    """The commit that a revision meant when the hub was asked last; a commit means itself."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    with suppress(OSError):
        commit = _memory(name, revision).read_text(encoding="ascii")
        return commit if re.fullmatch("[0-9a-f]{40}", commit) else None
    return None


def _remember(name: str, revision: str | None, commit: str) -> None:
    with suppress(OSError):  # a cache that cannot be written is done without
        file = _memory(name, revision)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit, encoding="ascii")
