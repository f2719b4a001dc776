"""The search behind each strategy's default rate, and the verdict on what it found.

    python -m benchmarks.rates search                 what is missing of stage 1, on short runs
    python -m benchmarks.rates stage2                 best rate and neighbours, one factor changed
    python -m benchmarks.rates writes                 the same of a language model, for its default
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
WIDE = (5e-4, 1e-3, *RATES, 1e-1, 2e-1, 5e-1, 1.0, 2.0)
"""Where a language model or another form is tuned, which may need far larger ones."""
READS, WRITES = "classification", "causal-lm"
"""The task of all settings but two, and that of these, which has a default of its own."""
GRIDS: Mapping[str, Sequence[float]] = {READS: RATES, WRITES: WIDE}
WRITING = (WRITES, "causal-lm all layers")
"""Its settings: the last layer adapted as everywhere in the search, and all, on fewer rows."""
MANY = "all linear modules"
"""Of the settings that read, that in which more than FEW_MODULES are adapted, 36; with all layers
they are 12, with the others 2."""
SIZES = {WRITING[1]: "small", MANY: "half"}
"""By factor, where a run is of another size than "short"."""
MIDDLE = 1e-2
ORDER = (1e-2, 2e-2, 5e-3, 5e-2, 2e-3)
FIRST = ("fedex", "ffa", "fedsa", "fslora", "fedsb", "ravan", "lora-a2", "fedavg")
"""The order of the strategies: those that were seen to learn little, the reference, the others."""
TIE = 0.005
"""As a share of a score: what two must differ by in one setting before the higher rate is best."""
LOST = 0.1
"""Of a score: a rate that loses so much somewhere is no hope for a default."""
SEARCHED = ("trec", "movies")
"""The two of stage 1, of which each rate is run."""
SEED, SEEDS_OF_VERDICT = 1000, tuple(range(3000, 3010))
REFERENCE = "fedex"
"""Of the verdict: at its own default, named before any run of it."""
STAGE_2 = ("products", "SmolLM2", "alpha 0.1", "6 clients", "two epochs", "all layers",
           MANY)  # fmt: skip
"""The factors that are run, in this order: a third data set, a second model, the skew, the clients,
the local steps, the layers that are adapted."""
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
    """The best rate and its two neighbours, with one factor changed at a time, until the rate that
    is best over what was run has both in each setting; without one that has already lost more.

    Factor by factor over all strategies, the best rates first. A strategy without stage 1 has none.
    What is next depends on `rows`, which grow as they are run.
    """
    begun = [name for name in names if best_rate(rows, name)]
    return _around(rows, begun, factors, READS)


def writes(rows: list[Row], names: list[str]) -> Iterator[Row]:
    """The same of a language model, whose rates may be far larger: first to the best of each of its
    settings."""
    for factor in reversed(WRITING):
        yield from climb(rows, names, factor)
    yield from _around(rows, names, WRITING, WRITES)


def climb(rows: Sequence[Row], names: Sequence[str], factor: str) -> Iterator[Row]:
    """Of each strategy the rates beside the best of those tried under a factor, from MIDDLE on,
    until both are there. What is next depends on `rows`, which grow as they are run."""
    for name in names:
        if best_of(rows, name, factor) is None:
            yield _changed(factor, name, MIDDLE)
        while (best := best_of(rows, name, factor)) is not None:
            there = {r["lr"] for r in rows if (r["strategy"], r["factor"]) == (name, factor)}
            if not (left := [lr for lr in neighbours(best, WIDE) if lr not in there]):
                break
            yield _changed(factor, name, left[0])


def best_of(rows: Sequence[Mapping[str, Any]], name: str, factor: str) -> float | None:
    """With one factor changed: the rate of the highest score; of those within TIE the lowest."""
    scores = {r["lr"]: r["accuracy"] for r in rows if r["stage"] == "search"
              and (r["strategy"], r["factor"]) == (name, factor)}  # fmt: skip
    return min(
        (lr for lr, x in scores.items() if x >= max(scores.values()) * (1 - TIE)), default=None
    )


def _around(
    rows: list[Row], names: Sequence[str], factors: Sequence[str], task: str
) -> Iterator[Row]:
    """Each strategy's best rate and its neighbours under each factor, as `rows` grow."""

    def missing() -> Iterator[Row]:
        there = {(r["strategy"], r["factor"], r["lr"]) for r in rows if r["stage"] == "search"}
        for factor, name in itertools.product(factors, names):
            if lr := below(rows, name, factor):
                yield _changed(factor, name, lr)
        near = {name: hopeful(rows, name, task) for name in names}
        of_few = {name: [*near[name], *hopeful(few(rows), name, task)] for name in names}
        for factor, place, name in itertools.product(factors, range(2 * len(WIDE)), names):
            for lr in (near if factor == MANY else of_few)[name][place : place + 1]:
                if (name, factor, lr) not in there:
                    yield _changed(factor, name, lr)

    while row := next(missing(), None):
        yield row


