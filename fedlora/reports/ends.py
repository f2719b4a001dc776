"""The ends of a run that was extended: what each was, side by side."""

from collections.abc import Mapping
from typing import Any

from fedlora.reports.outcome import Record, finite
from fedlora.reports.run_files import RunFiles
from fedlora.reports.tables import Grid, TableCell
from fedlora.reports.units import duration

SCHEDULES = {"restart": "begin anew", "hold": "stay as they are"}


def ends(run: RunFiles) -> Grid:
    """A row for each end, the newest last; no rows where the run has had one end only."""
    if not run.ends:
        return Grid([], [])
    after = dict(_extensions(str(run.config.get("run.extended", ""))))
    rows = [_row(run, end, after.get(int(end.get("rounds") or 0), "")) for end in run.ends]
    if run.complete:
        rows.append(_row(run, run.summary, ""))
    return Grid.of(rows)


def _extensions(extended: str) -> list[tuple[int, str]]:
    """(round, "restart" or "hold") of run.extended, "2:restart,4:hold"."""
    parts = (part.strip().partition(":") for part in extended.split(",") if ":" in part)
    return [(int(end), how) for end, _, how in parts]


def _row(run: RunFiles, end: Record, then: str) -> dict[str, TableCell]:
    metric = run.metric
    of_clients = (end.get("clients") or {}).get("final")
    return {
        "end": TableCell(f"after round {end.get('rounds')}"),
        f"final {metric.title}": TableCell(metric.text(finite(end.get("final"), metric.key))),
        f"clients' mean {metric.title}": TableCell(metric.text(finite(of_clients, metric.key))),
        "largest epsilon": TableCell(_epsilon((end.get("privacy") or {}).get("epsilon"))),
        "time": TableCell(duration(end.get("seconds"))),
        "schedules then": TableCell(SCHEDULES.get(then, "-")),
    }


def _epsilon(told: Any) -> str:
    if not isinstance(told, Mapping):
        return f"{told:.4g}" if isinstance(told, float) else "-" if told is None else str(told)
    known = [x for x in told.values() if isinstance(x, float)]
    return f"{max(known):.4g}" if known else "-"
