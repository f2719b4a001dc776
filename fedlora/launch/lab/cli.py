"""`fedlora privacy ...`: prints ledgers, and attacks what a run would send."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Privacy ledgers and audits.", no_args_is_help=True)


@app.command()
def ledger(
    path: Annotated[
        Path, typer.Argument(help="A ledger, or a directory that has some.", show_default=False)
    ],
) -> None:
    """Print what was spent of the rows' privacy, and on which of them the most."""
    from fedlora.errors import PrivacyError
    from fedlora.privacy.statement import found, statement

    if not (ledgers := found(path)):
        raise PrivacyError(f"{path}: no privacy ledger here")
    for one in ledgers:
        statement(one)


@app.command()
def audit(
    config: Annotated[
        Path,
        typer.Argument(
            help="A file (TOML), a shipped experiment's name, or a run's directory.",
            show_default=False,
        ),
    ],
    attack: Annotated[
        str | None, typer.Option(help="Only these, by name: a,b. Default: all of them.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Override a key: --set run.rounds=5")
    ] = None,
    epsilons: Annotated[
        str | None, typer.Option(help="Budgets: 0,8,3,1; 0 is none. Default: the experiment's own.")
    ] = None,
    strategies: Annotated[str | None, typer.Option(help="Names: a,b.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds: 0,1,2.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where; default: runs/privacy/EXPERIMENT.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test of every part.")] = False,
    canaries: Annotated[int, typer.Option(help="Of a whole run; 0: 1000.")] = 0,
    guesses: Annotated[int, typer.Option(help="About these canaries; 0: 200.")] = 0,
    confidence: Annotated[float, typer.Option(help="Of a whole run's bound; 0: 0.95.")] = 0.0,
    workers: Annotated[int, typer.Option(help="Measurements at a time; 0: one a core.")] = 0,
) -> None:
    """Measure what an experiment's privacy costs, and attack it; one HTML report.

    Stopped, the same command goes on where it was. Exit code 1 where what was measured refutes what
    a run or a mechanism claims.
    """
    from fedlora.config.reader import parse_overrides
    from fedlora.training.quiet import quiet_libraries

    try:
        budgets = [float(x) for x in epsilons.split(",")] if epsilons else None
        numbers = [int(x) for x in seeds.split(",")] if seeds else None
    except ValueError:
        raise typer.BadParameter("must be numbers: 0,8,1", param_hint="--epsilons") from None
    quiet_libraries()
    from fedlora.launch.lab.plan import Lab
    from fedlora.launch.lab.study import PARTS, main
    from fedlora.training import devices

    names, only = (x.replace(" ", "").split(",") if x else [] for x in (strategies, attack))
    if unknown := sorted({*only} - {*PARTS}):
        raise typer.BadParameter(f"{unknown[0]}: none of {', '.join(PARTS)}", param_hint="--attack")
    lab = Lab.load(
        config, parse_overrides(set_ or []),
        out or Path("runs", "privacy", config.stem + ("-quick" if quick else "")), quick, only,
        epsilons=budgets, strategies=names or None, seeds=numbers,
    )  # fmt: skip
    lab.size = lab.size.sized(canaries, guesses, confidence)
    main(lab, devices.workers(workers, str(devices.HOST)), shlex.join(["fedlora", *sys.argv[1:]]))
