"""The figures of a run: one question each, and None where the run has nothing to answer it with.

Drawn on matplotlib's objects and never through pyplot, so nothing is shared with a caller's own
figures and no display is needed.
"""

import io
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullFormatter

from fedlora.reports.axes import (
    BLUE,
    GREEN,
    GREY,
    LABELS,
    MANY,
    ORANGE,
    RED,
    STYLE,
    Points,
    baselines,
    by_round,
    client_rows,
    clock_ticks,
    evaluated,
    line,
    narrow,
    node_of,
    points,
    rank_of,
    share,
    tall,
    with_legend,
)
from fedlora.reports.outcome import ACCURACY, EXACT_MATCH, JUDGED_BY, PERPLEXITY, Metric, finite
from fedlora.reports.parts import confusion, margins, residuals
from fedlora.reports.run_files import RunFiles
from fedlora.reports.units import clock

MOST = 1_000_000
"""Bytes of a figure's SVG; one of more marks is a PNG."""
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")
"""What a label may hold and XML may not."""


def draw(run: RunFiles) -> dict[str, bytes]:
    """The figures that the run has data for, by the name of their file: SVG, or PNG where that
    would be larger than MOST. Their text is drawn as paths, so that it needs no font."""
    drawn: dict[str, bytes] = {}
    with mpl.rc_context(dict(STYLE, **VECTOR)), warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for name, figure in FIGURES.items():
            if (made := figure(run)) is not None:
                drawn.update([_saved(made, name)])
    return drawn


VECTOR = {"svg.fonttype": "path", "svg.hashsalt": "fedlora"}


def _saved(figure: Figure, name: str) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    if buffer.tell() <= MOST:
        return f"{name}.svg", UNWRITABLE.sub("", buffer.getvalue().decode()).encode()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=220)
    return f"{name}.png", buffer.getvalue()


def accuracy(run: RunFiles) -> Figure | None:
    """The central test's score by round, with the baselines as lines to beat."""
    every = (*(m for m in JUDGED_BY if m.more), EXACT_MATCH)
    series = {metric: evaluated(run, metric.key) for metric in every}
    metric = next((m for m in series if series[m]), None)
    if metric is None:
        return None
    figure, (ax,) = narrow(3.4)
    line(ax, series[metric], BLUE, f"test {metric.title}", marker="o")
    if metric is ACCURACY:
        line(ax, evaluated(run, "macro_f1"), BLUE, "test macro F1", linestyle=":", linewidth=1.4)
    baselines(ax, run, metric)
    if metric.share:
        ax.set_ylim(0, 1.02 if ax.get_ylim()[1] > 0.6 else None)
        ax.yaxis.set_major_formatter(FuncFormatter(share))
    by_round(ax)
    return with_legend(figure, ax)


def loss(run: RunFiles) -> Figure | None:
    """Training and central test loss by round; for a language model perplexity below it."""
    train = points((r["round"], finite(r, "train_loss")) for r in run.rounds)
    test, perplexity = evaluated(run, "loss"), evaluated(run, "perplexity")
    if not train and not test and not perplexity:
        return None
    figure, (ax, *below) = narrow(5.0 if perplexity else 3.4, rows=2 if perplexity else 1)
    line(ax, train, ORANGE, "training, mean over clients", marker="o")
    line(ax, test, BLUE, "test", marker="o")
    ax.set_ylabel("loss")
    by_round(ax)
    for axes in below:
        line(axes, perplexity, GREEN, "test perplexity", marker="o")
        baselines(axes, run, PERPLEXITY)
        axes.set_ylabel("perplexity")
        by_round(axes)
    return with_legend(figure, ax, *below)


def clients(run: RunFiles) -> Figure | None:
    """Each client's own test: the model it first received, the final one, its own training's."""
    metric = run.metric
    scored = [(c, {when: finite(c.get(when), metric.key) for when in _TIMES}) for c in run.clients]
    scored = [(c, found) for c, found in scored if any(v is not None for v in found.values())]
    if not scored:
        return None
    scored.sort(key=lambda pair: _standing(pair[1], metric))
    figure, (ax,) = narrow(tall(len(scored)))
    known = [[v for v in found.values() if v is not None] for _, found in scored]
    ax.hlines(range(len(scored)), *zip(*((min(v), max(v)) for v in known), strict=True), **_SPAN)
    for when, (label, colour, marker) in _TIMES.items():
        at = points((row, found[when]) for row, (_, found) in enumerate(scored))
        size = 34 if len(scored) <= MANY else 16
        if at:
            y, x = zip(*at, strict=True)
            ax.scatter(x, y, s=size, c=colour, marker=marker, label=label, zorder=2)
    client_rows(ax, [f"client {c['client']} (rank {rank_of(c)})" for c, _ in scored])
    ax.set_xlabel(f"{metric.title} on the client's own test rows")
    if metric.share:
        ax.xaxis.set_major_formatter(FuncFormatter(share))
    return with_legend(figure, ax)


