"""Several runs side by side: a page with a table, curves and the keys in which they differ.

write([Path("runs/a"), Path("runs/b")], Path("comparison.html"))
    ->  comparison.html, comparison.csv, comparison.tex
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

from fedlora.reports.changed import WRITTEN, text
from fedlora.reports.outcome import finite
from fedlora.reports.run_files import RunFiles, read
from fedlora.reports.table_files import TextTable, as_csv, as_latex
from fedlora.reports.tables import strongest_baseline
from fedlora.reports.units import duration, size, tiny

CONTENT = """
{{ table(runs.head, runs.rows) }}
{% for name in plots %}{{ figure("Central test by round", plots[name], "narrow") }}{% endfor %}
<h2>Keys in which they differ</h2>
{% if keys.rows %}{{ table(keys.head, keys.rows) }}{% else %}<p>None.</p>{% endif %}
"""
OWN = ("run.name", "run.out", "run.resume", *WRITTEN)
"""Keys that every run has of its own."""


def write(directories: Sequence[Path], page: Path) -> Path:
    """Write the page, and its table beside it as CSV and LaTeX; return the page's path.

    Raises:
        FedLoraError: a directory holds no run, or a file of it is damaged.
    """
    from fedlora.reports.html import render

    found = [read(directory) for directory in directories]
    runs = {f"{n}: {run.summary['name']}": run for n, run in enumerate(found, 1)}
    table, page = outcomes(runs), page.with_suffix(".html")
    page.parent.mkdir(parents=True, exist_ok=True)
    for end, made in ((".csv", as_csv), (".tex", as_latex)):
        page.with_suffix(end).write_text(made(table), encoding="utf-8", newline="")
    title = f"{len(runs)} runs compared"
    whole = render(CONTENT, curves(runs), title=title, runs=table, keys=differing(runs))
    page.write_text(whole, encoding="utf-8")
    return page


def outcomes(runs: Mapping[str, RunFiles]) -> TextTable:
    """A line a run: its score by what it is judged by, its best baseline, and what it cost."""
    head = ("run", "strategy", "rounds", "judged by", "final", "best", "strongest baseline", "down",
            "up", "time", "largest deviation", "failures", "warnings")  # fmt: skip
    return TextTable(head, [_outcome(name, run) for name, run in runs.items()])


def _outcome(name: str, run: RunFiles) -> list[str]:
    s, metric = run.summary, run.metric
    best, strongest = s["best"], strongest_baseline(run)
    return [
        name,
        s["strategy"],
        str(s["rounds"]) if run.complete else f"{s['rounds']}, not finished",
        metric.title,
        metric.text(finite(s["final"], metric.key)),
        f"{metric.text(finite(best, metric.key))}, round {best['round']}" if best else "-",
        f"{metric.text(strongest[1])}, {strongest[0]}" if strongest else "-",
        size(s["bytes"].get("down")),
        size(s["bytes"].get("up")),
        duration(s["seconds"]),
        tiny(s["max_deviation"]),
        str(s["failures"]),
        str(len(s["warnings"])),
    ]


def differing(runs: Mapping[str, RunFiles]) -> TextTable:
    """The keys that have another value in one run than in another; "-" where a run has no such."""
    every = dict.fromkeys(k for run in runs.values() for k in run.config if k not in OWN)
    rows = [
        [key, *(text(run.config[key]) if key in run.config else "-" for run in runs.values())]
        for key in every
    ]
    return TextTable(["key", *runs], [row for row in rows if len({*row[1:]}) > 1])


def curves(runs: Mapping[str, RunFiles]) -> dict[str, bytes]:
    """The scores by round of each metric that runs are judged by, as PNG."""
    from matplotlib.figure import Figure

    from fedlora.reports.axes import by_round, evaluated, line, narrow, with_legend
    from fedlora.reports.html import COLOURS, drawn

    def figure(key: str, title: str) -> Figure | None:
        made, (ax,) = narrow(3.4)
        for (name, run), colour in zip(runs.items(), cycle(COLOURS), strict=False):
            if run.metric.key == key:
                line(ax, evaluated(run, key), colour, name, marker="o")
        if not ax.lines:
            return None
        ax.set_ylabel(title)
        by_round(ax)
        return with_legend(made, ax)

    kinds = {run.metric.key: run.metric.title for run in runs.values()}
    return drawn({key: partial(figure, key, title) for key, title in kinds.items()})
