"""`fedlora privacy ...`: ledgers read, and attacks on what a run would send."""

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
    """Print what was spent of each data set's privacy, and what that comes to."""
    from fedlora.errors import PrivacyError
    from fedlora.privacy.statement import statement

    found = sorted(path.rglob("ledgers/*.jsonl")) if path.is_dir() else [path]
    if not found or not found[0].exists():
        raise PrivacyError(f"{path}: no privacy ledger here")
    for file in found:
        statement(file)


@app.command()
def audit(
    config: Annotated[Path, typer.Argument(help="An experiment file (TOML).", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Override a key: --set run.rounds=5")
    ] = None,
    epsilons: Annotated[str, typer.Option(help="Budgets to compare; 0 is none.")] = "0,8,3,1",
    strategies: Annotated[str, typer.Option(help="Which to compare.")] = "fedavg,ffa,fedex,fedsb",
    out: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("runs/privacy"),
) -> None:
    """Measure what an experiment's privacy costs, and attack it; one HTML report."""
    from fedlora.config import Config, parse_overrides
    from fedlora.console import quiet_libraries

    quiet_libraries()
    from simulations.privacy_lab import Lab, page

    lab = Lab(
        Config.load(config, parse_overrides(set_ or [])),
        out,
        [float(x) for x in epsilons.split(",")],
        strategies.split(","),
    )
    typer.echo(f"report: {page(lab, lab.run())}")
