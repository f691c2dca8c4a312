"""What we use of Flower is as it was when we pinned it. If this fails, Flower changed: read the reason before anything else."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import fedloom
from fedloom.flower import sandbox
from fedloom.flower.message import WireError

flwr = pytest.importorskip("flwr")
SOURCE = Path(fedloom.__file__).parent


def parameters(of: object) -> set[str]:
    assert callable(of)
    return set(inspect.signature(of).parameters)


def test_the_version_is_the_pinned_one() -> None:
    got = version("flwr")
    assert got.startswith("1.41."), (
        f"flwr {got} is installed, the engine was written for 1.41: run tests/flower against it, "
        "then widen the pin in pyproject.toml and here"
    )
    project = tomllib.loads((SOURCE.parent.parent / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["flower"] == ["flwr>=1.41,<1.42"]


def test_one_module_imports_flwr() -> None:
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name == "flwr" or name.startswith("flwr.") for name in names):
                found.add(str(path.relative_to(SOURCE)))
                assert all(name in ("flwr.app", "flwr.serverapp", "flwr.clientapp") for name in names if "flwr" in name)
    assert found == {"flower/apps.py"}


def test_the_apps_import_neither_torch_nor_the_rest_of_us() -> None:
    code = (
        "import sys, fedloom.flower.apps;"
        "print(sorted(x for x in sys.modules if x in ('torch', 'transformers', 'fedloom.core', 'ray')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_grid_and_its_messages_are_as_we_use_them() -> None:
    from flwr.app import Array, Context, Error, Message, Metadata
    from flwr.serverapp import Grid

    assert parameters(Grid.get_node_ids) == {"self"}
    assert parameters(Grid.push_messages) == {"self", "messages"}
    assert parameters(Grid.pull_messages) == {"self", "message_ids"}
    assert {"dtype", "shape", "stype", "data"} <= parameters(Array)
    assert {"content", "dst_node_id", "message_type", "ttl", "reply_to"} <= parameters(Message.__init__) or {
        "args",
        "kwargs",
    } & parameters(Message)
    for cls, names in {
        Message: ("has_error", "content", "error", "metadata"),
        Metadata: ("reply_to_message_id",),
        Error: ("code", "reason"),
    }.items():
        assert all(hasattr(cls, name) for name in names), cls
    assert {"node_config", "run_config"} <= parameters(Context)


def test_our_bytes_pass_through_flowers_record_unchanged() -> None:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from fedloom.flower.apps import KEY, RECORD, unwrap, wrap

    data = bytes(range(256)) * 50_000  # more than one of the chunks that Flower cuts
    assert unwrap(wrap(data)) == data
    numpy = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"\x93NUMPY")
    for wrong in (
        RecordDict({}),
        RecordDict({"other": ArrayRecord({})}),
        RecordDict({RECORD: ConfigRecord({KEY: b"x"})}),
        RecordDict({RECORD: ArrayRecord({KEY: numpy})}),
        RecordDict({RECORD: ArrayRecord({KEY: numpy}), "more": ConfigRecord({})}),
    ):
        with pytest.raises(WireError, match="expected"):
            unwrap(wrong)


@pytest.mark.parametrize(
    "name, flags",
    [
        (
            "flower-superlink",
            "--insecure --host --port --database --enable-supernode-auth --ssl-certfile --ssl-keyfile --ssl-ca-certfile "
            "--disable-runtime-dependency-installation",
        ),
        (
            "flower-supernode",
            "--insecure --superlink --host --port --node-config --root-certificates --auth-supernode-private-key",
        ),
    ],
)
def test_flowers_commands_have_the_options_that_we_pass(name: str, flags: str, tmp_path: Path) -> None:
    import os

    env = os.environ | sandbox.environment(tmp_path) | {"COLUMNS": "200"}
    done = subprocess.run([sandbox.command(name), "--help"], capture_output=True, text=True, timeout=120, env=env)
    missing = [flag for flag in flags.split() if flag not in done.stdout]
    assert done.returncode == 0 and not missing, f"{name} has no {missing}"


def test_what_calls_home_is_off() -> None:
    env = sandbox.environment(Path("/nowhere"))
    assert env["FLWR_TELEMETRY_ENABLED"] == "0" and env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert "--disable-runtime-dependency-installation" in sandbox.superlink(1)
