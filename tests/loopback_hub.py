"""A hub on loopback: as much of huggingface.co's HTTP interface as its clients use, and its failures on demand.

Repositories are in memory. Files from `LFS_FROM` bytes on are served as the hub serves large files: a redirect whose headers
name size and hash, to an address that takes ranges.

    with LoopbackHub() as hub:
        hub.put("models", "owner/name", {"config.json": b"{}"})
        os.environ["HF_ENDPOINT"] = hub.url
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["models", "datasets"]

LFS_FROM = 4096


@dataclass
class Repo:
    """A repository: commits, and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """Who lacks it is told that there is no such repository."""
    gated: bool = False
    """Its files are refused to everybody."""


@dataclass
class Fault:
    """What goes wrong with requests whose method and address match."""

    pattern: str
    status: int | None = None
    """Answer with it; None sends the answer but cuts it off after `bytes`."""
    bytes: int = 0
    times: int = 1_000_000
    headers: Mapping[str, str] = field(default_factory=dict)


class LoopbackHub:
    """The server, for the length of a `with` block."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        """(method and address, its Authorization header), of every request."""
        self.large: dict[str, bytes] = {}
        self.down = False
        """Connections are closed without an answer."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def large_url(self) -> str:
        """Of large files: another host's, to its clients, which must not be shown their tokens."""
        return f"{self.url.replace('127.0.0.1', 'localhost')}/large"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(
        self,
        kind: Kind,
        name: str,
        files: Mapping[str, bytes] | Path,
        *,
        ref: str = "main",
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Commit files, or those of a folder, on a branch; the commit's hash is returned."""
        if isinstance(files, Path):
            root = files
            files = {str(x.relative_to(root)): x.read_bytes() for x in sorted(root.rglob("*")) if x.is_file()}
        repo = self.repos.setdefault((kind, name), Repo())
        repo.token, repo.gated = token, gated
        hashes = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        commit = hashlib.sha1(json.dumps(hashes).encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[ref] = commit
        self.large |= {hashlib.sha256(data).hexdigest(): data for data in files.values() if len(data) >= LFS_FROM}
        return commit

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, f"{method} {path}"):
                fault.times -= 1
                return fault
        return None


@dataclass(frozen=True)
class _Refused(Exception):
    status: int
    code: str
    message: str


def _oid(data: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
    if len(data) >= LFS_FROM:
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16

        def log_message(self, *words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.down:
                self.close_connection = True
                return
            url = urlsplit(self.path)
            self.query = parse_qs(url.query)
            path = unquote(url.path)
            hub.log.append((f"{self.command} {path}", self.headers.get("Authorization") or ""))
            self.broken = hub.fault(self.command, path)
            try:
                if self.broken is not None and self.broken.status is not None:
                    self.send(self.broken.status, b'{"error": "as asked for"}', dict(self.broken.headers))
                else:
                    self.route(path)
            except _Refused as why:
                headers = {"X-Error-Code": why.code, "X-Error-Message": why.message}
                self.send(why.status, json.dumps({"error": why.message}).encode(), headers)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def route(self, path: str) -> None:
            if path == "/":
                return self.send(200, b"a hub")
            if match := re.fullmatch(r"/large/([0-9a-f]{64})", path):
                return self.file(hub.large[match[1]], {})
            if match := re.fullmatch(
                r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/(.+))?", path
            ):
                return self.api(match[1], match[2], match[3], match[4] or "main")
            if match := re.fullmatch(r"(/datasets)?/([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path):
                return self.resolve("datasets" if match[1] else "models", match[2], match[3], match[4])
            raise _Refused(404, "", "Not Found")

        def commit(self, kind: str, name: str, ref: str) -> tuple[str, dict[str, bytes], Repo]:
            repo = hub.repos.get((kind, name))
            said = self.headers.get("Authorization")
            if repo is None or (repo.token is not None and said != f"Bearer {repo.token}"):
                raise _Refused(401, "RepoNotFound", "Invalid username or password.")
            commit = repo.refs.get(ref, ref)
            if commit not in repo.commits:
                raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {ref}")
            return commit, repo.commits[commit], repo

        def api(self, kind: str, name: str, what: str | None, rest: str) -> None:
            match = re.match(r"(refs/[^/]+/[^/]+|[^/]+)/?(.*)", rest)
            assert match is not None
            commit, files, repo = self.commit(kind, name, match[1])
            if what == "tree":
                return self.json(list(self.tree(files, match[2])))
            if what == "paths-info":
                asked = parse_qs(self.body.decode())
                paths = asked.get("paths") or json.loads(self.body)["paths"]
                return self.json([_entry(path, files[path]) for path in paths if path in files])
            siblings = [
                {"rfilename": path} | ({"size": len(data)} if "blobs" in self.query else {})
                for path, data in files.items()
            ]
            about = {"_id": "0", "id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            return self.json(about | {"gated": "manual" if repo.gated else False, "downloads": 0, "likes": 0})

        def tree(self, files: Mapping[str, bytes], under: str) -> Iterator[dict[str, Any]]:
            """The entries one level below a folder, or all of them."""
            deep = self.query.get("recursive", [""])[0].lower() in ("true", "1")
            start = f"{under}/" if under else ""
            folders: set[str] = set()
            for path, data in files.items():
                if not path.startswith(start):
                    continue
                above = path[len(start) :].split("/")[:-1]
                for depth in range(1, len(above) + 1 if deep else min(2, len(above) + 1)):
                    folders.add(start + "/".join(above[:depth]))
                if deep or not above:
                    yield _entry(path, data)
            if under and not any(path.startswith(start) for path in files):
                raise _Refused(404, "EntryNotFound", f"{under} does not exist")
            for folder in sorted(folders):
                yield {"type": "directory", "path": folder, "oid": _oid(folder.encode()), "size": 0}

        def resolve(self, kind: str, name: str, ref: str, path: str) -> None:
            commit, files, repo = self.commit(kind, name, ref)
            if repo.gated:
                raise _Refused(403, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted.")
            if path not in files:
                raise _Refused(404, "EntryNotFound", "Entry not found")
            data = files[path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(data)}"'}
            if len(data) < LFS_FROM:
                return self.file(data, headers)
            sha256 = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256}"'}
            self.send(302, b"", headers | {"Location": f"{hub.large_url}/{sha256}"})

        def file(self, data: bytes, headers: dict[str, str]) -> None:
            status = 200
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(match[1]), int(match[2] or len(data) - 1)
                headers |= {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
                data, status = data[first : last + 1], 206
            self.send(status, data, headers | {"Accept-Ranges": "bytes"})

        def json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if self.broken is not None and self.broken.status is None:
                self.wfile.write(data[: self.broken.bytes])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(data)

    return Handler
