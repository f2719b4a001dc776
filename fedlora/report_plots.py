"""The figures of a run: one question each, and None where the run has nothing to answer it with.

Drawn on matplotlib's objects and never through pyplot, so nothing is shared with a caller's own
figures and no display is needed.
"""

import io
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, cycle
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
)

from fedlora.run_files import (
    ACCURACY,
    EXACT_MATCH,
    PERPLEXITY,
    Metric,
    Record,
    RunFiles,
    finite,
)

Points = list[tuple[int, float]]

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#ea8a0c", "#0f9d76", "#d92d20", "#8b95a5"
OTHERS = ("#c026a3", "#0891b2", "#7c3aed", "#65a30d", "#92400e", "#475569")
LABELS = (BLUE, ORANGE, GREEN, *OTHERS, "#f472b6", "#38bdf8", "#facc15")
"""Colours of the data's labels. Where there are more labels, the rarest share one bar."""


_STYLE: Mapping[str, Any] = {
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


def draw(run: RunFiles) -> dict[str, bytes]:
    """The figures that the run has data for, as PNG, by name."""
    drawn = {}
    with mpl.rc_context(dict(_STYLE)), warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for name, figure in FIGURES.items():
            if (made := figure(run)) is not None:
                buffer = io.BytesIO()
                made.savefig(buffer, format="png", dpi=150)
                drawn[name] = buffer.getvalue()
    return drawn


def accuracy(run: RunFiles) -> Figure | None:
    """The central test's score by round, with the baselines as lines to beat."""
    series = {metric: _evaluated(run, metric.key) for metric in (ACCURACY, EXACT_MATCH)}
    metric = next((m for m in series if series[m]), None)
    if metric is None:
        return None
    figure, (ax,) = _figure(3.4)
    _line(ax, series[metric], BLUE, f"test {metric.title}", marker="o")
    if metric is ACCURACY:
        _line(ax, _evaluated(run, "macro_f1"), BLUE, "test macro F1", linestyle=":", linewidth=1.4)
    _baselines(ax, run, metric)
    ax.set_ylim(0, 1.02 if ax.get_ylim()[1] > 0.6 else None)
    ax.yaxis.set_major_formatter(FuncFormatter(_share))
    _by_round(ax)
    return _with_legend(figure, ax)


def loss(run: RunFiles) -> Figure | None:
    """Training and central test loss by round; for a language model perplexity below it."""
    train = _points((r["round"], finite(r, "train_loss")) for r in run.rounds)
    test, perplexity = _evaluated(run, "loss"), _evaluated(run, "perplexity")
    if not train and not test and not perplexity:
        return None
    figure, (ax, *below) = _figure(5.0 if perplexity else 3.4, rows=2 if perplexity else 1)
    _line(ax, train, ORANGE, "training, mean over clients", marker="o")
    _line(ax, test, BLUE, "test", marker="o")
    ax.set_ylabel("loss")
    _by_round(ax)
    for axes in below:
        _line(axes, perplexity, GREEN, "test perplexity", marker="o")
        _baselines(axes, run, PERPLEXITY)
        axes.set_ylabel("perplexity")
        _by_round(axes)
    return _with_legend(figure, ax, *below)


def clients(run: RunFiles) -> Figure | None:
    """Each client's own test: the model it first received, the final one, its own training's."""
    metric = run.metric
    scored = [(c, {when: finite(c.get(when), metric.key) for when in _TIMES}) for c in run.clients]
    scored = [(c, found) for c, found in scored if any(v is not None for v in found.values())]
    if not scored:
        return None
    scored.sort(key=lambda pair: _standing(pair[1], metric))
    figure, (ax,) = _figure(_tall(len(scored)))
    known = [[v for v in found.values() if v is not None] for _, found in scored]
    ax.hlines(range(len(scored)), *zip(*((min(v), max(v)) for v in known), strict=True), **_SPAN)
    for when, (label, colour, marker) in _TIMES.items():
        at = _points((row, found[when]) for row, (_, found) in enumerate(scored))
        size = 34 if len(scored) <= MANY else 16
        if at:
            y, x = zip(*at, strict=True)
            ax.scatter(x, y, s=size, c=colour, marker=marker, label=label, zorder=2)
    _client_rows(ax, [f"client {c['client']} (rank {_rank(c)})" for c, _ in scored])
    ax.set_xlabel(f"{metric.title} on the client's own test rows")
    if metric.share:
        ax.xaxis.set_major_formatter(FuncFormatter(_share))
    return _with_legend(figure, ax)


_SPAN: Mapping[str, Any] = {"color": "#d5dce5", "linewidth": 2.5, "zorder": 1}

_TIMES = {
    "first": ("first received", GREY, "o"),
    "final": ("final model", BLUE, "o"),
    "personal": ("after its own training", GREEN, "D"),
}


def _standing(found: Mapping[str, float | None], metric: Metric) -> tuple[bool, float]:
    """Best final model first; clients without one come last."""
    value = next((v for v in map(found.get, ("final", "personal", "first")) if v is not None), 0.0)
    return found["final"] is None, -value if metric.share else value


def data(run: RunFiles) -> Figure | None:
    """How many rows of each label every client holds; without labels, how many rows."""
    held = [dict(c.get("labels") or {"rows": c.get("train_examples") or 0}) for c in run.clients]
    totals = sum((Counter(labels) for labels in held), Counter[str]())
    if not totals:
        return None
    named = [label for label, _ in totals.most_common(len(LABELS) if len(totals) > 12 else None)]
    bars = {label: [labels.get(label, 0) for labels in held] for label in named}
    if len(named) < len(totals):
        rest = [sum(n for name, n in labels.items() if name not in bars) for labels in held]
        bars[f"{len(totals) - len(named)} other labels"] = rest
    figure, (ax,) = _figure(_tall(len(held)))
    left = [0] * len(held)
    for (label, widths), colour in zip(bars.items(), (*LABELS, GREY), strict=False):
        ax.barh(range(len(held)), widths, 0.78, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _client_rows(ax, [f"client {c['client']}" for c in run.clients])
    ax.set_xlabel("rows")
    return _with_legend(figure, ax)


def traffic(run: RunFiles) -> Figure | None:
    """Bytes down to the clients and up from them, by round, and their running sums."""
    rounds = [r for r in run.rounds if r.get("bytes")]
    if not rounds:
        return None
    figure, (ax, below) = _figure(4.6, rows=2)
    numbers = [r["round"] for r in rounds]
    for way, colour, offset in (("down", BLUE, -0.2), ("up", ORANGE, 0.2)):
        column = [r["bytes"].get(way) or 0 for r in rounds]
        sums = list(accumulate(column))
        ax.bar([n + offset for n in numbers], column, 0.38, color=colour, label=way)
        below.plot(numbers, sums, color=colour, marker="o" if len(numbers) <= 30 else "")
        below.fill_between(numbers, sums, color=colour, alpha=0.08)
    for axes, title in ((ax, "each round"), (below, "running total")):
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
        _by_round(axes)
    below.set_xlim(ax.get_xlim())
    return _with_legend(figure, ax)


def deviation(run: RunFiles) -> Figure | None:
    """How far each round's aggregation was from the weighted mean of the clients' updates."""
    proofs = [(r["round"], r["proof"]) for r in run.rounds if r.get("proof")]

    def series(key: str) -> Points:
        found = _points((n, finite(p, key)) for n, p in proofs)
        return [(n, max(value, FLOOR)) for n, value in found]

    if not series("deviation"):
        return None
    figure, (ax,) = _figure(3.4)
    _line(ax, series("deviation"), BLUE, "aggregation", marker="o")
    _line(ax, series("model_deviation"), GREEN, "loaded model", marker="D")
    if (bound := finite(proofs[-1][1], "bound")) is not None:
        promised = run.summary["promise"] != "approximate"
        label, colour = ("bound", RED) if promised else ("rounding of the wire", GREY)
        ax.axhline(max(bound, FLOOR), color=colour, linestyle="--", linewidth=1.4, label=label)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 4, high * 4)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("relative deviation")
    _by_round(ax)
    return _with_legend(figure, ax)


FLOOR = 1e-17
"""Where a deviation of exactly zero is drawn: a log axis has no zero."""


def timeline(run: RunFiles) -> Figure | None:
    """Each node's training time, the rounds side by side on one clock.

    A bar begins with its round, because nodes report how long they worked and not when.
    """
    rows = {c["client"]: row for row, c in enumerate(run.clients)}
    rounds = [r for r in run.trained if r.get("clients") or r.get("failures")]
    if not rows or not rounds:
        return None
    figure, (ax,) = _figure(_tall(len(rows)))
    clock, failed = 0.0, []
    spans: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for r in rounds:
        ax.axvline(clock, color="#94a3b8", linewidth=0.8 if len(rounds) <= 60 else 0, zorder=0.5)
        found = (r.get("clients") or {}).items()
        took = {rows[int(client)]: finite(f, "seconds") or 0.0 for client, f in found}
        slowest = max(took, key=took.__getitem__) if len(took) > 1 else None
        for row, seconds in took.items():
            spans[row, ORANGE if row == slowest else BLUE].append((clock, seconds))
        whole = max(finite(r.get("seconds"), "total") or 0.0, *took.values(), 0.0)
        lost = [rows[f["client"]] for f in r.get("failures") or () if f.get("client") in rows]
        failed += [(clock + whole / 2, row) for row in lost]
        clock += whole
    for (row, colour), bars in spans.items():
        ax.broken_barh(bars, (row - 0.36, 0.72), color=colour, linewidth=0)
    for label, colour in (("training", BLUE), ("slowest of its round", ORANGE)):
        ax.add_patch(Rectangle((0, 0), 0, 0, color=colour, label=label))
    if failed:
        x, y = zip(*failed, strict=True)
        ax.scatter(x, y, s=30, c=RED, marker="x", label="failed", zorder=3)
    ax.set_xlim(0, clock or 1)
    ax.set_xlabel("time since round 1 began")
    _client_rows(ax, [_node(c) for c in run.clients])
    ax.xaxis.set_major_locator(FixedLocator(_clock_ticks(clock)))
    ax.xaxis.set_major_formatter(FuncFormatter(_clock))
    ax.grid(visible=False)
    return _with_legend(figure, ax)


FIGURES: Mapping[str, Callable[[RunFiles], Figure | None]] = {
    "accuracy": accuracy,
    "loss": loss,
    "clients": clients,
    "data": data,
    "bytes": traffic,
    "deviation": deviation,
    "timeline": timeline,
}
"""By the name of their file in plots/."""


# -- what the figures share -----------------------------------------------------------------------


def _figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, squeeze=False).flat)


