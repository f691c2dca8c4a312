"""What `fedloom allocate` does, without a command line: read, solve, print, write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fedloom.errors import ConfigError
from fedloom.wireless.allocate import allocate
from fedloom.wireless.show.tables import print_allocation
from fedloom.wireless.system.constants import from_run
from fedloom.wireless.system.fleet import Fleet, read_fleet
from fedloom.wireless.system.generalisation_bound import Bound
from fedloom.wireless.system.problem import Problem


def allocate_command(
    fleet: Path,
    solver: str = "bnb",
    as_json: bool = False,
    out: Path | None = None,
    time_limit_s: float = 60.0,
    sweep: Path | None = None,
    constants_from: Path | None = None,
    seed: int | None = None,
) -> None:
    """Allocate for a fleet file and print a table, or JSON; write the allocation to `out`, curves to the folder `sweep`.

    `constants_from` is a run directory that replaces C, eta, A1, Lambda_min of [bound]. `seed` None means the file's. Raises
    ConfigError with one message for a bad file, a fleet that no plan serves, or a place that cannot be written.
    """
    console = Console()
    described = read_fleet(fleet)
    problem = described.problem(seed, bound=_bound(described, constants_from))
    if out is not None and not out.parent.exists():
        raise ConfigError(f"the folder {out.parent} of --out does not exist: make it, or give another")
    allocation = allocate(problem, solver, time_limit_s, described.seed if seed is None else seed)
    try:
        text = allocation.to_json(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}): give another place") from None
    if as_json:
        print(text, end="")
    else:
        print_allocation(allocation, console)
        if out is not None:
            console.print(f"written to {out}", highlight=False)
    if sweep is not None:
        for path in _draw(problem, sweep):
            if not as_json:
                console.print(f"drawn {path}", highlight=False)


def _draw(problem: Problem, folder: Path) -> Iterator[Path]:
    """The fleet's curves as PNG and CSV in the folder; the pictures' paths."""
    from fedloom.wireless.show import curves, figures  # matplotlib is needed from here on

    folder.mkdir(parents=True, exist_ok=True)
    for sweep in curves.of_fleet(problem):
        yield figures.write(sweep, folder)


def _bound(fleet: Fleet, run_dir: Path | None) -> Bound | None:
    if run_dir is None:
        return None
    found = from_run(run_dir).bound(fleet.bound.empirical, fleet.bound.gap)
    own = fleet.bound
    return replace(found, base_error=own.base_error, regularisation=own.regularisation, failure=own.failure)
