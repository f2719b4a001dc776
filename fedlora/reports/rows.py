"""What became of every row that a run read, out of its summary."""

from collections.abc import Iterator, Mapping
from typing import Any

from fedlora.reports.run_files import RunFiles
from fedlora.reports.tables import Grid, TableCell


def sources(run: RunFiles) -> Grid:
    """A line for each source: rows read, used, and left out for which reason."""
    return Grid.of([_source(s) for s in run.summary["rows"].get("sources", ())])


def _source(s: Mapping[str, Any]) -> dict[str, TableCell]:
    left = [f"{x['rows']} {x['why']} ({_places(s['unit'], x)})" for x in s["left"]]
    used = s["read"] - sum(x["rows"] for x in s["left"])
    return {
        "source": TableCell(s["path"]),
        "rows read": TableCell(f"{s['read']}"),
        "used": TableCell(f"{used}"),
        "left out": TableCell("; ".join(left) or "none"),
        "how it was read": TableCell("; ".join(s["notes"]) or "-"),
    }


def _places(unit: str, left: Mapping[str, Any]) -> str:
    more = ", ..." if left["rows"] > len(left["first"]) else ""
    return f"{unit} {', '.join(map(str, left['first']))}{more}"


def account(run: RunFiles) -> Iterator[tuple[str, str]]:
    """(what, rows): the parts that the used rows make up, in all and by label."""
    rows = run.summary["rows"]
    parts = {
        "central test": [rows.get("test") or {}],
        "training": rows.get("train") or [],
        "clients' own test": rows.get("held") or [],
    }
    for what, counts in parts.items():
        yield what, f"{sum(sum(c.values()) for c in counts)}"
    if left := sum(c.get("untokenised") or 0 for c in run.clients):
        yield "of the training rows, left out by the tokenizer", f"{left}"
    for label in rows.get("labels", ()):
        told = (f"{sum(c.get(label, 0) for c in found)} {what}" for what, found in parts.items())
        yield f'of label "{label}"', ", ".join(told)
