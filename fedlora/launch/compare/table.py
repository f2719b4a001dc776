"""The result of a comparison: table.csv, table.md, table.html and plots/.

A row is one strategy under one variant, over its seeds: means, and for the score the half width
of its 95 % interval from Student's t, which is what a few seeds can say. A seed also decides the
split and the test rows, and strategies share those; so the difference from the first strategy is
taken seed by seed, with an interval and a p-value of its own: compare/difference.py.
"""

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.launch.compare.difference import compared
from fedlora.launch.compare.row import Row, reached
from fedlora.reports.html import markdown, render
from fedlora.reports.outcome import ACCURACY, FLOORS, HEAD
from fedlora.reports.units import duration, percent, size, tiny

Search = Mapping[str, Sequence[Any]]
"""Keys that were chosen for each row, and the values to choose from."""
NONE: Search = {}
MARK = "(!)"


def target_of(rows: Sequence[Row]) -> float | None:
    """A score that every row meets, in the mean: 95 % of the lowest final one."""
    means = [r.mean for r in rows if r.mean is not None]
    if not means or not rows or not all(r.metric.share for r in rows if r.score):
        return None
    return 0.95 * min(means)


def idle(rows: Sequence[Row]) -> None:
    """Fill in which rows learned nothing: no better than a baseline that costs no federation.

    One row's runs measure baselines, each those of its seed's split and test rows; rows are held
    against them in the mean. What trained under privacy is not held against a head that did not.
    """
    floors = {name: x for name, x in baselines_of(rows).items() if name in FLOORS}
    for r in rows:
        mean = r.mean
        noise = ("privacy.epsilon", "privacy.noise-multiplier")
        private = any(run.config.get(key) for run in r.runs for key in noise)
        under = [
            f"{name} {r.metric.text(value)}" for name, value in floors.items()
            if mean is not None and not r.metric.better(mean, value)
            and not (private and name == HEAD)
        ]  # fmt: skip
        r.idle = f"learned nothing: no better than {', '.join(under)}" if under else ""


def baselines_of(rows: Sequence[Row]) -> dict[str, float]:
    """Each baseline in the mean over the runs that measured it."""
    found: dict[str, list[float]] = {}
    for run in (run for r in rows for run in r.runs):
        for name, value in run.baselines().items():
            found.setdefault(name, []).append(value)
    return {name: statistics.fmean(x) for name, x in found.items()}


# -- columns --------------------------------------------------------------------------------------

Text = Callable[[float | None], str]


def columns(rows: Sequence[Row]) -> list[tuple[str, str, Text]]:
    """(title, key in Row.numbers, how to write it) of the columns that any row fills."""
    metric = next((r.metric for r in rows if r.score), ACCURACY)
    every: list[tuple[str, str, Text]] = [
        ("rounds", "rounds", lambda x: "-" if x is None else f"{x:.0f}"),
        ("worst 10 % of clients", "worst tenth", metric.text),
        ("clients' own test", "own final", metric.text),
        ("personalised", "own personalized", metric.text),
        ("alone", "own alone", metric.text),
        ("bytes up", "up", size),
        ("bytes down", "down", size),
        ("of it once", "once", size),
        ("bytes to target", "bytes to target", size),
        ("deviation", "deviation", tiny),
        ("virtual time", "virtual", duration),
        ("to target", "time to target", duration),
        ("waiting a round", "waiting", duration),
        ("wall time", "seconds", duration),
    ]
    return [c for c in every if any(c[1] in r.numbers for r in rows)]


def texts(rows: Sequence[Row], base: str = "") -> tuple[list[str], list[list[str]]]:
    """Head and body of the table, results only. The score of a run with warnings has the MARK."""
    shown, variants = columns(rows), any(r.variant for r in rows)
    metric = next((r.metric for r in rows if r.score), ACCURACY)
    first = compared(rows, base)
    keys = _searched(rows)
    tested = any(r.p is not None for r in rows)
    head = [*(["variant"] if variants else []), "strategy", "promise", "train.lr", *keys, "seeds"]
    head += [metric.title, *([f"less {first}'s"] if first else []), *(["p"] if tested else [])]
    body = []
    for r in rows:
        if not r.runs:
            continue
        score = metric.text(r.mean)
        if r.half is not None:
            score += f" +- {100 * r.half:.1f}" if metric.share else f" +- {r.half:.3f}"
        score += f" {MARK}" if r.warnings or r.idle else ""
        body.append([
            *([r.variant] if variants else []), r.strategy, r.promise, r.rate,
            *(str(r.searched.get(k, "-")) for k in keys), str(len(r.runs)), score,
            *([r.against or "-"] if first else []), *([chance(r.p)] if tested else []),
            *(text(r.numbers.get(key)) for _, key, text in shown),
        ])  # fmt: skip
    return [*head, *(title for title, _, _ in shown)], body