MANY = 40
"""Clients from which on rows are drawn small, and the axis also on top."""

WIDTH = 6.4
"""Inches. Narrow, so that ten-point text stays readable where a phone shrinks the picture."""


def _tall(rows: int) -> float:
    """A height that gives each row room for its name, down to a small type for many."""
    return max(2.2, 1.0 + rows * (0.24 if rows <= MANY else 0.15))


def _points(pairs: Iterable[tuple[int, float | None]]) -> Points:
    return [(at, value) for at, value in pairs if value is not None]


def _evaluated(run: RunFiles, key: str) -> Points:
    return _points((r["round"], finite(r.get("evaluation"), key)) for r in run.rounds)


def _line(ax: Axes, points: Points, color: str, label: str, **style: Any) -> None:
    if points:
        x, y = zip(*points, strict=True)
        if len(points) == 1:
            style["marker"] = style.get("marker", ".")
        elif len(points) > 30:
            style.pop("marker", None)
        ax.plot(x, y, color=color, label=label, **style)


def _baselines(ax: Axes, run: RunFiles, metric: Metric) -> None:
    for (name, found), colour in zip(run.summary["baselines"].items(), cycle(OTHERS), strict=False):
        if (value := finite(found, metric.key)) is not None:
            label = f"{name}: {metric.text(value)}"
            ax.axhline(value, color=colour, linestyle="--", linewidth=1.4, label=label)


