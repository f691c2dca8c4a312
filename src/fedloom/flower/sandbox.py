"""A whole deployment on this machine's loopback: a SuperLink, SuperNodes and their workers, and all of them stopped after.

Flower is only ever started as its own commands, with telemetry, update checks and run-time installs off.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from fedloom.errors import ConfigError, RunError
from fedloom.flower import ipc
from fedloom.flower.message import printable
from fedloom.flower.supervisor import Program, Supervisor
from fedloom.flower.transport import GridTransport

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # One of the three pauses in a round that can be made shorter; the other two are fixed in Flower.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}
_SUBMIT_S = 300.0
APP = """[project]
name = "fedloom-link"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedloom"

[tool.flwr.app.components]
serverapp = "fedloom.flower.apps:server"
clientapp = "fedloom.flower.apps:client"

[tool.flwr.app.config]
socket = ""
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


def wait_for_port(port: int, alive: Callable[[], bool], what: str, patience_s: float = 120.0) -> None:
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


def lend(
    superlink: str,
    home: Path,
    listener_path: Path,
    certificates: Path | None = None,
    alive: Callable[[], bool] = lambda: True,
) -> GridTransport:
    """Submit the app that lends its grid to us, to the SuperLink at `superlink`, and wait until it does.

    `alive` says whether the SuperLink runs, where somebody knows. Raises RunError with Flower's own words if the app is not
    accepted.
    """
    app = _app(superlink, home, certificates)
    with ipc.Listener(listener_path) as listener:
        try:
            done = subprocess.run(
                [command("flwr"), "run", str(app), "fedloom", "-c", f'socket="{listener_path}"'],
                env=os.environ | environment(home),
                capture_output=True,
                text=True,
                timeout=_SUBMIT_S,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"the SuperLink at {superlink} did not take the run within {_SUBMIT_S:.0f} s") from None
        if done.returncode != 0:
            said = printable((done.stdout + done.stderr)[-600:], 600)
            raise RunError(f"the SuperLink at {superlink} did not take the run: {said}")
        return GridTransport.accept(listener, alive=alive)


def _app(superlink: str, home: Path, certificates: Path | None) -> Path:
    """Write Flower's configuration and our app below `home`; the app's folder."""
    app = home / "app"
    app.mkdir(parents=True, exist_ok=True)
    (app / "pyproject.toml").write_text(APP)
    secure = (
        "insecure = true" if certificates is None else f"root-certificates = {json.dumps(str(certificates.resolve()))}"
    )
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "fedloom"\n\n[superlink.fedloom]\naddress = {json.dumps(superlink)}\n{secure}\n'
    )
    return app


class Deployment:
    """A SuperLink and `nodes` SuperNodes, each with its worker, for a `with` block.

    `worker` gives the command of a worker that listens at a socket. A worker that dies is started again.
    """

    def __init__(self, nodes: int, logs: Path, worker: Callable[[Path], list[str]]) -> None:
        if nodes < 1:
            raise ConfigError(f"engine.nodes is {nodes}, expected at least 1")
        self.logs = logs
        self.folder = Path(tempfile.mkdtemp(prefix="fedloom-"))  # short: it holds sockets
        self.home = self.folder / "home"
        self.port, *runtime = free_ports(nodes + 1)
        env = environment(self.home)
        programs = [Program("superlink", superlink(self.port), env)]
        self.sockets = [self.folder / f"w{k}" for k in range(nodes)]
        for k in range(nodes):
            programs.append(Program(f"supernode-{k}", supernode(self.port, runtime[k], self.sockets[k]), env))
            programs.append(Program(f"worker-{k}", worker(self.sockets[k]), env, restart=True))
        self.supervisor = Supervisor(programs, logs, remove=self.folder)

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.supervisor.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def alive(self) -> bool:
        """Whether the SuperLink runs."""
        return self.supervisor.running("superlink")

    def connect(self) -> GridTransport:
        """A grid of a new run on this deployment."""
        wait_for_port(self.port, self.alive, f"the SuperLink (log: {self.logs})")
        path = self.folder / f"link-{secrets.token_hex(4)}"
        return lend(f"127.0.0.1:{self.port}", self.home, path, alive=self.alive)


def superlink(port: int) -> list[str]:
    """The command of a SuperLink on the loopback, without TLS: for one machine only."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [command("flower-superlink"), "--insecure", *where, "--disable-runtime-dependency-installation"]


def supernode(link_port: int, port: int, worker_socket: Path) -> list[str]:
    """The command of a SuperNode on the loopback."""
    where = ["--superlink", f"127.0.0.1:{link_port}", "--host", "127.0.0.1", "--port", str(port)]
    return [command("flower-supernode"), "--insecure", *where, "--node-config", f'worker="{worker_socket}"']
