"""A ledger as a table, with the epsilon of each charge's units so far."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedlora.privacy.accounting import in_words
from fedlora.privacy.charges import Charge, Contents
from fedlora.privacy.ledger import NODE, Ledger
from fedlora.privacy.ledger_before import SERVERS
from fedlora.privacy.units import ALL

HEADS = ("round", "run", "unit", "q", "sigma", "steps", "C", "delta", "noise", "whose",
         "epsilon so far")  # fmt: skip


def found(path: Path) -> list[Ledger]:
    """The ledgers at or below a path, each once."""
    if path.is_file():
        path = path.parent
    files = {p.parent for p in path.rglob("charges.jsonl") if p.parent.parent.name == "ledgers"}
    before = [p for p in path.rglob("*.jsonl") if p.parent.name == "ledgers"]
    files |= {p.with_name(SERVERS if p.stem == SERVERS else NODE) for p in before}
    return [Ledger(x.parent.parent, x.name) for x in sorted(files)]


def statement(ledger: Ledger, console: Console | None = None) -> None:
    """Print the ledger; its chain and its marker are checked first.

    Raises:
        PrivacyError: it was changed, cut short, or is gone.
    """
    contents = ledger.read()
    delta = max((c.delta for c in contents.charges), default=1e-5)
    spent = in_words(ledger.epsilon(delta))
    title = f"{ledger.path}\n{spent} = epsilon spent of the units that had most, delta = {delta:g}"
    table = Table(*HEADS, title=title)
    for row in rows(ledger, contents, delta):
        table.add_row(*row)
    out = console or Console()
    out.print(table)
    if contents.lost:
        out.print(f"epsilon {in_words(contents.lost)} of it is of lost records, by the operator's "
                  "word: at a delta of their own, which comes on top.")  # fmt: skip
    if contents.torn:
        out.print("The last line is torn: it counts as the dearer of its neighbours.")
    if any(c.noise != "system" for c in contents.charges):
        out.print("[bold red]REPRODUCIBLE NOISE: whoever knows run.seed can take it off again.[/]")


def rows(ledger: Ledger, contents: Contents, delta: float) -> list[tuple[str, ...]]:
    """One a charge; epsilon only where it is new, since each costs an accountant's run."""
    lines = []
    for n, c in enumerate(contents.charges, 1):
        shown = n == len(contents.charges) or n % max(1, len(contents.charges) // 10) == 0
        so_far = ledger.composed(contents, contents.charges[:n], c, delta) if shown else None
        lines.append((*_terms(c), "" if so_far is None else in_words(so_far)))
    return lines


def _terms(c: Charge) -> tuple[str, ...]:
    s = c.spend
    numbers = (f"{s.q:.4g}", f"{s.sigma:.4g}", str(s.steps), f"{c.clip:.4g}", f"{c.delta:g}")
    whose = "any" if c.units == ALL else c.units[:8]
    return (str(c.round), c.run[:8], c.unit, *numbers, c.noise, whose)