def _changed(factor: str, name: str, lr: float) -> Row:
    return {"stage": "search", "setting": SIZES.get(factor, "short"),
            "data": factor if factor in DATA else "trec", "strategy": name, "lr": lr, "seed": SEED,
            "factor": factor}  # fmt: skip


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


def default(name: str, task: str = READS, factor: str = "") -> float:
    """The rate that a strategy brings to these runs, of a task and with a factor changed."""
    lr, _ = rate(defaults_of(STRATEGIES[name]), task, "lora", task, factor != MANY)
    return lr


def few(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that a rate for few modules is found with. Those that write are all among them:
    they have no such rate."""
    return [r for r in rows if r["factor"] != MANY]


def best_rate(rows: Sequence[Mapping[str, Any]], name: str, task: str = READS) -> float | None:
    """Over all settings of a task, of both stages, the rate whose worst loss to the best of its
    setting is the least; of equals the lowest. Rates that were not run in each are left out."""
    worst = {lr: x for lr, (x, whole) in worst_losses(rows, name, task).items() if whole}
    return min(worst, key=lambda lr: (round(worst[lr], 6), lr), default=None)


def worst_losses(
    rows: Sequence[Mapping[str, Any]], name: str, task: str = READS
) -> dict[float, tuple[float, bool]]:
    """By rate the worst of its losses over a task's settings, and whether it was run in all."""
    of = [x for setting, x in losses(rows, name).items() if task_of(setting) == task]
    there = {lr: [x[lr] for x in of if lr in x] for lr in GRIDS[task]}
    return {lr: (max(x), len(x) == len(of)) for lr, x in there.items() if x}


def below(rows: Sequence[Mapping[str, Any]], name: str, factor: str) -> float | None:
    """The next lower rate under a factor under which each that was tried has less than half of the
    strategy's best score in this task: all of them are too high."""
    task = task_of(factor)
    mine = [r for r in rows if (r["stage"], r["strategy"]) == ("search", name)
            and task_of(r["factor"]) == task]  # fmt: skip
    ran = {r["lr"]: r["accuracy"] for r in mine if r["factor"] == factor}
    if not ran or max(ran.values()) >= max(r["accuracy"] for r in mine) / 2:
        return None
    return max((lr for lr in GRIDS[task] if lr < min(ran)), default=None)


def hopeful(rows: Sequence[Mapping[str, Any]], name: str, task: str) -> list[float]:
    """The best rate and its neighbours, without those that have lost LOST in some setting, and more
    than it has in any; and each that has lost less than it so far."""
    best = best_rate(rows, name, task) or MIDDLE
    worst = {lr: x for lr, (x, _) in worst_losses(rows, name, task).items()}
    least = worst.get(best, 0.0)
    near = [lr for lr in neighbours(best, GRIDS[task]) if worst.get(lr, 0.0) <= max(LOST, least)]
    return [best, *(lr for lr in near if lr != best),
            *(lr for lr, x in worst.items() if x < least and lr not in near)]  # fmt: skip


def task_of(setting: str) -> str:
    """The task of a setting that `losses` names."""
    return WRITES if WRITES in setting else READS


def losses(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[float, float]]:
    """By setting of the short runs, and rate, what that loses to the best rate tried there."""
    tried: dict[str, dict[float, list[float]]] = {}
    for r in rows:
        at = SIZES.get(r["factor"], "short")
        if (r["stage"], r["setting"], r["strategy"]) == ("search", at, name):
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
    parser.add_argument("what", choices=("search", "stage2", "writes", "order", "verdict"))
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
        "writes": lambda rows: writes(rows, names),
        "order": lambda _: order([n for n in FULL if n in names]),
        "verdict": lambda _: verdict(names),
    }
    run_missing(plans[asked.what], asked.results, asked.hours)


def ordered() -> list[str]:
    return [*FIRST, *(n for n in STRATEGIES if n not in FIRST)]


if __name__ == "__main__":
    main()
