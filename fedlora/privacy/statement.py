"""A ledger as a table, with the epsilon after each charge."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedlora.privacy.accounting import epsilon, in_words
from fedlora.privacy.ledger import Charge, Contents, Ledger

HEADS = ("round", "run", "unit", "q", "sigma", "steps", "C", "delta", "noise", "epsilon so far")


def statement(path: Path, console: Console | None = None) -> None:
    """Print the ledger; its chain, and its marker where there is one, are checked first.

    Raises:
        PrivacyError: it was changed, cut short, or is gone.
    """
    contents = Ledger(path.parent.parent, path.stem).read()
    delta = max((c.delta for c in contents.charges), default=1e-5)
    title = f"{path}\n{in_words(contents.epsilon(delta))} = epsilon spent, at delta = {delta:g}"
    table = Table(*HEADS, title=title)
    for row in rows(contents, delta):
        table.add_row(*row)
    out = console or Console()
    out.print(table)
    if contents.torn:
        out.print("The last line is torn: it counts as the dearer of its neighbours.")
    if any(c.noise != "system" for c in contents.charges):
        out.print("[bold red]REPRODUCIBLE NOISE: whoever knows run.seed can take it off again.[/]")


def rows(contents: Contents, delta: float) -> list[tuple[str, ...]]:
    """One a charge; epsilon only where it is new, since each costs an accountant's run."""
    found = []
    for n, c in enumerate(contents.charges, 1):
        shown = n == len(contents.charges) or n % max(1, len(contents.charges) // 10) == 0
        so_far = epsilon((x.spend for x in contents.charges[:n]), delta) if shown else None
        found.append((*_terms(c), "" if so_far is None else in_words(so_far)))
    return found


def _terms(c: Charge) -> tuple[str, ...]:
    s = c.spend
    numbers = (f"{s.q:.4g}", f"{s.sigma:.4g}", str(s.steps), f"{c.clip:.4g}", f"{c.delta:g}")
    return (str(c.round), c.run[:8], c.unit, *numbers, c.noise)
