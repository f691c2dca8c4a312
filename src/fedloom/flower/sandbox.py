"""A whole deployment on this machine's loopback: a SuperLink, SuperNodes and their workers, and all of them stopped after.

Flower is only ever started as its own commands, with telemetry, update checks and run-time installs off.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fedloom.engines import channel
from fedloom.engines.link import GridLink
from fedloom.errors import ConfigError, RunError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # One of the three pauses in a round that can be made shorter; the other two are fixed in Flower.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}
APP = """[project]
name = "fedloom-link"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedloom"

[tool.flwr.app.components]
serverapp = "fedloom.engines.flower:server"
clientapp = "fedloom.engines.flower:client"

[tool.flwr.app.config]
link = ""
"""


def environment(home: Path) -> dict[str, str]:
    """What every process of Flower is started with: silent, with a home of its own, and finding its sister commands."""
    return {**QUIET, "FLWR_HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def command(name: str) -> str:
    """Path of one of Flower's commands. Raises ConfigError if flwr is not installed."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not installed, which engine.name = 'flower' needs: pip install 'fedloom[flower]'")
    return found


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass
class Spec:
    """One process to start."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


class Keeper:
    """Processes that end with this one. Their output is in `logs`/NAME.log."""

    def __init__(self, specs: Sequence[Spec], logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedloom.engines.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        lines = [
            {"name": s.name, "command": s.command, "log": str(logs / f"{s.name}.log"), "env": s.env} for s in specs
        ]
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(lines) + "\n")
        self._process.stdin.flush()
        self.ids: dict[str, int] = dict(json.loads(self._process.stdout.readline()) for _ in specs)
        """Name -> process id."""

    def running(self, name: str) -> bool:
        """Whether a process has not ended."""
        try:
            return Path(f"/proc/{self.ids[name]}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def close(self) -> None:
        """Stop all; returns when they have ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def wait_for_port(port: int, alive: Any, what: str, patience_s: float = 120.0) -> None:
    """Return when something listens at the port. Raises RunError if `alive()` ends or time does."""
    until = time.monotonic() + patience_s
    while True:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if not alive() or time.monotonic() > until:
            raise RunError(f"{what} does not listen at port {port} of 127.0.0.1")
        time.sleep(0.1)


def lend(superlink: str, home: Path, listener_path: Path, certificates: Path | None = None) -> GridLink:
    """Submit the app that lends its grid to us, to the SuperLink at `superlink`, and wait until it does.

    Raises RunError with Flower's own words if it is not accepted.
    """
    home.mkdir(parents=True, exist_ok=True)
    app = home / "app"
    app.mkdir(exist_ok=True)
    (app / "pyproject.toml").write_text(APP)
    secure = (
        "insecure = true" if certificates is None else f"root-certificates = {json.dumps(str(certificates.resolve()))}"
    )
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "fedloom"\n\n[superlink.fedloom]\naddress = "{superlink}"\n{secure}\n'
    )
    with channel.listen(listener_path) as listener:
        done = subprocess.run(
            [command("flwr"), "run", str(app), "fedloom", "-c", f'link="{listener_path}"'],
            env=os.environ | environment(home),
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            said = " ".join((done.stdout + done.stderr).split())[-600:]
            raise RunError(f"the SuperLink at {superlink} did not take the run: {said}")
        return GridLink.accept(listener)


class Deployment:
    """A SuperLink and `nodes` SuperNodes, each with its worker, for a `with` block."""

    def __init__(self, nodes: int, logs: Path, threads: int | None = None) -> None:
        if nodes < 1:
            raise ConfigError(f"engine.nodes is {nodes}, expected at least 1")
        self.logs = logs
        self.folder = Path(tempfile.mkdtemp(prefix="fedloom-"))  # short: it holds sockets
        self.home = self.folder / "home"
        self.port, *runtime = free_ports(nodes + 1)
        env = environment(self.home)
        specs = [Spec("superlink", superlink(self.port), env)]
        self.sockets = [self.folder / f"w{k}" for k in range(nodes)]
        for k in range(nodes):
            specs.append(Spec(f"supernode-{k}", supernode(self.port, runtime[k], self.sockets[k]), env))
            specs.append(Spec(f"worker-{k}", worker(self.sockets[k], threads), env))
        self.started = time.monotonic()
        self.keeper = Keeper(specs, logs)

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keeper.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self) -> GridLink:
        """A grid of a new run on this deployment."""
        wait_for_port(self.port, lambda: self.keeper.running("superlink"), f"the SuperLink (log: {self.logs})")
        return lend(f"127.0.0.1:{self.port}", self.home, self.folder / f"link{len(list(self.folder.glob('link*')))}")


def superlink(port: int) -> list[str]:
    """The command of a SuperLink on the loopback, without TLS: for one machine only."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [command("flower-superlink"), "--insecure", *where, "--disable-runtime-dependency-installation"]


def supernode(link_port: int, port: int, worker_socket: Path) -> list[str]:
    """The command of a SuperNode on the loopback."""
    where = ["--superlink", f"127.0.0.1:{link_port}", "--host", "127.0.0.1", "--port", str(port)]
    return [command("flower-supernode"), "--insecure", *where, "--node-config", f'worker="{worker_socket}"']


def worker(path: Path, threads: int | None) -> list[str]:
    """The command of a worker that serves whatever client of whatever run the server names."""
    share = [sys.executable, "-m", "fedloom.runs.node", "--socket", str(path)]
    return share if threads is None else [*share, "--threads", str(threads)]
