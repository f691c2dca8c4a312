"""The model and data hub: asked only for what is not on this machine, without telemetry, one error when it fails.

Its clients try again by themselves where that helps: after 429 and 5xx, and where a transfer was cut off.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
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


def named(text: str) -> tuple[str, str | None]:
    """The hub id and the revision, a branch, tag or commit, of `owner/name@revision`.

    >>> named("owner/name@v1.0"), named("owner/name")
    (('owner/name', 'v1.0'), ('owner/name', None))
    """
    name, at, revision = text.partition("@")
    return name, revision if at else None


def online() -> bool:
    """Whether the hub may be asked and answers. Asked once a process: its clients would try again for half a minute."""
    quiet()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _truthy("HF_HUB_OFFLINE"):
        return False
    return _answers(constants.ENDPOINT)


@contextmanager
def access(what: str, name: str, error: type[FedloomError], advice: str = "", local: bool = False) -> Iterator[bool]:
    """A block that loads from the hub, or from its cache on this machine when the hub does not answer.

    The block is told whether the hub answers. Raises HubError if it cannot be reached or cannot serve now, and `error` if it
    has no such name, refuses it, or the load fails. `what` ("model", "data set") and `advice` (a sentence) go into the message.
    `local`: the name is a path on this machine, so that the hub is not asked and every failure is `error`.
    """
    quiet()
    reachable = not local and online()
    with _offline(not reachable), _silent():
        try:
            yield reachable
        except FedloomError:
            raise
        except Exception as cause:  # whatever a hub client raises becomes one readable message
            kind, why = _reason(what, name, cause, reachable or local)
            tail = f" {advice}" if advice and not (reachable and passing(cause)) else ""
            raise (kind or error)(f"{why}{tail}") from cause


_CUT = frozenset(
    {"RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead", "ChunkedEncodingError", "ClientPayloadError"}
)


def _kinds(chain: Iterable[BaseException]) -> set[str]:
    return {kind.__name__ for link in chain for kind in type(link).__mro__}


def _status(chain: Iterable[BaseException]) -> int:
    """The hub's answer that an error came of, or 0."""
    found = [getattr(getattr(link, "response", None), "status_code", None) for link in chain]
    return next((x for x in reversed(found) if isinstance(x, int)), 0)


def passing(error: BaseException) -> bool:
    """Whether it may go better later: the hub is busy or broken, or the connection is."""
    chain = list(_chain(error))
    status = _status(chain)
    cut = _kinds(chain) & _CUT or any("Consistency check failed" in str(link) for link in chain)
    return status == 429 or status >= 500 or bool(cut)


def _reason(what: str, name: str, cause: BaseException, reachable: bool) -> tuple[type[FedloomError] | None, str]:
    """(HubError if it is the hub's failure, what to say of it)."""
    chain = list(_chain(cause))
    kinds, status = _kinds(chain), _status(chain)
    there = f"{what} {name!r}"
    if "GatedRepoError" in kinds or "is a gated dataset" in str(cause):  # datasets drops the cause
        return None, f"{there} needs permission on the hub: accept its terms there, then `hf auth login`."
    if reachable and passing(cause):
        if status == 429:
            why = f"{_endpoint()} asks for fewer requests (429): wait some minutes, or `hf auth login`."
        elif status:
            why = f"{_endpoint()} answers with an error of its own ({status}): try again later."
        else:
            why = "the transfer was cut off. Try again: what is here already stays."
        return HubError, f"{there} could not be got: {why}"
    if "RevisionNotFoundError" in kinds or "Revision '" in str(cause):
        return (
            None,
            f"{there} is on the hub, but not with this revision: check the name behind the @ (branch, tag, commit).",
        )
    if reachable and kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        private = "; if it is private, log in with `hf auth login`"
        return None, f"there is no {there} on the hub, and no such path here: check its name (owner/name){private}."
    if not reachable or kinds & {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectionError",
        "TransportError",
    }:
        why = "HF_HUB_OFFLINE is set" if _truthy("HF_HUB_OFFLINE") else f"{_endpoint()} cannot be reached"
        return HubError, f"{there} is not on this machine, and {why}: connect and try again, or give a local path."
    if status in (401, 403):
        return None, f"{there} is refused by {_endpoint()} ({status}): check your token, `hf auth login`."
    if status == 404:
        return None, f"{there} cannot be got: {_endpoint()} has not what it asked for (404), is it a hub (HF_ENDPOINT)?"
    lines = _without_queries(" ".join(str(cause).split())) or type(cause).__name__
    return None, f"{there} cannot be loaded: {lines[:300]}"


def _endpoint() -> str:
    """The hub's address as it may be shown: without a password."""
    from huggingface_hub import constants

    return re.sub("//[^/@]*@", "//", str(constants.ENDPOINT))


def _without_queries(text: str) -> str:
    """Addresses without what follows their `?`: those of large files are signed there."""
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)


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
        status = get_session().head(endpoint, timeout=5).status_code
    except (httpx.HTTPError, OSError):
        return False
    return bool(status < 500)


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


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the clients' own lines off the terminal: they show signed addresses, and every failure is raised besides."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
