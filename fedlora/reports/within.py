"""How clients' own validation rows fare while they train: losses within a round, by its share."""

from collections.abc import Mapping

from fedlora.reports.outcome import Record
from fedlora.reports.run_files import RunFiles
from fedlora.reports.tables import Grid, TableCell
from fedlora.reports.units import number

TITLE = "Clients' validation loss while they train: the mean over clients, after so much of a round"


def within(run: RunFiles) -> Grid:
    """A line a round; the mean of the clients that say so, each counting the same."""
    found = {r["round"]: _means(r) for r in run.trained}
    shares = sorted({share for means in found.values() for share in means})
    lines = ((n, means) for n, means in found.items() if means)
    return Grid.of([
        {"round": TableCell(str(n)), **{f"{x:.0%}": _cell(means.get(x)) for x in shares}}
        for n, means in lines
    ])  # fmt: skip


def _means(r: Record) -> Mapping[float, float]:
    told: dict[float, list[float]] = {}
    for client in (r.get("clients") or {}).values():
        for share, loss in (client.get("during") or {}).items():
            if loss is not None and (at := _share(share)) is not None:
                told.setdefault(at, []).append(loss)
    return {share: sum(losses) / len(losses) for share, losses in told.items()}


def _share(name: str) -> float | None:
    """The share that a client's number is under: its word, and so perhaps none."""
    try:
        found = float(name)
    except ValueError:
        return None
    return found if 0 <= found <= 1 else None


def _cell(loss: float | None) -> TableCell:
    return TableCell("-") if loss is None else TableCell(number(loss), f"{loss}")