_SPAN: Mapping[str, Any] = {"color": "#d5dce5", "linewidth": 2.5, "zorder": 1}

_TIMES = {
    "first": ("first received", GREY, "o"),
    "final": ("final model", BLUE, "o"),
    "personal": ("after its own training", GREEN, "D"),
}


def _standing(found: Mapping[str, float | None], metric: Metric) -> tuple[bool, float]:
    """Best final model first; clients without one come last."""
    value = next((v for v in map(found.get, ("final", "personal", "first")) if v is not None), 0.0)
    return found["final"] is None, -value if metric.more else value


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
    figure, (ax,) = narrow(tall(len(held)))
    left = [0] * len(held)
    for (label, widths), colour in zip(bars.items(), (*LABELS, GREY), strict=False):
        ax.barh(range(len(held)), widths, 0.78, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    client_rows(ax, [f"client {c['client']}" for c in run.clients])
    ax.set_xlabel("rows")
    return with_legend(figure, ax)


def traffic(run: RunFiles) -> Figure | None:
    """Bytes down to the clients and up from them, by round, and their running sums."""
    rounds = [r for r in run.rounds if r.get("bytes")]
    if not rounds:
        return None
    figure, (ax, below) = narrow(4.6, rows=2)
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
        by_round(axes)
    below.set_xlim(ax.get_xlim())
    return with_legend(figure, ax)


def deviation(run: RunFiles) -> Figure | None:
    """How far each round's aggregation was from the weighted mean of the clients' updates."""
    proofs = [(r["round"], r["proof"]) for r in run.rounds if r.get("proof")]

    def series(key: str) -> Points:
        found = points((n, finite(p, key)) for n, p in proofs)
        return [(n, max(value, FLOOR)) for n, value in found]

    if not series("deviation"):
        return None
    figure, (ax,) = narrow(3.4)
    line(ax, series("deviation"), BLUE, "aggregation", marker="o")
    line(ax, series("model_deviation"), GREEN, "loaded model", marker="D")
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
    by_round(ax)
    return with_legend(figure, ax)


FLOOR = 1e-17
"""Where a deviation of exactly zero is drawn: a log axis has no zero."""


def timeline(run: RunFiles) -> Figure | None:
    """Who works and who waits: each node's time by round, as if each had a machine of its own.

    A round is as wide as its slowest node's time. Nodes report how long they worked and not when,
    and a simulation works them off one after the other, so the true clock would show neither.
    """
    rows = {c["client"]: row for row, c in enumerate(run.clients)}
    rounds = [r for r in run.trained if r.get("clients")]
    if not rounds:
        return None
    figure, (ax,) = narrow(tall(len(rows)))
    spans: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    failed: list[tuple[float, int]] = []
    now = 0.0
    for r in rounds:
        ax.axvline(now, color="#94a3b8", linewidth=0.8 if len(rounds) <= 60 else 0, zorder=0.5)
        took = {rows[int(c)]: finite(f, "seconds") or 0.0 for c, f in r["clients"].items()}
        slowest = max(took, key=took.__getitem__)
        for row, seconds in took.items():
            spans[row, ORANGE if row == slowest else BLUE].append((now, seconds))
        lost = [rows[f["client"]] for f in r.get("failures") or () if f.get("client") in rows]
        failed += [(now + took[slowest] / 2, row) for row in lost]
        now += took[slowest]
    for (row, colour), bars in spans.items():
        ax.broken_barh(bars, (row - 0.36, 0.72), color=colour, linewidth=0)
    for label, colour in (("working", BLUE), ("slowest of its round", ORANGE)):
        ax.add_patch(Rectangle((0, 0), 0, 0, color=colour, label=label))
    if failed:
        x, y = zip(*failed, strict=True)
        ax.scatter(x, y, s=30, c=RED, marker="x", label="failed", zorder=3)
    ax.set_xlim(0, now or 1)
    ax.set_xlabel("time, each client a machine")
    client_rows(ax, [node_of(c) for c in run.clients])
    ax.xaxis.set_major_locator(FixedLocator(clock_ticks(now)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(seconds)))
    ax.grid(visible=False)
    return with_legend(figure, ax)


FIGURES: Mapping[str, Callable[[RunFiles], Figure | None]] = {
    "accuracy": accuracy,
    "loss": loss,
    "clients": clients,
    "data": data,
    "bytes": traffic,
    "deviation": deviation,
    "timeline": timeline,
    "confusion": confusion,
    "residuals": residuals,
    "margins": margins,
}
"""By the name of their file in plots/."""
