"""`fedlora deploy`: a server and its nodes as separate processes, on one host or many."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedlora.config import processes
from fedlora.errors import DeployError

app = typer.Typer(
    help="A real deployment: a server and its nodes, with TLS and node keys.", no_args_is_help=True
)


@app.callback()
def here() -> None:
    """A real deployment: a server and its nodes, with TLS and node keys."""
    if not processes.deployable():
        raise DeployError(
            f"fedlora deploy needs Unix sockets and processes that {sys.platform} has not: run the "
            "server and the nodes on Linux or macOS"
        )


Directory = Annotated[Path, typer.Argument(help="A deployment's directory.", show_default=False)]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override a key: --set train.lr=1e-3")
]


@app.command()
def init(
    directory: Directory,
    clients: Annotated[int, typer.Option(help="How many nodes.", show_default=False)],
    experiment: Annotated[
        Path | None,
        typer.Option(
            help="A file (TOML), or a shipped experiment's name; default: the quickstart."
        ),
    ] = None,
    set_: Set = None,
    host: Annotated[
        str, typer.Option(help="The server's name or address, as nodes reach it.")
    ] = "127.0.0.1",
    ranks: Annotated[
        str, typer.Option(help="The nodes' ranks, cycled: \"4,8,16\". Default: the experiment's.")
    ] = "",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS and no node keys. For trials only.")
    ] = False,
    shared_data: Annotated[
        bool,
        typer.Option("--shared-data", help="Nodes read the experiment's data, not their own."),
    ] = False,
    worker: Annotated[
        bool, typer.Option(help="Nodes keep the model in memory between messages.")
    ] = True,
    days: Annotated[float, typer.Option(help="How long the server's certificate is valid.")] = 365,
    one_host_trial: Annotated[
        bool,
        typer.Option(
            "--one-host-trial",
            help="Make all nodes' keys here: then who makes them can "
            "be each node. Else each node makes its own.",
        ),
    ] = False,
) -> None:
    """Write a deployment's directory: keys, certificates, scripts, units, the app."""
    from fedlora.config.reader import parse_overrides
    from fedlora.errors import DeployError
    from fedlora.launch.deploy.layout import Wanted
    from fedlora.launch.deploy.layout import init as write

    try:
        each = tuple(int(part) for part in ranks.split(",") if part.strip())
    except ValueError:
        raise DeployError(f"--ranks {ranks}: must be whole numbers, as in 4,8,16") from None
    typer.echo(f"writing {directory}: the experiment is read, and its rows are shared out")
    plan = write(
        Wanted(
            directory, clients, experiment, parse_overrides(set_ or []), host, each,
            not insecure, not shared_data, worker, days, one_host_trial,
        )
    )  # fmt: skip
    typer.echo(f"wrote {plan.directory}; its README.md says how to go on, for instance:")
    name = shlex.quote(str(directory))
    if plan.secure and not plan.keys_here:
        typer.echo(f"  on each node: fedlora node init {name}/nodes/node-0/node.toml")
    typer.echo(f"  fedlora deploy up {name} && fedlora deploy run {name}")


@app.command()
def renew(directory: Directory, days: Annotated[float, typer.Option()] = 365) -> None:
    """Write a new server certificate; then restart the SuperLink."""
    from fedlora.launch.deploy.layout import renew as write
    from fedlora.launch.deploy.plan import Plan

    write(Plan.load(directory), days)


@app.command()
def up(directory: Directory) -> None:
    """Start everything on this host, and keep it running."""
    from fedlora.launch.deploy import host
    from fedlora.launch.deploy.plan import Plan

    host.up(Plan.load(directory), typer.echo)


@app.command()
def register(directory: Directory) -> None:
    """Make the nodes' keys known to a SuperLink that something else than `up` started."""
    from fedlora.launch.deploy import host
    from fedlora.launch.deploy.plan import Plan

    host.register_all(Plan.load(directory), typer.echo)


@app.command()
def down(directory: Directory) -> None:
    """End what `up` started, and nothing else."""
    from fedlora.launch.deploy import host
    from fedlora.launch.deploy.plan import Plan
    from fedlora.launch.deploy.supervise import read_state

    plan = Plan.load(directory)
    if not read_state(plan):
        typer.echo("nothing runs here")
    host.down(plan, typer.echo)


@app.command()
def status(directory: Directory) -> None:
    """The processes here, the nodes and the runs."""
    from rich.console import Console

    from fedlora.launch.deploy.disk import Disk
    from fedlora.launch.deploy.expiry import warnings
    from fedlora.launch.deploy.plan import Plan
    from fedlora.launch.deploy.progress import tables

    plan = Plan.load(directory)
    for table in tables(plan):
        Console().print(table)
    for line in (*warnings(plan), *Disk(plan).news()):
        typer.echo(line)


@app.command()
def logs(
    directory: Directory,
    name: Annotated[str, typer.Argument(help="superlink, superexec, node-0, ...")] = "superlink",
    lines: Annotated[int, typer.Option("-n", help="How many of the last lines.")] = 40,
) -> None:
    """The last lines of a process's log."""
    from fedlora.launch.deploy.plan import Plan
    from fedlora.launch.deploy.progress import tail

    typer.echo(tail(Plan.load(directory), name, lines))


@app.command()
def run(
    directory: Directory,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    attempts: Annotated[
        int, typer.Option(min=0, help="How often it goes on by itself where its ServerApp died.")
    ] = 3,
) -> None:
    """Run the experiment, say each round, and write the report. Fails where the run failed."""
    from fedlora.config.reader import parse_overrides
    from fedlora.launch.deploy import endure, host
    from fedlora.launch.deploy.plan import Plan
    from fedlora.launch.deploy.progress import finish

    plan = Plan.load(directory)
    overrides = parse_overrides(set_ or [])
    typer.echo(f"reading the experiment, {plan.app / 'pyproject.toml'}")
    if resume:
        overrides["run.resume"] = True
    with host.operating(plan) as operator:
        run_id, results, ended = endure.run(plan, operator, overrides, attempts, typer.echo)
        host.shrink(plan)
    typer.echo(ended)
    finish(plan, results, run_id, ended, overrides)
