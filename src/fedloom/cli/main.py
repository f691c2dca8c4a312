"""The commands. Heavy libraries are imported by the command that needs them, so that --help is quick."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from click import ClickException

from fedloom.cli import flower, privacy, studies
from fedloom.cli.help import Command, Group
from fedloom.cli.show import err, finished, out, resumable, say
from fedloom.errors import ConfigError, FedloomError

app = typer.Typer(
    name="fedloom",
    cls=Group,
    help="Federated LoRA fine-tuning of language models, where the method is a choice.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
ClientOption = Annotated[str | None, typer.Option("--client", metavar="ID", help="That client's own model.")]


def _quiet() -> None:
    from fedloom.data import hub

    hub.quiet()


@app.command(cls=Command)
def run(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE.toml]", help="A run file, or recipe:NAME (default: the quickstart)."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file: train.rounds=5. Repeatable."),
    ] = None,
    out_: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run directory to make (default: below runs/).")
    ] = None,
    stand_in: studies.StandIn = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Load, rehearse a few steps, and say what the run would send and take."),
    ] = False,
) -> None:
    """Train: from a run file to a PEFT adapter.

    Example: fedloom run my.toml --set method.name=fedit --out runs/fedit
    """
    _quiet()
    from fedloom.cli.terminal import Terminal
    from fedloom.runs import config
    from fedloom.runs import run as runs

    quickstart = Path(__file__).parent.parent / "quickstart.toml"
    file_or_quickstart = file if file is not None else quickstart
    values = studies.recipe_values(file_or_quickstart, stand_in)
    values = values if values is not None else config.read_toml(file_or_quickstart)
    settings = config.parse(config.override(values, set_ or []), str(file_or_quickstart))
    if dry_run:
        from fedloom.cli.dry_run import rehearse

        return rehearse(settings)
    path = out_ if out_ is not None else runs.free_name(settings)
    with resumable(path), Terminal(out) as terminal:
        result = runs.start(settings, path, terminal)
    finished(result, file or "")


@app.command(cls=Command)
def resume(
    path: RunPath,
    round_: Annotated[
        int | None,
        typer.Option("--round", metavar="N", help="Go back to an earlier round that is kept (run.keep_checkpoints)."),
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Go on though data, model or run file changed; the manifest says so."),
    ] = False,
) -> None:
    """Go on with a run after a crash or Ctrl-C. It ends with the same bytes as if it had never stopped.

    Example: fedloom resume runs/fslora-trec
    """
    _quiet()
    from fedloom.cli.terminal import Terminal
    from fedloom.runs import run as runs

    with resumable(path), Terminal(out) as terminal:
        result = runs.resume(path, terminal, accept_changes=accept_changes, back_to=round_)
    finished(result, path / "run.toml")


@app.command(cls=Command)
def evaluate(
    path: RunPath,
    client: ClientOption = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness instead: its names, or task files (.yaml)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many rows of each of the tasks.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Instead of the run's model.device; 'split': over all GPUs, then memory."),
    ] = None,
) -> None:
    """Score a finished run again, from the adapter that it saved.

    Example: fedloom evaluate runs/fslora-trec
    """
    _quiet()
    from fedloom.runs import finished as saved

    if tasks is not None:
        if device is not None:
            raise ConfigError("--device is for the run's held-out rows: --tasks are scored on its own model.device")
        from fedloom.runs import harness

        for task, scores in harness.evaluate_tasks(path, [x.strip() for x in tasks.split(",")], client, limit).items():
            for name, value in scores.items():
                out.print(f"{task} {name} {value:.6f}")
        return
    if limit is not None:
        raise ConfigError("--limit is for --tasks: the held-out rows of a run are task.eval_limit's")
    for name, value in saved.evaluate_saved(path, client, device).items():
        out.print(f"{name} {value:.6f}")


@app.command(cls=Command)
def export(
    path: RunPath,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A new directory.")],
    client: ClientOption = None,
    merge: Annotated[bool, typer.Option("--merge", help="The whole model with the adapter merged into it.")] = False,
) -> None:
    """Copy a run's adapter as a PEFT directory, or write the merged model.

    Example: fedloom export runs/fslora-trec my-model --merge
    """
    _quiet()
    from fedloom.runs import finished as saved

    saved.export_saved(path, dest, client, merge, lambda what: say(f"warning: {what}"))
    say(f"{'model' if merge else 'adapter'}: {dest}")


@app.command(cls=Command)
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """The methods: what each sends, keeps and needs; or one method's fields, defaults and paper.

    Example: fedloom methods fslora
    """
    from fedloom.cli import tables
    from fedloom.runs.plan import own_methods

    with own_methods({"name": name}):
        tables.print_methods(out, name, json)


@app.command(cls=Command)
def keys(
    section: Annotated[str | None, typer.Argument(metavar="[SECTION]", help="One section, such as train.")] = None,
) -> None:
    """The keys of a run file, with their defaults and meanings.

    Example: fedloom keys train
    """
    from fedloom.cli.keys import print_keys

    print_keys(out, section)


@app.command(cls=Command)
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The run file to write.")] = Path("run.toml"),
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="classification, regression or causal-lm.")
    ] = "classification",
) -> None:
    """Write a run file in which every key is explained.

    Example: fedloom init --kind causal-lm my.toml
    """
    from fedloom.cli.starter import starter

    text = starter(kind)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} exists, expected the name of a new file: choose another, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}): choose another place") from None
    say(f"wrote {file}; next: fedloom run {file}")


@app.command(cls=Command)
def sensitivity(path: RunPath) -> None:
    """How much directions and magnitudes of A and B change in a round of training, for every convention and reference.

    Example: fedloom sensitivity runs/fedlora_optimizer-trec
    """
    _quiet()
    from fedloom.cli import tables
    from fedloom.runs import sensitivity as report

    tables.print_sensitivity(out, report.measure(path))


@app.command(cls=Command)
def allocate(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="A fleet: devices, band, model, limits.")],
    solver: Annotated[str, typer.Option(help="bnb: the proven optimum; psca: fast.")] = "bnb",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    out_: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="For clients.keep of a run.")] = None,
    time_limit_s: Annotated[
        float, typer.Option(metavar="S", help="Return the best found by then, with its optimality gap.")
    ] = 60.0,
    sweep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw what tighter limits cost this fleet, PNG and CSV.")
    ] = None,
    constants_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Take the bound's constants from a finished run.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of random devices and fading (default: the file's).")] = None,
) -> None:
    """Choose per-device dropout rates and bandwidth allocation under latency and energy limits.

    Example: fedloom allocate fleet.toml --solver psca --out allocation.json
    """
    try:
        from fedloom.wireless.show.command import allocate_command
    except ImportError as error:
        raise ConfigError(f"the planner is not installed ({error}): pip install 'fedloom[wireless]'") from None
    allocate_command(file, solver, json, out_, time_limit_s, sweep, constants_from, seed)


@app.command(cls=Command)
def verify(path: RunPath) -> None:
    """Recompute the hashes in a run's manifest.

    Example: fedloom verify runs/fslora-trec
    """
    _quiet()
    from fedloom.runs import finished as saved

    wrong = 0
    for name, expected, found in saved.verify(path):
        if expected is None:
            out.print(f"-     {name}: none yet, the run is not finished: fedloom resume {path}", soft_wrap=True)
            continue
        same = expected == found
        wrong += not same
        out.print(
            f"{'ok   ' if same else 'WRONG'} {name}" + ("" if same else f": {found}, the manifest says {expected}")
        )
    if wrong:
        raise typer.Exit(1)


app.command(cls=Command)(studies.compare)
app.command(cls=Command)(studies.report)
app.command(cls=Command)(studies.recipes)
app.command(cls=Command)(privacy.plan)
app.command(cls=Command)(privacy.audit)
app.command(cls=Command)(flower.serve)
app.command(cls=Command)(flower.node)
app.command(cls=Command)(flower.identity)


def call(args: list[str] | None = None) -> int:
    """Run a command line (by default the process's own); errors become one message, and the exit code is returned."""
    try:
        # Without standalone mode an exit, Ctrl-C among them, comes back as its code; commands themselves return None.
        code = app(args, prog_name="fedloom", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except FedloomError as error:
        err.print(f"error: {error}", soft_wrap=True)
        return error.exit_code
    except ClickException as error:
        err.print(f"error: {error.format_message()} (fedloom --help)", soft_wrap=True)
        return 2


def main() -> None:
    """The entry point."""
    code = call()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Worker threads of the libraries below may take seconds to end: everything that matters is on disk by now.
    os._exit(code)
