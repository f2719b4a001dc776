"""Write the section "Defaults" of each strategy's page from what the strategy declares, and from
the rows of its search, benchmarks/results/rates.jsonl: `python docs/write_rates.py`.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rates as search
from benchmarks import verdict
from fedlora.strategies import STRATEGIES
from fedlora.strategies.defaults import FAMILIES, RULES, defaults_of, rate

PAGES = Path(__file__).parent / "strategies"
ROWS = Path(__file__).parent.parent / "benchmarks" / "results" / "rates.jsonl"
HEAD, NEXT = "## Defaults\n", "## Options\n"
DATA = {"trec": "TREC", "movies": "movie reviews"}
FACTORS = {
    "two epochs": "two epochs a round", "all layers": "all six layers", "6 clients": "six clients",
}  # fmt: skip
POINT = 0.01
SHORT = (
    "Three clients of ranks 4, 8 and 16, 1,000 rows, MiniLM with its last layer adapted, four "
    "rounds; scored on 500 validation rows, so a score has a standard error of about 1.6 points."
)
PART = "Of the five rates of the search those without a score were not run for it."
NO_SECOND = (
    "The second stage of the search, which changes the length, the layers and the number of "
    "clients, was not run for it."
)


def read(path: Path = ROWS) -> list[dict[str, Any]]:
    """The rows of the search."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def section(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The section of one strategy's page, with its heading and an empty line at its end."""
    own = defaults_of(STRATEGIES[name])
    lines = [HEAD.strip(), "", "| key | default | where from |", "|---|---|---|"]
    for task in FAMILIES:
        lr, rule = rate(own, task, "lora", task)
        lines.append(f"| `train.lr`, {task} | {lr:g} | {RULES[rule]} |")
    lines += [f'| `lora.init` | "{own.init}" | |', f"| `lora.alpha` | {own.alpha:g} | |", ""]
    return "\n".join([*lines, *curve(name, rows)]) + "\n"


def curve(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The search's table, rate by rate, and what it left out."""
    mine = [r for r in rows if r["stage"] == "search" and r["setting"] == "short"
            and r["strategy"] in (name, "head") and not r["factor"]]  # fmt: skip
    there = [d for d in DATA if any(r["data"] == d and r["strategy"] == name for r in mine)]
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
    lines += ["", SHORT, "", *second_stage(name, rows), *lost(name, rows), *judged(name, rows)]
    left = [DATA[d] for d in DATA if d not in there]
    what = "other models and tasks, other forms than lora, sgd, privacy"
    lines += [f"Not searched: {', '.join([*left, what])}.", ""]
    return lines


def second_stage(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of TREC with one factor changed at a time."""
    mine = [r for r in rows if r["strategy"] == name and r["factor"] in FACTORS
            and (r["stage"], r["setting"]) == ("search", "short")]  # fmt: skip
    if not mine:
        return [NO_SECOND, ""]
    rates = sorted({r["lr"] for r in mine})
    lines = ["One factor changed, TREC:", ""]
    lines += [
        f"| changed | {' | '.join(f'{lr:g}' for lr in rates)} |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for factor, words in FACTORS.items():
        there = {r["lr"]: f"{100 * r['accuracy']:.1f}" for r in mine if r["factor"] == factor}
        if there:
            lines.append(f"| {words} | {' | '.join(there.get(lr, '-') for lr in rates)} |")
    return [*lines, ""]


def lost(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the default loses more than a point to the best rate tried."""
    losses = search.losses([dict(r) for r in rows], name)
    if not (found := losses.get(search.default(name))) or len(losses) < 2:
        return []
    where = [f"{_named(w)} ({100 * x:.1f} points)" for w, x in found.items() if x > POINT + 1e-9]
    told = f"more than a point in: {', '.join(where)}" if where else "a point at most, everywhere"
    return [f"Against the best rate tried the default loses {told}.", ""]


def _named(where: str) -> str:
    """ "TREC with all six layers", of "trec all layers"."""
    data, _, factor = where.partition(" ")
    return " with ".join(filter(None, (DATA[data], FACTORS.get(factor, factor))))


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
    return [
        f"Held against fedex at its own default, {v.seeds} fresh seeds paired by seed and rows, "
        f"short setting: **{v.word}**. The gap is {100 * v.mean:+.1f} points, one-sided 95 % ends "
        f"{100 * v.low:+.1f} and {100 * v.high:+.1f}; to pass, the upper must be below "
        f"{100 * verdict.MARGIN:g}. A strategy truly 1 point below would pass with probability "
        f"{v.power:.2f}.",
        "",
    ]


def _mean(rows: Sequence[Mapping[str, Any]], data: str, name: str, lr: Any, seeds: Any) -> str:
    found = [r["accuracy"] for r in rows if r["data"] == data and r["strategy"] == name
             and r["lr"] == lr and r["seed"] in seeds]  # fmt: skip
    return f"{100 * statistics.fmean(found):.1f}" if found else "-"


def written(text: str, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A page with its section put in the place of the one it had, before its options."""
    before, _, after = text.partition(NEXT)
    return before.partition(HEAD)[0] + section(name, rows) + NEXT + after


if __name__ == "__main__":
    found = read()
    for name in STRATEGIES:
        page = PAGES / f"{name}.md"
        page.write_text(written(page.read_text(), name, found))
