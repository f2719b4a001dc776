"""The `fedlora` command. Heavy imports wait inside the commands, so that --help is instant."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedlora.launch.deploy.cli import app as deploy
from fedlora.launch.guard import guarded
from fedlora.launch.lab.cli import app as privacy
from fedlora.launch.node_cli import app as node
from fedlora.version import __version__

app = typer.Typer(
    help="Federated LoRA fine-tuning of Hugging Face models on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(deploy, name="deploy")
app.add_typer(node, name="node")
app.add_typer(privacy, name="privacy")

Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override a key: --set train.lr=1e-3")
]
EXPERIMENT = "A file (TOML), or a shipped experiment's name."
ConfigFile = Annotated[Path, typer.Argument(help=EXPERIMENT, show_default=False)]
RunDir = Annotated[Path, typer.Argument(help="A run's directory.", show_default=False)]


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedlora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options that every command has."""


@app.command()
def simulate(
    config: Annotated[Path | None, typer.Argument(help=EXPERIMENT, show_default=False)] = None,
    set_: Set = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this directory.", show_default=False)
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="With --resume: extend the finished run to so many.", show_default=False),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="With --rounds: restart, or hold the last round's rate.")
    ] = "restart",
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; default: simulate.workers.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local (this process) or flower (Flower's own, needs Ray).")
    ] = "local",
    quiet: Annotated[bool, typer.Option(help="Print only the result.")] = False,
) -> None:
    """Run a federation on this machine, with the apps that a deployment runs."""
    from fedlora.config.reader import parse_overrides

    overrides = parse_overrides(set_ or [])
    if workers is not None:
        overrides["simulate.workers"] = workers
    if (resume is None) == (config is None):
        raise typer.BadParameter("give an experiment, or --resume with a run's directory")
    if resume is None and rounds is not None:
        message = "extends a run, with --resume; for a new one: --set run.rounds=N"
        raise typer.BadParameter(message, param_hint="--rounds")
    if engine not in ("local", "flower"):
        raise typer.BadParameter("must be local or flower", param_hint="--engine")
    from fedlora.launch.simulate.run import flower, local, resumed
    from fedlora.reports import report

    if resume is not None:
        config, where = resumed(resume)
        if rounds is not None:
            from fedlora.launch.simulate.extend import extended

            where |= extended(resume, rounds, schedule)
        overrides |= where
    assert config is not None
    directory = (local if engine == "local" else flower)(config, overrides, quiet)
    report.closing(directory, directory / "report.html")


@app.command()
def compare(
    experiment: Annotated[
        str, typer.Argument(help="A file, a shipped experiment's name, or synthetic.")
    ],
    strategies: Annotated[
        str | None, typer.Option(help="all, or names: a,b. Default: the experiment's own.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds: 0,1,2.")] = None,
    set_: Set = None,
    equal: Annotated[str, typer.Option(help="rounds, or bytes: as many rounds as fit.")] = "rounds",
    out: Annotated[
        Path | None, typer.Option(help="Where; default: runs/compare/EXPERIMENT.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The experiment's full size.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The experiment's smallest size.")] = False,
    rates: Annotated[
        str | None, typer.Option(help="own: each strategy's default; 0.004: for all; own,0.004.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Runs at a time; 0: one a core.", min=0)] = 0,
) -> None:
    """Run an experiment with many strategies and seeds, and write one table of them all.

    Stopped, the same command goes on where it was.
    """
    from fedlora.config.reader import parse_overrides

    if full and quick:
        raise typer.BadParameter("is one size, and --full another", param_hint="--quick")
    if equal not in ("rounds", "bytes"):
        raise typer.BadParameter("must be rounds or bytes", param_hint="--equal")
    try:
        numbers = [int(x) for x in seeds.split(",")] if seeds is not None else None
    except ValueError:
        raise typer.BadParameter("must be numbers: 0,1,2", param_hint="--seeds") from None
    if experiment == "synthetic":
        from fedlora.launch.simulate import synthetic

        synthetic.main(strategies, numbers, out)
        return
    from fedlora.launch.compare import run as grid

    try:
        asked = grid.parse_rates(rates) if rates is not None else []
    except ValueError:
        raise typer.BadParameter(
            "must be own, rates, or both: own,0.004", param_hint="--rates"
        ) from None
    directory = grid.main(
        experiment, strategies, numbers, parse_overrides(set_ or []), equal, out, full,
        workers or os.cpu_count() or 1, quick, asked,
    )  # fmt: skip
    typer.echo((directory / "table.md").read_text())
    typer.echo(f"{directory}/table.csv, table.md, table.html")


