"""The two commands of a run on many machines: `serve` beside a SuperLink, `node` beside each SuperNode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli import show
from fedloom.errors import ConfigError, RunError

RunFile = Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file. Repeatable.")
]


def serve(
    file: RunFile,
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="The SuperLink.")] = "127.0.0.1:8000",
    root_certificates: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Who signed its certificate; without it, no TLS.")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Wait for so many (default: clients.count).")] = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory to make.")] = None,
) -> None:
    """Be the server of a run on many machines, beside a running SuperLink. `fedloom resume` goes on with it.

    Example: fedloom serve run.toml --root-certificates ca.crt --clients 2 --out runs/two-sites
    """
    from fedloom.cli.terminal import Terminal
    from fedloom.data import hub
    from fedloom.runs import config
    from fedloom.runs import run as runs

    hub.quiet()
    values = config.override(config.read_toml(file), set_ or [])
    config.put(values, "engine.name", "flower")
    config.put(values, "engine.superlink", superlink)
    if root_certificates is not None:
        if not root_certificates.is_file():
            raise ConfigError(f"there is no file {root_certificates}, expected the authority's certificate")
        config.put(values, "engine.root_certificates", str(root_certificates.resolve()))
    if clients is not None:
        config.put(values, "clients.count", clients)
    settings = config.parse(values, str(file))
    path = out if out is not None else runs.free_name(settings)
    with show.resumable(path), Terminal(show.out) as terminal:
        result = runs.start(settings, path, terminal)
    show.finished(result, result.path / "run.toml")


def node(
    file: RunFile,
    data: Annotated[str, typer.Option(metavar="FILE", help="This site's rows: .jsonl, .csv or .parquet.")],
    id_: Annotated[str, typer.Option("--id", metavar="ID", help="The name of this client.")],
    socket: Annotated[
        Path, typer.Option(metavar="PATH", help="Where the SuperNode finds it: --node-config 'worker=\"PATH\"'.")
    ] = Path("worker.socket"),
    rank: Annotated[int | None, typer.Option(help="Train so many ranks (default: all).")] = None,
    keep: Annotated[float, typer.Option(help="1 - dropout rate: the share that is trained.")] = 1.0,
    folder: Annotated[Path, typer.Option(metavar="DIR", help="For what the client keeps and its own model.")] = Path(
        "fedloom-node"
    ),
    eval_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Score this client's own model on these (default: a hold-out).")
    ] = None,
    set_: Set = None,
) -> None:
    """Be a client of a run on many machines, beside a SuperNode: load the model once, train when asked, keep the rows here.

    Example: fedloom node run.toml --data local.jsonl --id north --rank 4
    """
    from fedloom.data import load
    from fedloom.flower.answers import is_client_id
    from fedloom.runs import config, secure_sums
    from fedloom.runs import flower_node as nodes
    from fedloom.runs.plan import absolute

    if not is_client_id(id_):
        raise ConfigError(f"--id is {id_!r}, expected letters, digits, dots, dashes and underscores")
    values = config.override(config.read_toml(file), set_ or [])
    config.put(values, "task.data", data)
    if eval_data is not None:
        config.put(values, "task.eval_data", eval_data)
    values["clients"] = {"count": 1, "keep": keep} | ({} if rank is None else {"ranks": rank})
    settings = absolute(config.parse(values, str(file)))
    load.load(data)  # what is wrong with the file is told here, to who can mend it
    made = nodes.remote_node(settings, id_, folder.resolve())
    if secure_sums.wanted(settings):
        show.say(f'{id_} = "{secure_sums.identity(folder.resolve()).name}"')
        if secure_sums.roster(settings) is None:
            show.err.print(f"warning: {secure_sums.UNAUTHENTICATED}", soft_wrap=True)
    try:
        nodes.serve(made, socket.resolve(), settings.engine.threads)
    except OSError as error:
        raise RunError(f"cannot listen at {socket}: {error.strerror or error}") from None


def identity(
    id_: Annotated[str, typer.Argument(metavar="ID", help="The name of this client.")],
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="As of `fedloom node`; the key is made if missing.")
    ] = Path("fedloom-node"),
) -> None:
    """Print this site's line of the roster of secure sums (privacy.roster). Its key stays in the folder.

    Example: fedloom identity north --folder ~/fedloom
    """
    from fedloom.flower.answers import is_client_id
    from fedloom.runs import private, secure_sums

    if not is_client_id(id_):
        raise ConfigError(f"ID is {id_!r}, expected letters, digits, dots, dashes and underscores")
    private.need_installed("cryptography")
    show.say(f'{id_} = "{secure_sums.identity(folder.resolve()).name}"')
