"""The commands of comparison: compare and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.show import err, out, say
from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.studies.study import Study
    from fedloom.studies.summary import Summary


StandIn = Annotated[
    bool, typer.Option("--stand-in", help="Of a recipe: packaged model and data in place of the hub's, in minutes.")
]


def compare(
    file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="A study file, or recipe:NAME.")],
    out_: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The study's directory (default: below runs/).")
    ] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="In place of the file's.")] = None,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs at once, each with its share of the cores.")] = 1,
    stand_in: StandIn = False,
) -> None:
    """Compare methods on the same draws, at equal budgets. Given again, it runs what is missing: after Ctrl-C, or a new method.

    Example: fedloom compare study.toml --jobs 2
    """
    from fedloom.data import hub

    hub.quiet()
    from fedloom.cli.progress import Cells
    from fedloom.studies import cells, runner, summary, web

    study = _study(file, {} if draws is None else {"draws": draws}, stand_in)
    cells.check(study, str(file))
    path = out_ if out_ is not None else Path("runs") / study.name
    try:
        failed = runner.compare(study, path, jobs, Cells(out))
    except KeyboardInterrupt:
        again = (
            f"fedloom compare {file}" + (" --stand-in" if stand_in else "") + ("" if out_ is None else f" --out {out_}")
        )
        err.print(f"interrupted; go on with: {again}", soft_wrap=True, markup=False)
        raise
    found = summary.read([path])
    _print(found)
    say(f"report:  {web.write(found, path / 'report.html')}")
    for key, why in failed.items():
        err.print(f"failed: {path / key}: {why}", soft_wrap=True, markup=False)
    if failed:
        raise typer.Exit(1)


def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...|STUDY", help="Run directories, or a study's.")],
    out_: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="One file that needs nothing else.")] = Path(
        "report.html"
    ),
    score: Annotated[str | None, typer.Option(metavar="METRIC", help="Another score than the task's first.")] = None,
    figures: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="The charts as files too, beside the report: pdf, svg or png.")
    ] = None,
) -> None:
    """One HTML file of what runs did: no network and no script is needed to read it.

    Example: fedloom report runs/fedit-trec runs/fslora-trec --out report.html
    """
    from fedloom.studies import summary, web

    found = summary.read(paths, score)
    say(f"report:  {web.write(found, out_)}")
    if figures is not None:
        if figures not in ("pdf", "svg", "png"):
            raise ConfigError(f"--figures is {figures!r}, expected pdf, svg or png")
        from fedloom.studies import figures as drawn

        for path in drawn.draw(found, out_.with_suffix(""), figures):
            say(f"figure:  {path}")


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One recipe: its whole file.")] = None,
) -> None:
    """Published settings as run and study files, with their sources, targets and what is different here.

    Example: fedloom recipes fslora-glue
    """
    from fedloom import recipes as known

    if name is not None:
        out.print(known.get(name).text, markup=False, soft_wrap=True, end="")
        return
    for recipe in map(known.get, known.names()):
        target = recipe.target if isinstance(recipe.target, str) else "known"
        say(f"{recipe.name:24} {recipe.status:7} target {target:8} {recipe.about}")
    say("\nfedloom run recipe:NAME [--stand-in], fedloom compare recipe:NAME [--stand-in]; NAME alone prints the file")


def recipe_values(file: Path, stand_in: bool) -> dict[str, Any] | None:
    """The run of `recipe:NAME`, or None for a file's name. What it needs from a hub is said first."""
    from fedloom import recipes as known

    if not str(file).startswith(known.PREFIX):
        if stand_in:
            raise ConfigError("--stand-in is for recipes: fedloom run recipe:NAME --stand-in")
        return None
    recipe = known.get(str(file).removeprefix(known.PREFIX))
    values = known.stand_in(recipe.run) if stand_in else recipe.run
    for line in [f"not as published: {gap}" for gap in recipe.gaps] + [f"needs {what}" for what in known.needs(values)]:
        say(line)
    return values


def _study(file: Path, overrides: dict[str, Any], stand_in: bool) -> Study:
    from fedloom import recipes as known
    from fedloom.studies import study as studies

    values = recipe_values(file, stand_in)
    if values is None:
        return studies.load(file, overrides)
    name = str(file).removeprefix(known.PREFIX)
    return studies.parse(known.get(name).study | overrides, f"{name}-stand-in" if stand_in else name, base=values)


def _print(found: Summary) -> None:
    from fedloom.studies.tables import text
    from fedloom.studies.verdict import verdict

    say("")
    for line in (*text(found), "", *verdict(found)):
        say(line)