@app.command()
def strategies() -> None:
    """List the strategies: what each needs of the clients, and what it promises."""
    from rich.console import Console
    from rich.table import Table

    from fedlora.strategies import list_strategies
    from fedlora.strategies.registry import broken_packages

    table = Table("strategy", "what it does", "needs", "promise", title="Strategies")
    for name, cls in list_strategies().items():
        needs = [
            text
            for field, text in {
                "equal_ranks": "one rank for all",
                "client_memory": "client memory",
                "moving_base": "a base that takes changes",
            }.items()
            if getattr(cls().needs(), field)
        ]
        doc = sys.modules[cls.__module__].__doc__ or ""
        table.add_row(name, doc.split("\n\n")[0].replace("\n", " "), ", ".join(needs) or "-",
                      cls().promise)  # fmt: skip
    Console().print(table)
    for problem in broken_packages():
        Console().print(f"note: {problem}", markup=False)
    Console().print(
        "exact: the next model is W + sum p_i s_i B_i A_i, checked every round. "
        "approximate: the deviation from that is measured and logged every round. "
        "shared: what is shared is averaged exactly, the rest stays with each client."
    )


@app.command()
def forms() -> None:
    """List the adapter forms: what trains, and which strategies average it, and how exactly."""
    import shutil

    from fedlora.reports.forms_list import lines

    for line in lines(shutil.get_terminal_size().columns):
        typer.echo(line)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help=f"To check as well. {EXPERIMENT}", show_default=False)
    ] = None,
    set_: Set = None,
) -> None:
    """Check this machine and an experiment before it runs, and print the plan."""
    from fedlora.config.reader import parse_overrides
    from fedlora.launch.doctor import examine

    raise typer.Exit(examine(config, parse_overrides(set_ or [])))


@app.command()
def export(
    run: RunDir,
    out: Annotated[Path, typer.Option(help="Directory to write.", show_default=False)],
    for_: Annotated[
        str, typer.Option("--for", help="Who loads it: peft, vllm, llama.cpp or merged.")
    ] = "",
    as_: Annotated[str, typer.Option("--as", help="As --for: peft or merged.")] = "",
    rank: Annotated[int, typer.Option(help="Truncate to this rank; 0: exact.")] = 0,
    client: Annotated[
        int | None, typer.Option(help="A client's own model, from its memory on this machine.")
    ] = None,
    clients: Annotated[
        str, typer.Option(help="all, or 0,3: each one's own model, in a directory each.")
    ] = "",
) -> None:
    """Write a run's model for who is to load it, and check it where nobody knows fedlora."""
    if for_ not in ("", "peft", "vllm", "llama.cpp", "merged"):
        message = "must be peft, vllm, llama.cpp or merged"
        raise typer.BadParameter(message, param_hint="--for")
    if as_ not in ("", "peft", "merged"):
        raise typer.BadParameter("must be peft or merged", param_hint="--as")
    if as_ and for_:
        raise typer.BadParameter("says what --for says; give one of them", param_hint="--as")
    if rank < 0:
        raise typer.BadParameter("must be 0, for all of it, or more", param_hint="--rank")
    if clients and client is not None:
        raise typer.BadParameter("give one or --client, not both", param_hint="--clients")
    try:
        numbers = [int(x) for x in clients.split(",")] if clients not in ("", "all") else []
    except ValueError:
        raise typer.BadParameter("must be all, or numbers: 0,3", param_hint="--clients") from None
    from fedlora.training.quiet import quiet_libraries

    quiet_libraries()
    from fedlora.launch.export import export_clients, export_run
    from fedlora.launch.export_words import told

    target = for_ or as_ or "peft"
    if clients:
        done = export_clients(run, out, target, rank, numbers)
    else:
        done = [export_run(run, out, rank=rank, client=client, target=target)]
    for line in told(done):
        typer.echo(line)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs' directories.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The page that compares several runs.")] = Path(
        "comparison.html"
    ),
) -> None:
    """Write a run's plots, tables and report.html anew; of several runs, one page that compares."""
    from fedlora.reports import compared
    from fedlora.reports import report as pages

    typer.echo(pages.write(runs[0]) if len(runs) == 1 else compared.write(runs, out))


@app.command(name="config")
def config_(config: ConfigFile, set_: Set = None) -> None:
    """Print every key of an experiment, resolved."""
    from fedlora.config.reader import parse_overrides
    from fedlora.launch.experiment_file import load

    typer.echo(load(config, parse_overrides(set_ or [])).toml(), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of an experiment file, for editors that complete and check it."""
    import json

    from fedlora.config import json_schema

    typer.echo(json.dumps(json_schema.schema(), indent=1))


@app.command()
def init(
    task: Annotated[
        str, typer.Argument(help="A model.task, pairs, or chat.", show_default=True)
    ] = "classification",
    directory: Annotated[
        Path | None, typer.Argument(help="Where; default: my-TASK.", show_default=False)
    ] = None,
) -> None:
    """Write a project that runs at once: a commented experiment, sample rows, a README."""
    from fedlora.launch.project import written

    for line in written(task, directory or Path(f"my-{task}")):
        typer.echo(line)


def main() -> None:
    """Run the command; an error that a user can fix is one paragraph, without a traceback.

    Before torch is loaded, which reads it then: threads that wait for each other sleep. They spin
    else, and where others use the machine too nothing comes of scoring and of writing answers.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with guarded():
        app()


if __name__ == "__main__":
    main()
