"""Write the section "Defaults" of each strategy's page from what the strategy declares, and from
the rows of its search, benchmarks/results/rates.jsonl: `python docs/write_rates.py`.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import otherwise, short_runs, verdict
from benchmarks import rates as search
from fedlora.strategies import STRATEGIES
from fedlora.strategies.defaults import FAMILIES, RULES, defaults_of, rate

PAGES = Path(__file__).parent / "strategies"
ROWS = Path(__file__).parent.parent / "benchmarks" / "results" / "rates.jsonl"
HEAD, NEXT = "## Defaults\n", "## Options\n"
DATA = {"trec": "TREC", "movies": "movie reviews", "products": "product reviews"}
FACTORS = {
    "products": "product reviews in its place", "SmolLM2": "SmolLM2 as the classifier",
    "alpha 0.1": "label skew alpha 0.1", "6 clients": "six clients",
    "two epochs": "two epochs a round",
    "all layers": "all layers adapted",
    "all linear modules": "all linear modules of all layers, half the rows",
    "causal-lm": "SmolLM2 writes the class",
    "causal-lm all layers": "SmolLM2 writes it, all layers adapted",
}  # fmt: skip
WRITTEN = (
    "Where SmolLM2 writes the class (`causal-lm`, adapters on all linear modules of its last "
    "layer; with all layers 160 rows and two rounds) the score is the probability of a right "
    "token, its geometric mean."
)
POINT = 0.01
SHORT = (
    "Three clients of ranks 4, 8 and 16, 1,000 rows, MiniLM with its last layer adapted, four "
    "rounds; scored on 500 validation rows, so a score has a standard error of about 1.6 points."
)
PART = "Of the five rates of the search those without a score were not run for it."
OTHERWISE = (
    "With one thing changed, at the same rate, on five seeds of their own, ten for a reason; "
    "differences are paired, in points, with the 95 % interval of Student's t. Of the "
    "clients' own models the accuracy is on their own test rows, a mean over clients."
)
NO_SECOND = (
    "The second stage of the search, which changes one factor at a time, was not run for it."
)


def read(paths: Sequence[Path] = (ROWS, otherwise.RESULTS)) -> list[dict[str, Any]]:
    """The rows of the search, of the verdict and of the other settings."""
    return [row for path in paths for row in short_runs.read(path)]


def section(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The section of one strategy's page, with its heading and an empty line at its end."""
    own = defaults_of(STRATEGIES[name])
    lines = [HEAD.strip(), "", "| key | default | where from |", "|---|---|---|"]
    for task in FAMILIES:
        lr, rule = rate(own, task, "lora", task)
        lines.append(f"| `train.lr`, {task} | {lr:g} | {RULES[rule]} |")
        if task in own.few:
            lr, rule = rate(own, task, "lora", task, few=True)
            lines.append(f"| `train.lr`, {task}, few modules | {lr:g} | {RULES[rule]} |")
    lines += [f'| `lora.init` | "{own.init}" | |', f"| `lora.alpha` | {own.alpha:g} | |", ""]
    return "\n".join([*lines, *curve(name, rows)]) + "\n"


