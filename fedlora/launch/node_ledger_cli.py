"""`fedlora node recover`: what a node's operator says of a privacy ledger that is lost."""

from typing import Annotated

import typer

from fedlora.launch.node_file import NodeFile


def recover(
    policy: NodeFile,
    spent: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Epsilon, at the node's own delta, that has been spent on its rows; 0: none ever.",
            show_default=False,
        ),
    ],
) -> None:
    """Begin a privacy ledger on a new disk, or add to one what its records lack.

    The figure is charged to all rows, for good. It is the operator's word: the node's audit.jsonl,
    and the reports of runs, have the last epsilon that was told.
    """
    from fedlora.config.policy import Policy
    from fedlora.errors import PrivacyError
    from fedlora.federation.client import audit
    from fedlora.privacy.ledger import Ledger

    read = Policy.load(policy)
    if spent == float("inf") or spent != spent:
        raise PrivacyError("--spent: must be a number; where nobody knows it, train no more")
    ledger = Ledger(read.ledger)
    aside = ledger.recover(spent)
    audit.append(read.audit, "recovered", epsilon=spent)
    if aside:
        typer.echo(f"The ledger that could not be read is in {aside}.")
    typer.echo(f"{ledger.path}: epsilon {spent:g} is charged to all rows of this node.")
    typer.echo("A run with secure aggregation that is under way is begun again by its server.")
