"""The figures of a comparison: score by round, by bytes, by virtual time; clients; deviation."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from fedlora.launch.compare.row import Row
from fedlora.reports import html
from fedlora.reports.axes import GREY, by_round, client_rows, new_figure, share, tall, with_legend
from fedlora.reports.html import drawn
from fedlora.reports.outcome import finite
from fedlora.reports.run_files import RunFiles

COLOURS = (*html.COLOURS, GREY, "#f472b6", "#38bdf8", "#facc15")
DASHES = ("-", "--", ":", "-.")


def draw(rows: Sequence[Row]) -> dict[str, bytes]:
    """The figures that there is data for, as PNG, by name."""
    there = [r for r in rows if r.runs]
    return drawn({name: partial(figure, there) for name, figure in FIGURES.items()})


def label(r: Row) -> str:
    return " ".join(x for x in (r.variant, r.strategy) if x)


def look(n: int) -> dict[str, Any]:
    """A row's colour, and another dash where the colours are used up."""
    return {"color": COLOURS[n % len(COLOURS)],
            "linestyle": DASHES[n // len(COLOURS) % len(DASHES)]}  # fmt: skip


def curve(r: Row, x: Callable[[RunFiles], Sequence[float | None]]) -> list[tuple[float, float]]:
    """(mean x, mean score) over the seeds, at each round that all of them evaluated."""
    found: dict[int, list[tuple[float, float]]] = {}
    for run in r.runs:
        for record, at in zip(run.rounds, x(run), strict=True):
            value = finite(record.get("evaluation"), r.metric.key)
            if value is not None and at is not None:
                found.setdefault(record["round"], []).append((at, value))
    full = [points for _, points in sorted(found.items()) if len(points) == len(r.runs)]
    return [(sum(a for a, _ in p) / len(p), sum(v for _, v in p) / len(p)) for p in full]


def rounds_of(run: RunFiles) -> list[float | None]:
    return [float(r["round"]) for r in run.rounds]


def bytes_of(run: RunFiles) -> list[float | None]:
    moved = accumulate(float(sum((r.get("bytes") or {}).values())) for r in run.rounds)
    return [x or None for x in moved]


def clock_of(run: RunFiles) -> list[float | None]:
    return [finite(r.get("virtual"), "clock") for r in run.rounds]


def _curves(
    rows: Sequence[Row], x: Callable[[RunFiles], Sequence[float | None]]
) -> tuple[Figure, Axes] | None:
    curves = {n: c for n, r in enumerate(rows) if len(c := curve(r, x)) > 1}
    if not curves:
        return None
    figure, (ax,) = new_figure(3.8)
    for n, points in curves.items():
        xs, ys = zip(*points, strict=True)
        ax.plot(xs, ys, label=label(rows[n]), marker=".", linewidth=1.5, **look(n))
    metric = rows[0].metric
    ax.set_ylabel(f"test {metric.title}")
    if metric.share:
        ax.yaxis.set_major_formatter(FuncFormatter(share))
    return figure, ax


def by_rounds(rows: Sequence[Row]) -> Figure | None:
    if (made := _curves(rows, rounds_of)) is None:
        return None
    by_round(made[1])
    return with_legend(*made)


def by_bytes(rows: Sequence[Row]) -> Figure | None:
    if (made := _curves(rows, bytes_of)) is None:
        return None
    made[1].set_xscale("log")
    made[1].set_xlabel("bytes moved, both ways")
    made[1].xaxis.set_major_formatter(EngFormatter("B"))
    return with_legend(*made)


def by_virtual_time(rows: Sequence[Row]) -> Figure | None:
    if (made := _curves(rows, clock_of)) is None:
        return None
    made[1].set_xlabel("virtual seconds")
    return with_legend(*made)


def per_client(rows: Sequence[Row]) -> Figure | None:
    """Every client's final score on its own test rows, each seed's clients in one line."""
    key = rows[0].metric.key if rows else ""
    found = [[v for run in r.runs for c in run.clients
              if (v := finite(c.get("final"), key)) is not None] for r in rows]  # fmt: skip
    if not any(found):
        return None
    figure, (ax,) = new_figure(tall(len(rows)))
    for n, values in enumerate(found):
        ax.scatter(values, [n] * len(values), s=14, alpha=0.45, color=look(n)["color"])
        if values:
            ax.scatter([sum(values) / len(values)], [n], s=70, marker="|", color="#1f2937")
    client_rows(ax, [label(r) for r in rows])
    ax.set_xlabel(f"{rows[0].metric.title} of each client on its own test rows; | the mean")
    if rows[0].metric.share:
        ax.xaxis.set_major_formatter(FuncFormatter(share))
    return figure


def beside_deviation(rows: Sequence[Row]) -> Figure | None:
    """Final score against the largest deviation from the exact aggregate."""
    at = {n: (max(r.numbers["deviation"], 1e-17), r.mean) for n, r in enumerate(rows)
          if r.mean is not None and "deviation" in r.numbers}  # fmt: skip
    if not at:
        return None
    figure, (ax,) = new_figure(3.4)
    for n, (x, y) in at.items():
        ax.errorbar(x, y, yerr=rows[n].half, fmt="o", color=look(n)["color"], label=label(rows[n]))
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}"))
    ax.set_xlabel("largest relative deviation from sum p_i s_i B_i A_i")
    ax.set_ylabel(f"test {rows[0].metric.title}")
    if rows[0].metric.share:
        ax.yaxis.set_major_formatter(FuncFormatter(share))
    return with_legend(figure, ax)


FIGURES: Mapping[str, Callable[[Sequence[Row]], Figure | None]] = {
    "by-round": by_rounds,
    "by-bytes": by_bytes,
    "by-virtual-time": by_virtual_time,
    "per-client": per_client,
    "deviation": beside_deviation,
}