def curve(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The search's table, rate by rate, and what it left out."""
    mine = [r for r in rows if r["stage"] == "search" and r["setting"] == "short"
            and r["strategy"] in (name, "head") and not r["factor"]]  # fmt: skip
    there = [
        d for d in search.SEARCHED if any(r["data"] == d and r["strategy"] == name for r in mine)
    ]
    if not there:
        return ["No rate was searched for it yet.", ""]
    rates = search.RATES
    lines = ["Validation accuracy by rate:", ""]
    lines.append(f"| data | trained head alone | {' | '.join(f'{lr:g}' for lr in rates)} | seeds |")
    lines.append("|---" * (len(rates) + 3) + "|")
    for data in there:
        seeds = {r["seed"] for r in mine if r["data"] == data and r["strategy"] == name}
        cells = [_mean(mine, data, "head", None, seeds)]
        cells += [_mean(mine, data, name, lr, seeds) for lr in rates]
        lines.append(f"| {DATA[data]} | {' | '.join(cells)} | {len(seeds)} |")
    if len({r["lr"] for r in mine if r["strategy"] == name}) < len(search.RATES):
        lines += ["", PART]
    lines += ["", *no_better(mine, name), SHORT, "", *second_stage(name, rows)]
    lines += [*lost(name, rows), *judged(name, rows), *changed(name, rows)]
    left = [DATA[d] for d in search.SEARCHED if d not in there]
    what = "tasks other than these, other forms than lora, sgd, privacy"
    lines += [f"Not searched: {', '.join([*left, what])}.", ""]
    return lines


def no_better(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The data sets of which no rate is above the trained head alone: it learned nothing there."""
    under = []
    for data in search.SEARCHED:
        seeds = {r["seed"] for r in rows if r["data"] == data and r["strategy"] == name}
        head = _score(rows, data, "head", None, seeds)
        tried = [_score(rows, data, name, lr, seeds) for lr in search.RATES]
        if head is not None and (found := [x for x in tried if x is not None]):
            under += [DATA[data]] if max(found) <= head else []
    if not under:
        return []
    told = "(!) At no rate above the trained head alone, so nothing was gained"
    return [f"{told}: {', '.join(under)}.", ""]


def second_stage(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of TREC with one factor changed at a time."""
    mine = [r for r in rows if r["strategy"] == name and r["factor"] in FACTORS
            and r["stage"] == "search"]  # fmt: skip
    if not mine:
        return [NO_SECOND, ""]
    rates = sorted({r["lr"] for r in mine})
    lines = ["One factor changed, TREC:", ""]
    lines += [
        f"| changed | {' | '.join(f'{lr:g}' for lr in rates)} |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for factor, words in FACTORS.items():
        of = [r for r in mine if r["factor"] == factor]
        there = {
            lr: f"{100 * statistics.fmean(r['accuracy'] for r in of if r['lr'] == lr):.1f}"
            for lr in {r["lr"] for r in of}
        }
        if there:
            lines.append(f"| {words} | {' | '.join(there.get(lr, '-') for lr in rates)} |")
    written = any(r["factor"] in search.WRITING for r in mine)
    return [*lines, "", *([WRITTEN, ""] if written else [])]


def lost(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the default loses more than a point to the best rate tried."""
    where = []
    losses = search.losses(rows, name)
    if len(losses) < 2:
        return []
    for setting, by_rate in losses.items():
        lr = search.default(name, search.task_of(setting), setting.partition(" ")[2])
        if lr not in by_rate:
            where.append(f"{_named(setting)} (its rate was not tried)")
        elif (points := by_rate[lr]) > POINT + 1e-9:
            where.append(f"{_named(setting)} ({100 * points:.1f} points)")
    told = f"more than a point in: {', '.join(where)}" if where else "a point at most, everywhere"
    return [f"Against the best rate tried the default loses {told}.", ""]


def _named(where: str) -> str:
    """ "TREC, six clients", of "trec 6 clients"."""
    data, _, factor = where.partition(" ")
    if factor == data:
        return DATA[data]
    return ", ".join(filter(None, (DATA[data], FACTORS.get(factor, factor))))


def judged(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The verdict's line."""
    if name == search.REFERENCE:
        return ["It is the reference that the others' defaults are held against.", ""]
    found = verdict.gaps(rows, name)
    if not found:
        return ["Its default was not yet held against that of fedex on fresh seeds.", ""]
    if len(found) < (seeds := len(search.SEEDS_OF_VERDICT)):
        told = f"Held against fedex at its own default on {len(found)} of {seeds} fresh seeds"
        return [f"{told}: there is no verdict before all are run.", ""]
    v = verdict.judged(found)
    why, evidence = because(name, rows) if v.word == "fails" else ("", [])
    low, high = f"{100 * v.low:+.1f}", f"{100 * v.high:+.1f}"
    return [
        f"Held against fedex at its own default, {v.seeds} fresh seeds paired by seed and rows, "
        f"short setting: **{v.word}{why}**. The gap is {100 * v.mean:+.1f} points, one-sided 95 % "
        f"ends {low} and {high}; to pass, the upper must be below {100 * verdict.MARGIN:g}. A "
        f"strategy truly 1 point below would pass with probability {v.power:.2f}.",
        "",
        *evidence,
    ]


def because(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """Why a strategy fails, and what shows it: nothing is called inherent that no run has shown."""
    if name not in otherwise.SHOWN_BY:
        return "", ["No reason for it was found yet.", ""]
    strategy, label = otherwise.SHOWN_BY[name]
    gain = otherwise.shown(rows, name)
    if gain is None or gain.mean <= gain.half:
        done = "were not made yet" if gain is None else f"do not: {_gap(gain)} points"
        return "", [f"The runs that could show why ({label or strategy}) {done}.", ""]
    what = label or f"{strategy}, which trains A in every other round"
    told = f"Shown by {what}: {_gap(gain)} points beside {name}'s default, {gain.seeds} seeds."
    return f": {verdict.BECAUSE[name]}", [told, ""]


def changed(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of other settings: benchmarks/otherwise.py."""
    lines = []
    for label in otherwise.SETTINGS.get(name, {}):
        of = "own" if any("own" in r for r in rows if r["factor"] == label) else "accuracy"
        mine = otherwise.scores(rows, name, label, of)
        theirs = otherwise.reference(rows, name, label, of)
        default = otherwise.scores(rows, name) if of == "accuracy" else {}
        if len(mine) < 2:
            continue
        cells = [_gap(otherwise.gap(mine, x)) for x in (default, theirs)]
        if name == search.REFERENCE:
            cells[1] = "-"
        lines.append(
            f"| {label} | {100 * statistics.fmean(mine.values()):.1f} | {' | '.join(cells)} "
            f"| {len(mine)} |"
        )
    if not lines:
        return []
    head = [
        "| changed | accuracy | less the default's | less fedex's | seeds |",
        "|---|---|---|---|---|",
    ]
    return [OTHERWISE, "", *head, *lines, ""]


def _gap(gap: otherwise.Gap | None) -> str:
    return "-" if gap is None else f"{100 * gap.mean:+.1f} +- {100 * gap.half:.1f}"


def _score(
    rows: Sequence[Mapping[str, Any]], data: str, name: str, lr: Any, seeds: Any
) -> float | None:
    found = [r["accuracy"] for r in rows if r["data"] == data and r["strategy"] == name
             and r["lr"] == lr and r["seed"] in seeds]  # fmt: skip
    return statistics.fmean(found) if found else None


def _mean(rows: Sequence[Mapping[str, Any]], data: str, name: str, lr: Any, seeds: Any) -> str:
    found = _score(rows, data, name, lr, seeds)
    return "-" if found is None else f"{100 * found:.1f}"


def written(text: str, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A page with its section put in the place of the one it had, before its options."""
    before, _, after = text.partition(NEXT)
    return before.partition(HEAD)[0] + section(name, rows) + NEXT + after


if __name__ == "__main__":
    found = read()
    for name in STRATEGIES:
        page = PAGES / f"{name}.md"
        page.write_text(written(page.read_text(), name, found))
