"""Whether an extension of a run stays within its privacy budget, before any of its rounds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedlora.config.reader import Config
from fedlora.errors import BudgetSpent
from fedlora.privacy.ledger import NODE, Ledger


def problems(config: Config, token: str, rounds: int) -> Iterator[str]:
    """Why the run of this token cannot have so many rounds more: one for each client.

    Composed on the ledger that is here, with the noise that the run has, as if every client that
    trained took part in each of them. A deployed node's ledger is its own, and it refuses for
    itself.
    """
    p = config.privacy
    limits = [x for x in (p.epsilon, p.max_epsilon) if x]
    if not limits:
        return
    run = Path(config.run.out, config.run.name)
    memory = Path(config.output.client_memory) if config.output.client_memory else run / "clients"
    root = Path(p.ledger) if p.ledger else run / "privacy" if p.by_client else memory
    ledger = Ledger(root, "clients" if p.by_client else NODE)
    last = {c.client: c for c in ledger.read().charges if c.run == token}
    for client, charge in sorted(last.items()):
        spend = replace(charge.spend, steps=charge.spend.steps * rounds)
        who = "" if p.by_client else f"client {client}: "
        try:
            ledger.afford(replace(charge, spend=spend), min(limits))
        except BudgetSpent as e:
            yield f"{rounds} more rounds at the run's noise: {who}{e}"