def chance(p: float | None) -> str:
    """A p-value of the table."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _searched(rows: Sequence[Row]) -> list[str]:
    """The keys that were chosen row by row, but for the rate, which has a column of its own."""
    return [k for k in {k: None for r in rows for k in r.searched} if k != "train.lr"]


def without_result(rows: Sequence[Row]) -> list[str]:
    """The rows without a result, each with its reason."""
    return [f"{r.name}: {r.reason or 'no result'}" for r in rows if not r.runs]


def marked(rows: Sequence[Row]) -> list[str]:
    """What the MARK stands for, run by run."""
    found = [f"{r.name}: {r.idle}" for r in rows if r.idle]
    return [*found, *(f"{r.name}, {said}" for r in rows for said in r.warnings)]


def complete(rows: Sequence[Row]) -> float | None:
    """Fill in what needs all the rows: bytes and time to a score that all meet; that score."""
    target = target_of(rows)
    if target is not None:
        for r in rows:
            met = [found for run in r.runs if (found := reached(run, target))]
            if met and len(met) == len(r.runs):
                r.numbers["bytes to target"] = statistics.fmean(b for b, _ in met)
                if not math.isnan(met[0][1]):
                    r.numbers["time to target"] = statistics.fmean(t for _, t in met)
    return target


# -- files ----------------------------------------------------------------------------------------


def write(
    out: Path,
    title: str,
    claim: str,
    rows: Sequence[Row],
    command: str,
    search: Search = NONE,
    base: str = "",
) -> None:
    """table.csv, table.md, table.html and plots/ in the directory."""
    from fedlora.launch.compare.plots import draw

    target = complete(rows)
    compared(rows, base)
    idle(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.csv").write_text(as_csv(rows))
    drawn = draw(rows)
    (out / "plots").mkdir(exist_ok=True)
    for name, data in drawn.items():
        (out / "plots" / f"{name}.png").write_bytes(data)
    (out / "table.md").write_text(as_markdown(title, claim, rows, command, target, search, base))
    page = as_html(title, claim, rows, command, target, drawn, search, base)
    (out / "table.html").write_text(page)


def as_csv(rows: Sequence[Row]) -> str:
    """Full precision, one line a row, warnings, refusals with their reason."""
    keys = list({k: None for r in rows for k in r.numbers})
    chosen = list({k: None for r in rows for k in r.searched})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["variant", "strategy", "promise", "seeds", "metric", "mean", "half95",
                    "against_first", "p_holm", "rate", *chosen, *keys, "warnings",
                    "refused"])  # fmt: skip
    for r in rows:
        table.writerow([
            r.variant, r.strategy, r.promise, len(r.runs), r.metric.key, r.mean, r.half,
            r.against, r.p, r.rate, *(r.searched.get(k) for k in chosen),
            *(r.numbers.get(k) for k in keys), " ".join(filter(None, (r.idle, *r.warnings))),
            r.reason if not r.runs else "",
        ])  # fmt: skip
    return text.getvalue()


def as_markdown(
    title: str,
    claim: str,
    rows: Sequence[Row],
    command: str,
    target: float | None,
    search: Search = NONE,
    base: str = "",
) -> str:
    """The table as a Markdown page, with the claim and the command that made it."""
    head, body = texts(rows, base)
    lines = [f"# {title}", "", claim, "", f"    {command}", ""]
    lines += [*markdown(head, body), ""]
    if warned := marked(rows):
        lines += [f"Marked {MARK}:", "", *(f"- {text}" for text in warned), ""]
    lines += notes(rows, target, search)
    if missing := without_result(rows):
        lines += ["", "Without a result:", "", *(f"- {r}" for r in missing)]
    return "\n".join(lines) + "\n"


def notes(rows: Sequence[Row], target: float | None, search: Search = NONE) -> list[str]:
    """What the columns mean, and the baselines."""
    found = [
        "The interval is 95 %, from Student's t over the seeds; a difference within it is none.",
        "train.lr: own, the strategy's default; searched, chosen for the row; set, by the "
        "experiment or the command.",
    ]
    for key in {k: None for r in rows for k in r.searched}:
        values = search[key]
        edge = [r.name for r in rows if r.runs and r.searched.get(key) in (values[0], values[-1])]
        found.append(
            f"{key}: for each row that of {', '.join(map(str, values))} which scored best in runs "
            "of half the rounds: the best few of a first seed, by fresh seeds alone; none is in "
            "the table."
            + (f" At an end of these, so more might be had: {', '.join(edge)}." if edge else "")
        )
    if any(r.against for r in rows):
        found.append(
            'A difference ("less") is taken seed by seed, in points where the score is a share: '
            "its interval leaves out what a seed's split and test rows do to all alike."
        )
    if any(r.p is not None for r in rows):
        found.append(
            "p: of the paired t test over the seeds, two-sided, corrected by Holm's rule for the "
            f"{sum(r.p is not None for r in rows)} rows that have one; the interval of a "
            "difference is of its row alone."
        )
    if target is not None and any("bytes to target" in r.numbers for r in rows):
        found.append(f"The target is {percent(target)}: 95 % of the lowest row's final score.")
    baselines = baselines_of(rows)
    metric = next((r.metric for r in rows if r.score), ACCURACY)
    if baselines:
        said = ", ".join(f"{name} {metric.text(value)}" for name, value in baselines.items())
        found.append(f"Baselines, in the mean of their seeds: {said}.")
    return found


BODY = """<pre>{{ claim }}</pre>
<pre><code>{{ command }}</code></pre>
{{ table(head, body, mark) }}
{% if marked %}<h2>Marked {{ mark }}</h2>
<ul class="bad">{% for text in marked %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}
{% if missing %}<h2>Without a result</h2>
<ul>{% for r in missing %}<li>{{ r }}</li>{% endfor %}</ul>{% endif %}
{% for name in plots %}{{ figure(name, plots[name]) }}
{% endfor %}
"""


def as_html(
    title: str,
    claim: str,
    rows: Sequence[Row],
    command: str,
    target: float | None,
    plots: Mapping[str, bytes],
    search: Search = NONE,
    base: str = "",
) -> str:
    """One self-contained HTML page."""
    head, body = texts(rows, base)
    return render(
        BODY, plots, title=title, claim=claim, command=command, head=head, body=body,
        notes=notes(rows, target, search), missing=without_result(rows), mark=MARK,
        marked=marked(rows),
    )  # fmt: skip
