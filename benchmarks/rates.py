"""The search behind each strategy's default rate, and the verdict on what it found.

    python -m benchmarks.rates search                 what is missing of stage 1, on short runs
    python -m benchmarks.rates stage2                 best rate and neighbours, one factor changed
    python -m benchmarks.rates climb                  a language model: on to where a rate is best
    python -m benchmarks.rates order                  a few strategies on the full setting
    python -m benchmarks.rates verdict                each default on ten fresh seeds

Unattended and resumable: a run is one line of results/rates.jsonl, written as it ends, and what has
a line is not run again. One process; the base is loaded once a data set, and what its frozen layers
make of an example is remembered. --hours ends it between two runs.

Which rows train and which score, and what a short run is: benchmarks/short_runs.py.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.short_runs import DATA, Row, ranks_of, run_missing
from fedlora.strategies import STRATEGIES
from fedlora.strategies.defaults import defaults_of, rate

RESULTS = Path(__file__).parent / "results" / "rates.jsonl"
RATES = (2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
WIDE = (1e-3, *RATES, 1e-1, 2e-1, 5e-1, 1.0, 2.0)
"""Where a language model or another form is tuned, which may need far larger ones."""
WRITES = "causal-lm"
"""The factor that is another task, with a default of its own."""
MIDDLE = 1e-2
ORDER = (1e-2, 2e-2, 5e-3, 5e-2, 2e-3)
FIRST = ("fedex", "ffa", "fedsa", "fslora", "fedsb", "ravan", "lora-a2", "fedavg")
"""The order of the strategies: those that were seen to learn little, the reference, the others."""
TIE = 0.005
"""Of accuracy: what two rates' means must differ by before the higher rate is taken."""
SEARCHED = ("trec", "movies")
"""The two of stage 1, over which a rate is chosen."""
SEED, SEEDS_OF_VERDICT = 1000, tuple(range(2000, 2010))
REFERENCE = "fedex"
"""Of the verdict: at its own default, named before any run of it."""


STAGE_2 = ("products", "SmolLM2", "causal-lm", "alpha 0.1", "6 clients", "two epochs")
"""The factors that are run, in this order: a third data set, a second model, a language model that
writes the class, the skew, the clients, the local steps."""
FULL = ("fedex", "fedsb", "ffa")
"""The strategies by which the short setting is held against the full one."""


def search(setting: str, names: list[str], seeds: tuple[int, ...]) -> Iterator[Row]:
    """Stage 1: every rate of every strategy on both data sets, those that learned little first.

    Rate by rate from the middle, so that a search that is cut short has something on each strategy.
    """
    for data, seed in itertools.product(SEARCHED, seeds):
        base = {"stage": "search", "setting": setting, "data": data, "seed": seed, "factor": ""}
        yield {**base, "strategy": "head", "lr": None}
        for lr, name in itertools.product(ORDER, names):
            yield {**base, "strategy": name, "lr": lr}


def stage2(rows: list[Row], names: list[str], factors: Sequence[str] = STAGE_2) -> Iterator[Row]:
    """The best rate of stage 1 and its two neighbours, with one factor changed at a time.

    Factor by factor over all strategies, the best rates first. A strategy without stage 1 has none.
    """
    near = {name: neighbours(best) for name in names if (best := best_rate(rows, name))}
    base = {"stage": "search", "setting": "short", "seed": SEED}
    for factor in factors:
        there = {**base, "data": factor if factor in DATA else "trec", "factor": factor}
        for place, name in itertools.product(range(3), near):
            if place < len(near[name]):
                yield {**there, "strategy": name, "lr": near[name][place]}


def climb(rows: Sequence[Row], names: Sequence[str], factor: str = WRITES) -> Iterator[Row]:
    """Of each strategy the rates beside the best of those tried, from MIDDLE on, until both are
    there. What is next depends on `rows`, which grow as they are run."""
    base = {"stage": "search", "setting": "short", "data": "trec", "seed": SEED, "factor": factor}
    for name in names:
        if best_of(rows, name, factor) is None:
            yield {**base, "strategy": name, "lr": MIDDLE}
        while (best := best_of(rows, name, factor)) is not None:
            there = {r["lr"] for r in rows if (r["strategy"], r["factor"]) == (name, factor)}
            if not (left := [lr for lr in neighbours(best, WIDE) if lr not in there]):
                break
            yield {**base, "strategy": name, "lr": left[0]}


