"""What a strategy's other settings are worth beside its default, on seeds of the verdict.

    python -m benchmarks.otherwise [--strategies fedsb,ffa] [--containing rounds] [--hours 1]

Two kinds, both with one thing changed and the default's rate: the paper's own rule where the
default departs from it, which is what the departure costs; and what a default may lack that is
below the reference, which shows the reason. Each has five seeds, a reason ten. The rows stand in
results/otherwise.jsonl, with those they are held against on the same seeds: the strategy's own
default, and the reference's. The seeds are none of the verdict's, and rows are split as there.
Resumable, as benchmarks/rates.py is.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.rates import REFERENCE, default
from benchmarks.short_runs import Row, ranks_of, run_missing

RESULTS = Path(__file__).parent / "results" / "otherwise.jsonl"
ALL_SEEDS = tuple(range(2000, 2010))
SEEDS = ALL_SEEDS[:5]
OWN = {"evaluate.clients": True, "data.client-test-fraction": 0.3}
LONG = {"run.rounds": 12, "evaluate.every": 12}
DRAWN = {"model.pooling": "default"}
BY_GRADIENT = {"strategy.fedsb.init-from": "update-approx"}
ALIKE = {"robust.method": "norm-bound", "robust.bound": 1e9}
"""Under a robust method all clients weigh alike, and this bound is one that no change reaches."""
RANK_80 = {"clients.ranks": "80", "lora.alpha": 80.0}

SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fedsb": {
        "the start by gradient": BY_GRADIENT,
        "its start, of the clients' signs":
            {**BY_GRADIENT, "strategy.fedsb.signs": "clients"},
        "init-from = orthogonal": {"strategy.fedsb.init-from": "orthogonal"},
        "rank 80 for all": RANK_80,
        "rank 80 for all, the start by gradient": {**RANK_80, **BY_GRADIENT},
    },
    "ravan": {
        "average = trained": {"strategy.ravan.average": "trained"},
        "choice = weight": {"strategy.ravan.choice": "weight"},
        "choice = gradient": {"strategy.ravan.choice": "gradient"},
        "choice = gradient, average = trained":
            {"strategy.ravan.choice": "gradient", "strategy.ravan.average": "trained"},
        "head-scales = trained": {"strategy.ravan.head-scales": "trained"},
        "four heads of rank 40":
            {"clients.ranks": "160", "strategy.ravan.head-rank": 40, "lora.alpha": 160.0},
    },
    "ffa": {
        "rank 64 for all": {"clients.ranks": "64", "lora.alpha": 64.0},
        "12 rounds": LONG,
        "all clients weigh alike": ALIKE,
    },
    "rolora": {"all clients weigh alike": ALIKE},
    "fslora": {
        "all clients weigh alike": ALIKE,
        "normalize = hits": {"strategy.fslora.normalize": "hits"},
        "server.optimizer = fedadam": {"server.optimizer": "fedadam", "server.lr": 0.01},
    },
    "fedsvd": {
        "12 rounds": LONG,
        "a drawn head": DRAWN,
        "a drawn head, head = frozen": {**DRAWN, "strategy.fedsvd.head": "frozen"},
    },
    "fedsa": {"clients' own models": OWN},
    "fedex": {"12 rounds": LONG, "clients' own models": OWN, "a drawn head": DRAWN,
              "all clients weigh alike": ALIKE},
    "flora": {"reinit = keep-A": {"strategy.flora.reinit": "keep-A"}},
    "hetlora": {"rounding = down": {"strategy.hetlora.rounding": "down"}},
    "florist": {"energy = 0.95": {"strategy.florist.energy": 0.95}},
    "lora-fair": {
        "mode = cosine": {"strategy.lora-fair.mode": "cosine"},
        "mode = cosine-columns": {"strategy.lora-fair.mode": "cosine-columns"},
    },
    "lora-a2": {
        "choice = server": {"strategy.lora-a2.choice": "server"},
        "four times the rate for B": {"train.lr-ratio-b": 4.0},
        "12 rounds": LONG,
        "rank 16 for all": {"clients.ranks": "16"},
    },
}  # fmt: skip
SHOWN_BY: Mapping[str, tuple[str, str]] = {
    "ffa": ("rolora", ""),
    "fedsvd": ("rolora", ""),
    "lora-a2": ("lora-a2", "rank 16 for all"),
    "fedsb": ("fedsb", "rank 80 for all"),
    "ravan": ("ravan", "four heads of rank 40"),
}
"""Of each strategy that fails the verdict, the runs that have what it lacks: see `shown`."""

Scores = Mapping[int, float]
"""By seed, of accuracy."""


@dataclass(frozen=True)
class Gap:
    """Of one's scores less another's, over the seeds of both: their mean, and half of the 95 %
    interval by Student's t."""

    seeds: int
    mean: float
    half: float


def gap(one: Scores, other: Scores) -> Gap | None:
    """None of fewer than two seeds."""
    found = [one[s] - other[s] for s in sorted(one.keys() & other.keys())]
    if (n := len(found)) < 2:
        return None
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(found) / n**0.5
    return Gap(n, statistics.fmean(found), half)


def scores(
    rows: Sequence[Mapping[str, Any]], name: str, label: str = "", of: str = "accuracy"
) -> Scores:
    """Of a strategy at the default rate that it has now, with this changed."""
    return {r["seed"]: r[of] for r in rows if r["stage"] == "verdict" and r["strategy"] == name
            and r["factor"] == label and r["lr"] == default(name) and of in r}  # fmt: skip


def reference(rows: Sequence[Mapping[str, Any]], name: str, label: str, of: str) -> Scores:
    """What a setting is held against beside its own default: the reference's, with the same
    change where that was run of it."""
    same = label if label in SETTINGS[REFERENCE] else "rank 8" if ranks_of(name) else ""
    return scores(rows, REFERENCE, same, of)


def shown(rows: Sequence[Mapping[str, Any]], name: str) -> Gap | None:
    """What is gained beside a failing strategy's default where it has what it lacks."""
    strategy, label = SHOWN_BY[name]
    return gap(scores(rows, strategy, label), scores(rows, name))


def plan(names: Sequence[str]) -> Iterator[Row]:
    """Seed by seed, so that one that is cut short has something of each: five seeds, and all where
    a reason is to be shown; before each strategy's settings what they are held against."""
    reasons = {*SHOWN_BY.values(), *((REFERENCE, label) for _, label in SHOWN_BY.values())}
    for seed in ALL_SEEDS:
        base = {"stage": "verdict", "setting": "short", "data": "trec", "seed": seed}
        for name in names:
            wanted = [label for label in SETTINGS.get(name, {})
                      if seed in SEEDS or (name, label) in reasons]  # fmt: skip
            if not wanted and name not in SHOWN_BY and (name, "") not in reasons:
                continue
            same = "rank 8" if ranks_of(name) else ""
            yield {**base, "strategy": REFERENCE, "lr": default(REFERENCE), "factor": same}
            for label in ([] if name == REFERENCE else [""]) + wanted:
                yield {**base, "strategy": name, "lr": default(name), "factor": label}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--strategies", default=",".join(SETTINGS))
    parser.add_argument("--containing", default="", help="only settings whose name has this")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    planned = plan(asked.strategies.split(","))
    run_missing(
        lambda _: (
            row
            for row in planned
            if asked.containing in row["factor"] or row["factor"] in ("", "rank 8")
        ),
        asked.results,
        asked.hours,
        lambda row: SETTINGS[row["strategy"]].get(row["factor"], {}),
    )


if __name__ == "__main__":
    main()
