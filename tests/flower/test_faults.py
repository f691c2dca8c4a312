"""What goes wrong on a real loopback deployment is recorded with its reason, costs at most the deadline, and loses nothing."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from fedloom import checkpoint
from fedloom.core import Exchange, Failure, Method, Round, State
from fedloom.engine import Answer, Job, Total
from fedloom.errors import RoundError
from fedloom.flower.message import unpack
from fedloom.flower.sandbox import Deployment, environment, free_ports, lend, superlink, supernode, wait_for_port
from fedloom.flower.supervisor import Program, Supervisor
from fedloom.flower.transport import GridTransport
from fedloom.loop import federate
from fedloom.privacy.secure_visits import SecureSums
from fedloom.runs import run as runs
from fedloom.runs.config import RunConfig, parse
from fedloom.runs.experiment import experiment
from fedloom.runs.flower_node import local_worker
from fedloom.runs.run_directory import RunDirectory
from fedloom.simulation import LocalVisits, Simulation

from . import toys
from .middleman import Middleman

Settings = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.xdist_group("flower")

# A test session in the background inherits an ignored SIGINT, which Python then leaves ignored: take it back.
COMMAND_LINE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from fedloom.cli.main import main; main()"
)


class Machines:
    """A SuperLink, two SuperNodes, a middleman and a worker behind each."""

    def __init__(self, logs: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fedloom-test-"))
        port, *runtime = free_ports(3)
        env = environment(self.folder / "home")
        self.middle = [Middleman(self.folder / f"m{k}", self.folder / f"w{k}") for k in range(2)]
        programs = [Program("superlink", superlink(port), env)]
        for k in range(2):
            programs.append(Program(f"supernode-{k}", supernode(port, runtime[k], self.folder / f"m{k}"), env))
            programs.append(Program(f"worker-{k}", local_worker(self.folder / f"w{k}", 1), env, restart=True))
        self.supervisor = Supervisor(programs, logs)
        wait_for_port(port, lambda: self.supervisor.running("superlink"), "the SuperLink")
        self.transport = lend(f"127.0.0.1:{port}", self.folder / "home", self.folder / "link")

    def close(self) -> None:
        self.transport.close()
        self.supervisor.close()
        for middle in self.middle:
            middle.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    pytest.importorskip("flwr")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    machines = Machines(tmp_path_factory.mktemp("logs"))
    yield machines
    machines.close()
    torch.set_num_threads(before)


class Absent(Simulation[Any]):
    """The same participation in this process: some clients are missing in some rounds."""

    missing: dict[int, set[str]]

    def visits(self, method: Method, round: Round) -> LocalVisits[Any]:
        return _AbsentVisits(self, method, round)


class _AbsentVisits(LocalVisits[Any]):
    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        assert isinstance(self.engine, Absent)
        gone = self.engine.missing.get(self.round.t, set())
        every = list(jobs)
        yield from (Failure(client, "missing") for client, _ in every if client.id in gone)
        yield from super().exchange([job for job in every if job[0].id not in gone], x)


def reference(config: RunConfig, missing: dict[int, set[str]]) -> State:
    e = experiment(config)
    engine = Absent(e.trainer, e.sites, e.rows_of, fresh=e.head, cohort=1)
    engine.missing = missing
    return federate(e.method, engine, e.initial_state(), e.clients, config.train.rounds)


def same(a: State, b: State) -> bool:
    return checkpoint.flatten(a).keys() == checkpoint.flatten(b).keys() and all(
        torch.equal(x, checkpoint.flatten(b)[key]) for key, x in checkpoint.flatten(a).items()
    )


def final(run: Path) -> State:
    return checkpoint.load(RunDirectory(run).checkpoint)[1]


def corrupted(message: bytes, worker: Callable[[bytes], bytes]) -> bytes:
    answer = bytearray(worker(message))
    answer[len(answer) // 2] ^= 4
    return bytes(answer)


def pickled(message: bytes, worker: Callable[[bytes], bytes]) -> bytes:
    worker(message)
    return pickle.dumps({"A": [1.0]})


def late(message: bytes, worker: Callable[[bytes], bytes]) -> bytes:
    answer = worker(message)
    time.sleep(14)
    return answer


def honest(message: bytes, worker: Callable[[bytes], bytes]) -> bytes:
    return worker(message)


def test_bad_uploads_are_dropped_with_their_reason_and_nothing_else_changes(
    machines: Machines, settings: Settings, tmp_path: Path
) -> None:
    first, second = machines.middle
    refusals: list[dict[str, Any]] = []

    def replayed(message: bytes, worker: Callable[[bytes], bytes]) -> bytes:
        worker(message)
        # To the worker, the message of the round before; to the server, that round's answer.
        old_message, old_answer = seen[-1]
        refusals.append(unpack(worker(old_message))[0])
        return old_answer

    # By the order of node ids either middleman may serve the first clients: what is asserted is by what was dropped.
    seen = first.seen
    first.rules = [corrupted, honest, replayed]
    second.rules = [honest, pickled, honest, late]
    values = settings(
        method={"name": "fedit"},
        clients={"count": 4},
        train={"rounds": 5, "evaluate_every": 0, "local_steps": 2},
        engine={"cohort": 1, "deadline_s": 10.0, "name": "flower"},
    )
    config = parse(values, "test")
    start = time.monotonic()
    result = runs.start(config, tmp_path / "run", transport=machines.transport)
    records = result.rounds
    by_round = {r["round"]: r["dropped"] for r in records}
    assert len(by_round[1]) == 2 and all("sha256" in why for why in by_round[1].values())
    assert len(by_round[2]) == 2 and all("pickle" in why for why in by_round[2].values())
    assert len(by_round[3]) == 2 and all("belongs to message" in why for why in by_round[3].values())
    assert len(by_round[4]) == 2 and all("no answer within 10 s" in why for why in by_round[4].values())
    assert by_round[5] == {}  # the clients of the late node are served by the other
    assert records[4]["seconds"]["total"] < 13
    assert "replayed" in refusals[0]["refused"]
    assert set(by_round[1]) == set(by_round[3]) != set(by_round[2])

    missing = {t: set(dropped) for t, dropped in by_round.items()}
    assert same(final(tmp_path / "run"), reference(config, missing))
    assert time.monotonic() - start < 120
    time.sleep(2)


def test_a_quorum_that_is_missed_stops_the_run_at_its_checkpoint(
    machines: Machines, settings: Settings, tmp_path: Path
) -> None:
    for middle in machines.middle:
        middle.rules = [corrupted]
    values = settings(
        clients={"count": 2},
        train={"rounds": 1, "local_steps": 1},
        engine={"name": "flower", "deadline_s": 30.0, "quorum": 2},
    )
    with pytest.raises(RoundError, match=r"0 of 2 clients sent a usable update.*sha256.*checkpoint of round 0"):
        runs.start(parse(values, "test"), tmp_path / "run", transport=machines.transport)
    result = runs.resume(tmp_path / "run", transport=machines.transport)
    assert [r["round"] for r in result.rounds] == [0, 1] and result.rounds[1]["dropped"] == {}


def test_a_client_killed_within_a_secure_sum_and_the_bytes_of_the_simulator(
    machines: Machines, settings: Settings, tmp_path: Path
) -> None:
    """Its worker is killed between training and its upload, then between its upload and the opening of the sum."""
    values = settings(
        method={"name": "fedit"},
        clients={"count": 3},
        train={"rounds": 2, "evaluate_every": 0, "local_steps": 2},
        engine={"name": "flower", "cohort": 1, "deadline_s": 120.0},
        privacy={"secure_aggregation": True, "min_clients": 2},
    )
    config = parse(values, "test")
    e = experiment(config)
    victim = e.clients[1].id  # alone on its node
    killed: list[tuple[str, int]] = []

    def rule(k: int) -> Callable[[bytes, Callable[[bytes], bytes]], bytes]:
        def kills(message: bytes, worker: Callable[[bytes], bytes]) -> bytes:
            header, answer = unpack(message)[0], b""
            at = header["do"], header["t"]
            if header["do"] != "unmask":
                answer = worker(message)
            if header["clients"] == [victim] and at in (("exchange", 1), ("unmask", 2)) and at not in killed:
                pid = machines.supervisor.ids[f"worker-{k}"]
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                killed.append(at)
                return b""
            return answer or worker(message)

        return kills

    for k, middle in enumerate(machines.middle):
        middle.rules = [rule(k)] * 20
    result = runs.start(config, tmp_path / "run", transport=machines.transport)
    for middle in machines.middle:
        middle.rules = []
    assert killed == [("exchange", 1), ("unmask", 2)]
    assert [set(r["dropped"]) for r in result.rounds] == [set(), {victim}, set()]
    assert f"without shares of {victim}" in " ".join(result.rounds[2]["engine"]["notes"])
    assert result.rounds[2]["bytes_up"]["masks"] > 0 and result.rounds[2]["train_loss"] is None

    engine = toys.Absent(e.trainer, e.sites, e.rows_of, fresh=e.head, cohort=1)
    engine.sums, engine.gone = SecureSums(least=2), {1: {victim}}
    want = federate(e.method, engine, e.initial_state(), e.clients, 2)
    assert same(final(tmp_path / "run"), want)
    plain = parse(values | {"engine": {"cohort": 1}}, "test")
    assert not same(want, final(runs.start(plain, tmp_path / "whole").path))


def test_a_killed_node_costs_one_deadline_and_its_clients_go_on(
    machines: Machines, settings: Settings, tmp_path: Path
) -> None:
    def killing(message: bytes, worker: Callable[[bytes], bytes]) -> bytes:
        pid = machines.supervisor.ids["supernode-1"]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return worker(message)

    machines.middle[0].rules, machines.middle[1].rules = [], [killing]
    values = settings(
        method={"name": "fedit"},
        clients={"count": 4},
        train={"rounds": 3, "evaluate_every": 0, "local_steps": 2},
        engine={"name": "flower", "cohort": 1, "deadline_s": 10.0},
    )
    config = parse(values, "test")
    result = runs.start(config, tmp_path / "run", transport=machines.transport)
    dropped = {r["round"]: r["dropped"] for r in result.rounds}
    assert sorted(dropped[1].values()) == ["late: no answer within 10 s"] * 2
    assert dropped[2] == dropped[3] == {}
    assert all(r["seconds"]["total"] < 13 for r in result.rounds)
    missing = {t: set(d) for t, d in dropped.items()}
    assert same(final(tmp_path / "run"), reference(config, missing))


def running_with(folder: Path) -> list[int]:
    """Processes whose environment or command names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text:
            found.append(int(path.name))
    return found


