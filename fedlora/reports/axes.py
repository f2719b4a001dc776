"""What the report's figures share: their colours and style, axes by round or by client, legends."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedlora.reports.outcome import Metric, Record, finite
from fedlora.reports.run_files import RunFiles

Points = list[tuple[int, float]]

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#ea8a0c", "#0f9d76", "#d92d20", "#8b95a5"
OTHERS = ("#c026a3", "#0891b2", "#7c3aed", "#65a30d", "#92400e", "#475569")
LABELS = (BLUE, ORANGE, GREEN, *OTHERS, "#f472b6", "#38bdf8", "#facc15")
"""Colours of the data's labels. Where there are more labels, the rarest share one bar."""


STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,  # a label may hold a dollar sign
    "text.color": "#1f2937",
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": "#475569",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8edf3",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}


def new_figure(
    height: float, rows: int = 1, width: float | None = None
) -> tuple[Figure, list[Axes]]:
    """In inches; by default WIDTH wide."""
    figure = Figure(figsize=(width or WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, squeeze=False).flat)


def narrow(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of NARROW inches."""
    return new_figure(height, rows, NARROW)


MANY = 40
"""Clients from which on rows are drawn small, and the axis also on top."""

WIDTH = 6.4
"""Inches."""
NARROW = 4.1
"""Inches: 394 pixels of a page, so that a phone 390 pixels wide hardly shrinks ten-point text."""


def tall(rows: int) -> float:
    """A height that gives each row room for its name, down to a small type for many."""
    return max(2.2, 1.0 + rows * (0.24 if rows <= MANY else 0.15))


def points(pairs: Iterable[tuple[int, float | None]]) -> Points:
    return [(at, value) for at, value in pairs if value is not None]


def evaluated(run: RunFiles, key: str) -> Points:
    return points((r["round"], finite(r.get("evaluation"), key)) for r in run.rounds)


def line(ax: Axes, points: Points, color: str, label: str, **style: Any) -> None:
    if points:
        x, y = zip(*points, strict=True)
        if len(points) == 1:
            style["marker"] = style.get("marker", ".")
        elif len(points) > 30:
            style.pop("marker", None)
        ax.plot(x, y, color=color, label=label, **style)


def baselines(ax: Axes, run: RunFiles, metric: Metric) -> None:
    for (name, found), colour in zip(run.summary["baselines"].items(), cycle(OTHERS), strict=False):
        if (value := finite(found, metric.key)) is not None:
            label = f"{name}: {metric.text(value)}"
            ax.axhline(value, color=colour, linestyle="--", linewidth=1.4, label=label)


def by_round(ax: Axes) -> None:
    ax.set_xlabel("round")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def client_rows(ax: Axes, names: Sequence[str]) -> None:
    """One row a client, the first on top."""
    ax.set_yticks(range(len(names)), names, fontsize=9 if len(names) <= MANY else 6.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", top=len(names) > MANY, labeltop=len(names) > MANY)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(6))


def with_legend(figure: Figure, *axes: Axes) -> Figure:
    """The figure with one legend for all its axes below them, made higher by that much."""
    entries = [entry for ax in axes for entry in zip(*ax.get_legend_handles_labels(), strict=True)]
    if entries:
        handles = [handle for handle, _ in entries]
        labels = [text if len(text) <= 44 else f"{text[:42]}.." for _, text in entries]
        room = int(13.4 * figure.get_figwidth())  # characters in a line
        columns = max(1, min(len(labels), room // (max(map(len, labels)) + 6)))
        figure.set_figheight(figure.get_figheight() + 0.25 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def rank_of(client: Record) -> str:
    return "?" if client.get("rank") is None else str(client["rank"])


def node_of(client: Record) -> str:
    node = "" if client.get("node") is None else str(client["node"])
    short = node if len(node) <= 8 else f"{node[:6]}.."
    return f"client {client['client']}" + (f", node {short}" if short else "")


def clock_ticks(end: float) -> list[float]:
    """At most seven times from zero to the end, at steps a clock has."""
    steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200]
    step = next((s for s in steps if end / s <= 6), 86400 * math.ceil(end / 86400 / 6))
    return [float(step * i) for i in range(int(end // step) + 1)]


def share(value: float, _: int) -> str:
    return f"{100 * value:.3g}%"
