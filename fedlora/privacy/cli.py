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