def _by_round(ax: Axes) -> None:
    ax.set_xlabel("round")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _client_rows(ax: Axes, names: Sequence[str]) -> None:
    """One row a client, the first on top."""
    ax.set_yticks(range(len(names)), names, fontsize=9 if len(names) <= MANY else 6.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", top=len(names) > MANY, labeltop=len(names) > MANY)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(6))


def _with_legend(figure: Figure, *axes: Axes) -> Figure:
    """The figure with one legend for all its axes below them, made higher by that much."""
    entries = [entry for ax in axes for entry in zip(*ax.get_legend_handles_labels(), strict=True)]
    if entries:
        handles = [handle for handle, _ in entries]
        labels = [text if len(text) <= 44 else f"{text[:42]}.." for _, text in entries]
        columns = max(1, min(len(labels), 86 // (max(map(len, labels)) + 6)))
        figure.set_figheight(figure.get_figheight() + 0.25 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def _rank(client: Record) -> str:
    return "?" if client.get("rank") is None else str(client["rank"])


def _node(client: Record) -> str:
    node = str(client.get("node", ""))
    short = node if len(node) <= 8 else f"{node[:6]}.."
    return f"client {client['client']}" + (f", node {short}" if short else "")


def _clock_ticks(end: float) -> list[float]:
    """At most seven times from zero to the end, at steps a clock has."""
    steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200]
    step = next((s for s in steps if end / s <= 6), 86400 * math.ceil(end / 86400 / 6))
    return [float(step * i) for i in range(int(end // step) + 1)]


def _share(value: float, _: int) -> str:
    return f"{100 * value:.3g}%"


def _clock(seconds: float, _: int) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
