"""Two sites with rows of their own, TLS and node authentication: the guide's commands, run for real on the loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedloom.errors import ConfigError
from fedloom.flower import sandbox
from fedloom.flower.sandbox import free_ports
from fedloom.flower.supervisor import Program, Supervisor
from fedloom.runs import finished
from fedloom.runs.config import parse
from fedloom.runs.experiment import experiment
from fedloom.runs.flower_node import agreement, remote_node
from fedloom.runs.run_directory import RunDirectory

Settings = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.xdist_group("flower")
CLI = [sys.executable, "-c", "from fedloom.cli.main import main; main()"]
SECRET = "quetzalcoatl"


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fedloom-sites-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def sh(line: str, folder: Path, **env: str) -> str:
    done = subprocess.run(
        line, shell=True, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def certificates(folder: Path, prefix: str = "", name: str = "server") -> None:
    """As the guide has them: PREFIXca.crt, and what it signed for this machine as NAME.pem, NAME.key."""
    ca = f"{prefix}ca"
    sh(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 2 -subj '/CN=two sites' "
        f"-keyout {ca}.key -out {ca}.crt && "
        "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj '/CN=localhost' "
        f"-keyout {name}.key -out {name}.csr && "
        "printf 'subjectAltName=DNS:localhost,IP:127.0.0.1' > san.txt && "
        f"openssl x509 -req -in {name}.csr -CA {ca}.crt -CAkey {ca}.key -CAcreateserial -days 2 -extfile san.txt "
        f"-out {name}.pem",
        folder,
    )


def rows(source: Path, folder: Path) -> None:
    """Half of the questions for each site, with a word that no other machine may ever see."""
    lines = [line.split(",") for line in source.read_text().splitlines()[1:]]
    for name, part in (("north", lines[::2]), ("south", lines[1::2])):
        with (folder / f"{name}.jsonl").open("w") as file:
            for text, label, _ in part:
                file.write(json.dumps({"text": f"{text} {SECRET}", "label": label}) + "\n")


def test_two_sites_with_tls_and_node_authentication(settings: Settings, questions: Path, folder: Path) -> None:
    pytest.importorskip("flwr")
    certificates(folder)
    certificates(folder, "local-", "local")  # a site has nothing of the server's but ca.crt
    for name in ("north", "south", "stranger"):
        sh(f"ssh-keygen -q -t ecdsa -b 384 -N '' -f {name}", folder)
    rows(questions, folder)
    values = settings(
        method={"name": "fslora"},
        train={"rounds": 2, "local_steps": 2, "evaluate_every": 0},
        engine={"deadline_s": 60.0, "patience_s": 120.0, "threads": 1},
    )
    values["clients"] = {"partition": "dirichlet"}  # of a simulation with the same file
    (folder / "run.toml").write_text(tomli_w.dumps(values))
    env = sandbox.environment(folder / "home")
    port, *runtime = free_ports(4)

    def tls(ca: str, name: str) -> list[str]:
        files = {"--ssl-ca-certfile": f"{ca}.crt", "--ssl-certfile": f"{name}.pem", "--ssl-keyfile": f"{name}.key"}
        return [part for option, file in files.items() for part in (option, str(folder / file))]

    def node(k: int, name: str) -> Program:
        start = [sandbox.command("flower-supernode"), "--root-certificates", str(folder / "ca.crt")]
        start += ["--superlink", f"127.0.0.1:{port}", "--port", str(runtime[k])]
        start += tls("local-ca", "local")
        start += ["--auth-supernode-private-key", str(folder / name)]
        return Program(f"supernode-{name}", [*start, "--node-config", f'worker="{folder}/{name}.socket"'], env)

    def worker(name: str, *more: str) -> Program:
        start = [*CLI, "node", str(folder / "run.toml"), "--data", str(folder / f"{name}.jsonl"), "--id", name]
        start += ["--socket", str(folder / f"{name}.socket"), "--folder", str(folder / f"site-{name}"), *more]
        return Program(f"node-{name}", start, env)

    link = [
        sandbox.command("flower-superlink"),
        *tls("ca", "server"),
        "--enable-supernode-auth",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    link += ["--database", str(folder / "state.db"), "--disable-runtime-dependency-installation"]
    supervisors = [
        Supervisor([Program("superlink", link, env), worker("north"), worker("south", "--rank", "2")], folder / "logs")
    ]
    try:
        sandbox.wait_for_port(port, lambda: supervisors[0].running("superlink"), "the SuperLink")
        home = folder / "home"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "sites"\n\n[superlink.sites]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{folder}/ca.crt"\n'
        )
        for name in ("north", "south"):
            sh(f"{sandbox.command('flwr')} supernode register {name}.pub sites", folder, **env)
        supervisors.append(Supervisor([node(0, "north"), node(1, "south"), node(2, "stranger")], folder / "logs"))
        serve = [*CLI, "serve", str(folder / "run.toml"), "--superlink", f"127.0.0.1:{port}", "--clients", "2"]
        serve += ["--root-certificates", str(folder / "ca.crt"), "--out", str(folder / "run")]
        done = subprocess.run(serve, capture_output=True, text=True, timeout=240, env=os.environ | env, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "clients.partition: of no effect, as each node brings its own" in " ".join(
            (done.stdout + done.stderr).split()
        )
        until = time.monotonic() + 30
        while supervisors[1].running("supernode-stranger") and time.monotonic() < until:
            time.sleep(0.2)
        assert not supervisors[1].running("supernode-stranger")
        assert "305" in (folder / "logs" / "supernode-stranger.log").read_text()
    finally:
        for supervisor in reversed(supervisors):
            supervisor.close()

    run = RunDirectory(folder / "run")
    assert run.manifest()["clients"] == {
        "north": {"examples": 24, "rank": 4, "keep": 1.0},
        "south": {"examples": 24, "rank": 2, "keep": 1.0},
    }
    said = "".join(
        f"\n== {log.name}\n{log.read_text()[-3000:]}" for log in sorted((folder / "logs").glob("*-north.log"))
    )
    assert [r["dropped"] for r in run.rounds()] == [{}] * 3, said
    assert [r["clients"] for r in run.rounds()[1:]] == [["north", "south"]] * 2
    for name in ("north", "south"):
        said = re.findall(
            r"process (\d+), base model loaded (\d+) time", (folder / f"logs/node-{name}.log").read_text()
        )
        assert len(said) >= 2 and len(set(said)) == 1 and said[0][1] == "1"
    # What a run in one process can be asked, this one can.
    assert all(expected == now for _, expected, now in finished.verify(run.path))
    assert finished.evaluate_saved(run.path) == pytest.approx(run.rounds()[-1]["eval"], abs=1e-5)
    # Rows stay where they are: a word that all of them have is nowhere with the server, nor in what the SuperLink stored.
    stored = [path for path in (folder / "run").rglob("*") if path.is_file()] + list(folder.glob("state.db*"))
    assert len(stored) > 5 and not any(SECRET.encode() in path.read_bytes() for path in stored)


def test_a_site_takes_part_only_in_the_run_of_its_own_file(settings: Settings, tmp_path: Path) -> None:
    ours = parse(settings(clients={"count": 1}, train={"rounds": 3}), "test")
    theirs = parse(settings(clients={"count": 1}, train={"rounds": 3, "lr": 0.5}, method={"name": "fedit"}), "test")
    e = experiment(ours)
    node = remote_node(ours, "north", tmp_path)
    header = {"run": "1", "labels": e.tables.labels, "metrics": e.tables.metrics, "model": e.base.sha256}
    with pytest.raises(ConfigError, match=r"method\.name, train\.lr differ"):
        node.setup(header | {"agreement": agreement(theirs)})
    with pytest.raises(ConfigError, match="named no labels"):
        node.setup({"run": "1", "agreement": agreement(ours)})
    with pytest.raises(ConfigError, match="has no name"):
        node.setup(header | {"run": "../../etc", "agreement": agreement(ours)})
    with pytest.raises(ConfigError, match="base model here is not the server's"):
        node.setup(header | {"agreement": agreement(ours), "model": "0"})
    with pytest.raises(ConfigError, match="named no metrics"):
        node.setup(header | {"agreement": agreement(ours), "metrics": [1]})
    (client,) = node.setup(header | {"agreement": agreement(ours)}).clients
    assert (client.id, client.rank, client.keep) == ("north", 4, 1.0) and node.loads == 1