def command(*args: str) -> list[str]:
    return [sys.executable, "-c", COMMAND_LINE, *args]


class Command:
    """`fedloom run` as a process of its own, whose own processes can be told by the folder of their sockets."""

    def __init__(self, values: dict[str, Any], folder: Path) -> None:
        (folder / "run.toml").write_text(tomli_w.dumps(values))
        self.sockets = Path(tempfile.mkdtemp(prefix="fl-"))
        self.env = os.environ | {"TMPDIR": str(self.sockets)}
        self.run = folder / "run"
        self.process = subprocess.Popen(
            command("run", str(folder / "run.toml"), "--out", str(self.run)), env=self.env, cwd=folder
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.nothing_left()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def wait_for_round(self, t: int) -> None:
        until = time.monotonic() + 180
        while len(RunDirectory(self.run).rounds()) <= t:
            assert self.process.poll() is None and time.monotonic() < until
            time.sleep(0.05)

    def nothing_left(self) -> None:
        until = time.monotonic() + 30
        while running_with(self.sockets) and time.monotonic() < until:
            time.sleep(0.1)
        assert running_with(self.sockets) == []


def test_a_killed_server_leaves_nothing_running_and_resumes_to_the_same_bytes(
    settings: Settings, tmp_path: Path
) -> None:
    pytest.importorskip("flwr")
    values = settings(
        method={"name": "fedsa_lora"},
        clients={"count": 2},
        train={"rounds": 2, "evaluate_every": 0, "local_steps": 2},
        engine={"name": "flower", "cohort": 1, "threads": 1, "deadline_s": 60.0},
    )
    with Command(values, tmp_path) as started:
        started.wait_for_round(1)
        time.sleep(2.0)  # within round 2
        started.process.kill()
        assert started.process.wait(60) == -signal.SIGKILL
        assert len(RunDirectory(started.run).rounds()) == 2
        started.nothing_left()
        subprocess.run(command("resume", str(started.run)), env=started.env, cwd=tmp_path, check=True, timeout=180)
        started.nothing_left()
        run = started.run
    undisturbed = runs.start(parse(values | {"engine": {"cohort": 1, "threads": 1}}, "test"), tmp_path / "other")
    assert [r["dropped"] for r in RunDirectory(run).rounds()] == [{}] * len(undisturbed.rounds)
    ours = {p.relative_to(run): p.read_bytes() for p in run.glob("**/adapter_model.safetensors")}
    theirs = {
        p.relative_to(undisturbed.path): p.read_bytes() for p in undisturbed.path.glob("**/adapter_model.safetensors")
    }
    assert ours == theirs and len(ours) == 3


def test_an_interrupted_run_stops_everything_it_started(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    values = settings(method={"name": "fedit"}, clients={"count": 2}, engine={"name": "flower", "threads": 1})
    with Command(values, tmp_path) as started:
        started.wait_for_round(0)
        time.sleep(1.0)  # within round 1
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(60) == 130
        assert running_with(started.sockets) == []  # at once, not after a while


def test_a_link_that_is_lost_says_so() -> None:
    from multiprocessing.connection import Pipe

    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(RoundError, match="connection to the SuperLink is lost"):
        GridTransport(ours).nodes()


def test_a_link_whose_process_ended_is_noticed_at_once() -> None:
    from multiprocessing.connection import Pipe

    ours, theirs = Pipe()
    start = time.monotonic()
    with pytest.raises(RoundError, match="its process has ended"):
        GridTransport(ours, alive=lambda: False).nodes()
    assert time.monotonic() - start < 5
    theirs.close()


def test_a_dead_worker_lives_again_and_a_dead_superlink_is_noticed_at_once(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    values = settings(
        method={"name": "fedsa_lora"},
        clients={"count": 2},
        train={"rounds": 4, "evaluate_every": 0, "local_steps": 2},
        engine={"name": "flower", "cohort": 1, "threads": 1, "deadline_s": 60.0, "nodes": 2},
    )
    config = parse(values, "test")
    with Deployment(2, tmp_path / "logs", lambda path: local_worker(path, 1)) as deployment:
        transport = deployment.connect()
        kills = {1: "worker-0", 3: "superlink"}

        class Killer(runs.Observer):
            def round(self, record: dict[str, Any]) -> None:
                pid = deployment.supervisor.ids.get(kills.pop(record["round"], ""))
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(time.monotonic())

        killed: list[float] = []
        with pytest.raises(RoundError, match=r"connection to the SuperLink is lost.*resume"):
            runs.start(config, tmp_path / "run", Killer(), transport)
        assert time.monotonic() - killed[1] < 30
        transport.close()
    records = RunDirectory(tmp_path / "run").rounds()
    # The worker is there again before the message is, or a round later.
    assert [r["round"] for r in records] == [0, 1, 2, 3] and records[3]["dropped"] == {}
    assert not deployment.folder.exists()
