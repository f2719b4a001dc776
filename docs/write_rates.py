"""Write the section "Defaults" of each strategy's page from what the strategy declares, and from
the rows of its search, benchmarks/results/rates.jsonl: `python docs/write_rates.py`.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.strategies import STRATEGIES
from fedlora.strategies.defaults import FAMILIES, RULES, defaults_of, rate

PAGES = Path(__file__).parent / "strategies"
ROWS = Path(__file__).parent.parent / "benchmarks" / "results" / "rates.jsonl"
HEAD, NEXT = "## Defaults\n", "## Options\n"
DATA = {"trec": "TREC", "movies": "movie reviews"}
SHORT = (
    "Three clients of ranks 4, 8 and 16, 1,000 rows, MiniLM with its last layer adapted, four "
    "rounds; scored on 500 validation rows, so a score has a standard error of about 1.6 points."
)
NOT_TAKEN = (
    "No default was taken from it yet: its second stage, which varies the model, the length and "
    "the number of clients, was not run. In runs as short as these the default rate is too low, "
    "and the best column is a better choice."
)


def read(path: Path = ROWS) -> list[dict[str, Any]]:
    """The rows of the search."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def section(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The section of one strategy's page, with its heading and an empty line at its end."""
    own = defaults_of(STRATEGIES[name])
    lines = [HEAD.strip(), "", "| key | default | where from |", "|---|---|---|"]
    for task, usual in FAMILIES.items():
        lr, rule = rate(own, task, "lora", usual)
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
    rates = sorted({r["lr"] for r in mine if r["lr"]})
    lines = ["Validation accuracy by rate:", ""]
    lines.append(f"| data | trained head alone | {' | '.join(f'{lr:g}' for lr in rates)} | seeds |")
    lines.append("|---" * (len(rates) + 3) + "|")
    for data in there:
        seeds = {r["seed"] for r in mine if r["data"] == data and r["strategy"] == name}
        cells = [_mean(mine, data, "head", None, seeds)]
        cells += [_mean(mine, data, name, lr, seeds) for lr in rates]
        lines.append(f"| {DATA[data]} | {' | '.join(cells)} | {len(seeds)} |")
    if not defaults_of(STRATEGIES[name]).rates:
        lines += ["", NOT_TAKEN]
    left = [DATA[d] for d in DATA if d not in there]
    lines += ["", SHORT, ""]
    what = "other models and tasks, other forms than lora, more clients, longer runs, sgd, privacy"
    lines += [f"Not searched: {', '.join([*left, what])}.", ""]
    return lines


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