def best_of(rows: Sequence[Mapping[str, Any]], name: str, factor: str = WRITES) -> float | None:
    """With one factor changed: the rate of the highest score; of those within TIE the lowest."""
    scores = {r["lr"]: r["accuracy"] for r in rows if r["stage"] == "search"
              and (r["strategy"], r["factor"]) == (name, factor)}  # fmt: skip
    return min((lr for lr, x in scores.items() if x > max(scores.values()) - TIE), default=None)


def order(names: list[str]) -> Iterator[Row]:
    """What shows whether the short setting orders the rates as the full one does."""
    base = {"stage": "search", "setting": "full", "data": "trec", "seed": SEED, "factor": ""}
    for lr, name in itertools.product(ORDER, names):
        yield {**base, "strategy": name, "lr": lr}


def verdict(names: list[str]) -> Iterator[Row]:
    """Each strategy at its own default and the reference beside it, seed by seed.

    The reference has rank 8 on each client too, for those that need one rank for all.
    """
    base = {"stage": "verdict", "setting": "short", "data": "trec"}
    for seed in SEEDS_OF_VERDICT:
        first = {"strategy": REFERENCE, "lr": default(REFERENCE), "seed": seed}
        yield {**base, **first, "factor": ""}
        if any(ranks_of(name) for name in names):
            yield {**base, **first, "factor": "rank 8"}
        for name in names:
            if name != REFERENCE:
                mine = {"strategy": name, "lr": default(name), "seed": seed, "factor": ""}
                yield {**base, **mine}


def default(name: str, task: str = "classification") -> float:
    """The rate that a strategy brings to these runs."""
    lr, _ = rate(defaults_of(STRATEGIES[name]), task, "lora", task)
    return lr


def best_rate(rows: list[Row], name: str) -> float | None:
    """Of stage 1, that of the highest mean over the data sets; of those within TIE the lowest."""
    tried = [r for r in rows if r["stage"] == "search" and r["setting"] == "short"
             and r["strategy"] == name and not r["factor"]]  # fmt: skip
    there = {r["data"] for r in tried}
    means = {}
    for lr in sorted(RATES):
        scores = {d: [r["accuracy"] for r in tried if r["data"] == d and r["lr"] == lr]
                  for d in there}  # fmt: skip
        if scores and all(scores.values()):
            means[lr] = statistics.fmean(statistics.fmean(x) for x in scores.values())
    return next((lr for lr in means if means[lr] > max(means.values()) - TIE), None)


def losses(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[float, float]]:
    """By setting of the short runs, and rate, what that loses to the best rate tried there."""
    tried: dict[str, dict[float, list[float]]] = {}
    for r in rows:
        if (r["stage"], r["setting"], r["strategy"]) == ("search", "short", name):
            where = f"{r['data']} {r['factor']}".strip()
            tried.setdefault(where, {}).setdefault(r["lr"], []).append(r["accuracy"])
    means = {where: {lr: statistics.fmean(x) for lr, x in by_rate.items()}
             for where, by_rate in tried.items()}  # fmt: skip
    return {where: {lr: max(by_rate.values()) - x for lr, x in by_rate.items()}
            for where, by_rate in means.items()}  # fmt: skip


def neighbours(lr: float, rates: Sequence[float] = RATES) -> list[float]:
    """A rate, the one below and the one above, where there are."""
    at = rates.index(lr)
    return [lr, *rates[max(0, at - 1) : at], *rates[at + 1 : at + 2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("search", "stage2", "climb", "order", "verdict"))
    parser.add_argument("--strategies", default=",".join(ordered()))
    parser.add_argument("--seeds", default=str(SEED), help="of search")
    parser.add_argument("--factors", default=",".join(STAGE_2), help="of stage2")
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    names = asked.strategies.split(",")
    plans: Mapping[str, Callable[[list[Row]], Iterator[Row]]] = {
        "search": lambda _: search("short", names, tuple(int(x) for x in asked.seeds.split(","))),
        "stage2": lambda rows: stage2(rows, names, asked.factors.split(",")),
        "climb": lambda rows: climb(rows, names),
        "order": lambda _: order([n for n in FULL if n in names]),
        "verdict": lambda _: verdict(names),
    }
    run_missing(plans[asked.what], asked.results, asked.hours)


def ordered() -> list[str]:
    return [*FIRST, *(n for n in STRATEGIES if n not in FIRST)]


if __name__ == "__main__":
    main()
