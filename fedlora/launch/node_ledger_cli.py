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
    secure_rounds: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="How many secure rounds the node has taken part in, where its count is lost.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Begin a privacy ledger on a new disk, or add to one what its records lack.

    The figure is charged to all rows, for good. It is the operator's word: the node's audit.jsonl,
    and the reports of runs, have the last epsilon that was told.

    From then on the node takes part in no secure aggregation of a server that was started before.
    """
    from fedlora.config.policy import Policy
    from fedlora.errors import PrivacyError
    from fedlora.federation.client import audit
    from fedlora.federation.client.secure_book import AHEAD, SecureBook
    from fedlora.privacy.ledger import Ledger

    read = Policy.load(policy)
    if spent == float("inf") or spent != spent:
        raise PrivacyError("--spent: must be a number; where nobody knows it, train no more")
    book = SecureBook(read.ledger)
    if secure_rounds is None and read.secure.max_rounds and book.read() is None:
        raise PrivacyError(
            "--secure-rounds: must be said, since the policy limits them (secure.max-rounds) and "
            "the count is lost; 0 for a node that never took part in one"
        )
    book.recover(secure_rounds)
    ledger = Ledger(read.ledger)
    aside = ledger.recover(spent)
    said = {} if secure_rounds is None else {"secure-rounds": secure_rounds}
    audit.append(read.audit, "recovered", epsilon=spent, **said)
    if aside:
        typer.echo(f"The ledger that could not be read is in {aside}.")
    typer.echo(f"{ledger.path}: epsilon {spent:g} is charged to all rows of this node.")
    typer.echo(
        "A run with secure aggregation that is under way goes on here once its server has been "
        f"started again, {AHEAD} s from now or later."
    )
