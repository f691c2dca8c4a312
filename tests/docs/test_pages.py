"""What pages say of the code is so, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedloom import methods
from fedloom.cli.keys import sections
from fedloom.describe import Description, describe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def described() -> list[Description]:
    return [describe(name) for name in methods.names()]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_the_readme_is_one_screen() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 90 and max(map(len, lines)) <= 120


def test_the_readme_lists_every_method_in_its_group(described: list[Description]) -> None:
    table: dict[str, list[str]] = {}
    group = ""
    for row in re.findall(r"^\| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[1:]:
        first, _, names = (cell.strip() for cell in row.split("|"))
        group = first or group
        table.setdefault(group, []).extend(names.split(", "))
    wanted: dict[str, set[str]] = {}
    for each in described:
        wanted.setdefault(each.group + " *" * each.wrapper, set()).add(each.name)
    assert {group: set(names) for group, names in table.items()} == wanted
    assert f"{len(described)} of them" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_role_is_explained(described: list[Description]) -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").partition("## Roles")[2].partition("\n## ")[0]
    explained = set(re.findall(r"`(\w+)`", text))
    assert {role for each in described for role in (*each.down, *each.up, *each.kept)} <= explained


def test_every_section_and_command_has_its_place_in_the_reference() -> None:
    from fedloom.cli.main import app

    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert all(f"$ fedloom keys {name}\n" in text for name in sections() if name)
    commands = [str(each.name or each.callback.__name__) for each in app.registered_commands if each.callback]
    assert all(f"$ fedloom {name} --help\n" in text for name in commands)


CITED = {
    "FSLoRA": ["methods/fslora.py"],
    "FedLoDrop": ["methods/fedlodrop.py", "wireless"],
    "FedLoRA-Optimizer": ["methods/fedlora_optimizer.py", "runs/sensitivity.py"],
}


@pytest.mark.parametrize("paper", CITED)
def test_every_equation_that_the_code_cites_is_stated_with_its_status(paper: str) -> None:
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8").partition(f"\n## {paper}\n")[2]
    stated: set[str] = set()
    for row in re.findall(r"^\| (\([^|]*) \|", text.partition("\n## ")[0], re.MULTILINE):
        numbers = re.findall(r"\((\d+\w?'?)\)", row)
        stated |= set(numbers) if "-" not in row else {str(i) for i in range(int(numbers[0]), int(numbers[1]) + 1)}
    source = ROOT / "src" / "fedloom"
    files = [
        x for name in CITED[paper] for x in ([source / name] if name.endswith(".py") else (source / name).rglob("*.py"))
    ]
    cited = {
        number
        for file in files
        for line in re.findall(r'"""(?:.|\n)*?"""|#.*', file.read_text(encoding="utf-8"))
        for number in re.findall(r"(?<![\w\]])\((\d{1,2}[abc]?'?)\)", line)
    }
    assert len(cited) > 3 and cited <= stated, cited - stated
