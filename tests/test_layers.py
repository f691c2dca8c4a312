"""Who may import whom, how large things may be, and what is nowhere in the source."""

from __future__ import annotations

import ast
import io
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedloom

SOURCE = Path(fedloom.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

FLOORS = [
    ["errors", "rng", "state", "text", "toml", "disk"],
    ["client", "lora", "spec", "slices", "dora", "fields"],
    ["core"],
    ["flows"],
    ["methods"],
    [
        "exhaustion",
        "journal",
        "checkpoint",
        "communication",
        "engine",
        "sampling",
        "screening",
        "loop",
        "simulation",
        "describe",
    ],
    ["privacy"],
    ["train", "data", "models", "wireless"],
    ["flower", "ray"],
    ["runs"],
    ["studies", "recipes"],
    ["api"],
    ["cli"],
]
"""Modules and packages of `fedloom`, from the ground up: each imports from its own floor and those below, in no circle."""

MATHEMATICS = [name for floor in FLOORS[:4] for name in floor]

HEAVY = ["transformers", "peft", "datasets", "flwr", "ray", "numpy"]


def module(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for type checkers alone."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from nodes(child)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too, and the names that it takes from it."""
    for node in nodes(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def ours(path: Path) -> set[str]:
    """The modules of fedloom that a file imports."""
    found = set()
    for name in imports(path):
        if within(name, "fedloom"):
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found


def fedloom_(*names: str) -> list[str]:
    return [f"fedloom.{name}" for name in names]


def room(name: str) -> str:
    """`fedloom.train.loss` -> `train`."""
    return name.removeprefix("fedloom").removeprefix(".").partition(".")[0]


def floor_of(name: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if name in floor)


def test_there_is_something_to_look_at_and_all_of_it_has_a_floor() -> None:
    assert len(FILES) > 40
    rooms = {room(name) for name in MODULES} - {""}
    placed = [name for floor in FLOORS for name in floor]
    assert rooms <= set(placed) and len(placed) == len(set(placed))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downwards(path: Path) -> None:
    here = room(module(path))
    if not here:  # `fedloom` itself offers what it names when it is asked
        assert not ours(path)
        return
    for name in ours(path):
        assert not room(name) or floor_of(room(name)) <= floor_of(here), f"{module(path)} imports {name}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for begin in graph:
        seen, todo = set[str](), list(graph[begin])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, set())
        reach[begin] = seen
    looped = {name for name in graph if name in reach[name]}
    return sorted({tuple(sorted(x for x in looped if x in reach[name] and name in reach[x])) for name in looped})  # type: ignore[arg-type]


def test_no_imports_go_in_circles() -> None:
    """Inside functions too."""
    assert circles({name: ours(path) - {name} for name, path in MODULES.items()}) == []


def test_the_check_for_circles_can_fail() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [("b", "c")]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", [SOURCE / f"{name}.py" for name in MATHEMATICS], ids=lambda path: path.stem)
def test_the_mathematics_needs_torch_alone(path: Path) -> None:
    for name in imports(path):
        assert not within(name, *HEAVY), name


@pytest.mark.parametrize("path", sorted((SOURCE / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_methods_import_the_mathematics_alone(path: Path) -> None:
    for name in imports(path):
        assert not within(name, *set(HEAVY) - {"numpy"}), name
        # Methods may share code; one goes over another by its table alone.
        if within(name, "fedloom") and not within(name, "fedloom.methods"):
            assert room(name) in MATHEMATICS, name


def test_rooms_of_one_floor_that_do_not_know_each_other() -> None:
    apart = {
        "data": ["train", "methods"],
        "models": ["methods"],
        "train": ["methods", "wireless"],
        "flower": ["wireless", "ray"],
        "ray": ["wireless", "flower", "methods", "models"],
    }
    for here, others in apart.items():
        for path in (SOURCE / here).rglob("*.py"):
            for name in ours(path):
                assert not within(name, *fedloom_(*others)), f"{module(path)} imports {name}"


def test_the_reader_of_toml_files_stands_on_errors_alone() -> None:
    for name in imports(SOURCE / "toml.py"):
        assert not within(name, "torch", "numpy", "transformers", "flwr"), name
        assert not within(name, "fedloom") or within(name, "fedloom.errors", "fedloom.text"), name


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
        ("import fedloom", ["torch", "flwr", "ray", "transformers", "peft", "datasets", "numpy"]),
        ("import fedloom.runs.run", ["ray", "flwr", "cvxpy", "cryptography", "dp_accounting", "tensorboard"]),
        ("import fedloom.errors", ["torch", "numpy"]),
        ("import fedloom.core, fedloom.lora, fedloom.loop", ["transformers", "flwr", "datasets", "peft"]),
        (
            "from fedloom.methods import build, names; [build({'name': n}) for n in names()]",
            ["transformers", "flwr", "datasets"],
        ),
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


# sizes


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_modules_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def lines_of_code(text: str) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_lines_of_code_by_hand() -> None:
    text = '"""Doc."""\n\n# comment\nx = (1 +\n     2)  # more\n\n'
    text += 'def f() -> str:\n    """Doc.\n\n    More."""\n    return """a\nb"""\n'
    assert lines_of_code(text) == 5


def test_methods_are_short() -> None:
    """Half of them have fewer than 60 lines of code."""
    sizes = [
        lines_of_code(path.read_text())
        for path in (SOURCE / "methods").glob("*.py")
        if path.stem not in ("__init__", "base")
    ]
    assert len(sizes) > 10 and statistics.median(sizes) < 60, sorted(sizes)


def test_every_module_says_what_it_is() -> None:
    for path in FILES:
        assert ast.get_docstring(tree(path)) or not path.read_text().strip(), module(path)
