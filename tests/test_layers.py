"""Who may import whom, and what is nowhere in the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedloom

SOURCE = Path(fedloom.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MATHEMATICS = ["core", "lora", "slices", "directions", "guard", "accounting"]


def module(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def ours(path: Path) -> list[str]:
    return [name for name in imports(path) if within(name, "fedloom")]


def fedloom_(*names: str) -> list[str]:
    return [f"fedloom.{name}" for name in names]


UPPER = fedloom_("train", "flower", "cli", "runs", "models", "data", "api", "wireless")


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 40 and all((SOURCE / f"{name}.py").exists() for name in MATHEMATICS)


@pytest.mark.parametrize("path", [SOURCE / f"{name}.py" for name in MATHEMATICS], ids=lambda path: path.stem)
def test_the_mathematics_imports_nothing_above_it(path: Path) -> None:
    for name in imports(path):
        assert not within(name, "transformers", "peft", "datasets", "flwr", "numpy"), name
        if within(name, "fedloom"):
            allowed = [*MATHEMATICS, "errors"]
            assert any(within(name, f"fedloom.{x}") for x in allowed), name


@pytest.mark.parametrize("path", sorted((SOURCE / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_methods_import_the_mathematics_alone(path: Path) -> None:
    for name in imports(path):
        assert not within(name, "transformers", "peft", "datasets", "flwr", "numpy", *UPPER), name
        assert not within(name, *fedloom_("loop", "checkpoint", "guard", "accounting")), name
        if within(name, "fedloom.methods"):
            # One method goes over another by its name, never by an import.
            assert name in fedloom_("methods.choice", "methods.inner"), name


def test_layers_go_downwards() -> None:
    below = {
        "train": fedloom_("flower", "cli", "runs", "api", "wireless"),
        "data": fedloom_("train", "flower", "cli", "runs", "api", "methods", "wireless"),
        "models": fedloom_("train", "flower", "cli", "runs", "api", "methods", "wireless"),
        "flower": fedloom_("cli", "runs", "api", "wireless"),
        "runs": fedloom_("cli", "api"),
    }
    for layer, forbidden in below.items():
        for path in (SOURCE / layer).rglob("*.py"):
            for name in ours(path):
                assert not within(name, *forbidden), f"{path.name} imports {name}"


def test_the_reader_of_toml_files_stands_on_errors_alone() -> None:
    for name in imports(SOURCE / "toml.py"):
        assert not within(name, "torch", "numpy", "transformers", "flwr"), name
        assert not within(name, "fedloom") or within(name, "fedloom.errors"), name


@pytest.mark.parametrize("path", sorted((SOURCE / "wireless").rglob("*.py")), ids=lambda path: path.stem)
def test_wireless_stands_alone(path: Path) -> None:
    for name in imports(path):
        assert not within(name, "torch", "transformers", "flwr"), name
        if within(name, "fedloom"):
            assert within(name, "fedloom.wireless", "fedloom.errors", "fedloom.toml"), name


def test_rooms_of_the_planner_go_downwards() -> None:
    above = [f"fedloom.wireless.{name}" for name in ("diagnosis", "allocate", "replay", "show")]
    below = {"system": ["fedloom.wireless.solvers", *above], "solvers": above, "": ["fedloom.wireless.show"]}
    for room, forbidden in below.items():
        found = sorted((SOURCE / "wireless" / room).glob("*.py"))
        assert found, room
        for path in found:
            for name in ours(path):
                assert not within(name, *forbidden), f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import fedloom", ["torch", "flwr", "transformers", "peft", "datasets", "numpy"]),
        ("import fedloom.errors", ["torch", "numpy"]),
        ("import fedloom.core, fedloom.lora, fedloom.loop", ["transformers", "flwr", "datasets", "peft"]),
        ("from fedloom.methods import get, names; [get(n) for n in names()]", ["transformers", "flwr", "datasets"]),
        ("import fedloom.wireless", ["torch", "transformers"]),
    ],
)
def test_nothing_heavy_at_import(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print(sorted(set(sys.modules) & set({absent!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def method_names() -> set[str]:
    from fedloom.methods import names

    return set(names())


def compares_methods(path: Path) -> list[int]:
    """Lines that compare something with the name of a method, or `.name` of a method with anything."""
    found = []
    for node in ast.walk(tree(path)):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            sides = [part.value for part in ast.walk(node.pattern) if isinstance(part, ast.MatchValue)]
        for side in sides:
            inside = list(ast.walk(side))
            if any(isinstance(x, ast.Constant) and x.value in method_names() for x in inside):
                found.append(side.lineno)
            if isinstance(side, ast.Attribute) and side.attr == "name" and "method" in ast.unparse(side.value):
                found.append(side.lineno)
    return found


@pytest.mark.parametrize(
    "path", [path for path in FILES if "methods" not in path.parts], ids=lambda path: str(path.relative_to(SOURCE))
)
def test_nobody_asks_which_method_it_is(path: Path) -> None:
    assert not compares_methods(path)


def test_the_check_for_method_names_can_fail(tmp_path: Path) -> None:
    for line in ('x = name == "fslora"', "x = method.name == other", 'x = name in ("fedit", "y")'):
        file = tmp_path / "x.py"
        file.write_text(line)
        assert compares_methods(file)


def test_no_global_random_state() -> None:
    """`torch.manual_seed` (never that of a generator) only under a forked generator; no other global draw is seeded."""
    found = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in {
                    "torch.manual_seed",
                    "torch.seed",
                    "torch.random.manual_seed",
                    "torch.cuda.manual_seed",
                    "torch.cuda.manual_seed_all",
                    "np.random.seed",
                    "random.seed",
                    "set_seed",
                }:
                    found.append((path, called, node.lineno))
    for path, called, line in found:
        before = path.read_text().splitlines()[max(0, line - 6) : line]
        assert any("fork_rng" in text for text in before), f"{module(path)}:{line} calls {called}"
