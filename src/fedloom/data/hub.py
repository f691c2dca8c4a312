"""The model and data hub: asked only for what is not on this machine, without telemetry, one error when it fails."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedloom.errors import FedloomError, HubError


def quiet() -> None:
    """Turn telemetry off in the libraries that have it. Called before they are imported, and harmless after."""
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
        "DO_NOT_TRACK": "1",
    }.items():
        os.environ[name] = value
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]  # a module read through sys.modules


def online() -> bool:
    """Whether the hub may be asked and answers. Asked once per process: its clients would retry for half a minute."""
    quiet()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _truthy("HF_HUB_OFFLINE"):
        return False
    return _answers(constants.ENDPOINT)


@contextmanager
def access(what: str, name: str, error: type[FedloomError], advice: str = "", local: bool = False) -> Iterator[None]:
    """A block that loads from the hub, or from its cache on this machine when the hub does not answer.

    Raises HubError if it cannot be reached, and `error` if it has no such name, refuses it, or the load fails.
    `what` ("model", "data set") and `advice` (a sentence) go into the message. `local`: the name is a path on this machine, so
    that the hub is not asked and every failure is `error`.
    """
    quiet()
    reachable = not local and online()
    with _offline(not reachable):
        try:
            yield
        except FedloomError:
            raise
        except Exception as cause:  # whatever a hub client raises becomes one readable message
            raise _explain(what, name, error, advice, cause, reachable or local) from cause


def _explain(
    what: str, name: str, error: type[FedloomError], advice: str, cause: BaseException, reachable: bool
) -> FedloomError:
    from huggingface_hub import constants

    kinds = {kind.__name__ for link in _chain(cause) for kind in type(link).__mro__}
    tail = f" {advice}" if advice else ""
    if "GatedRepoError" in kinds:
        return error(
            f"{what} {name!r} needs permission on the hub: accept its terms there, then `hf auth login`.{tail}"
        )
    if not reachable or kinds & {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectionError",
        "TransportError",
    }:
        why = "HF_HUB_OFFLINE is set" if _truthy("HF_HUB_OFFLINE") else f"{constants.ENDPOINT} cannot be reached"
        return HubError(
            f"{what} {name!r} is not on this machine, and {why}: connect and try again, or give a local path.{tail}"
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return error(
            f"there is no {what} {name!r} on the hub, and no such path here: check its name (owner/name).{tail}"
        )
    lines = " ".join(str(cause).split()) or type(cause).__name__
    return error(f"{what} {name!r} cannot be loaded: {lines[:300]}{tail}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _truthy(name: str) -> bool:
    return os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}


@functools.cache
def _answers(endpoint: str) -> bool:
    import httpx
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=5)
    except (httpx.HTTPError, OSError):
        return False
    return True


@contextmanager
def _offline(enabled: bool) -> Iterator[None]:
    """Make the hub clients use their cache only. They read the setting at import, so it is set on their modules."""
    import huggingface_hub.constants

    modules = [huggingface_hub.constants, sys.modules.get("datasets.config")]
    settings = [module.__dict__ for module in modules if module is not None]
    before = [setting["HF_HUB_OFFLINE"] for setting in settings]
    try:
        for setting, value in zip(settings, before, strict=True):
            setting["HF_HUB_OFFLINE"] = enabled or value
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting["HF_HUB_OFFLINE"] = value
