"""The rate of each adapter form beside LoRA's, and that a form learns with the other strategies.

    python -m benchmarks.form_rates                     what is missing of both, on short runs
    python -m benchmarks.form_rates --forms vera,dora   of these alone

The short setting of benchmarks/short_runs.py on TREC's validation rows, of two modules. Most forms
train 2,400 to 13,000 numbers at the size in SIZES, where LoRA of rank 2 to 8 has 3,072 to 12,288;
vera, lokr, ia3, beft, road, loldu and tinylora have 128 to 1,280, vblora's bank 41,000.

A form's rate is searched with fedavg and, where the form goes with a strategy that is exact by
another road, with that: from 1e-2 on to where the best rate has both its neighbours. What is best
for two modules may be far too much for 36, so it is then lowered until all linear modules of all
layers learn as well, on half the rows, or until lower is no better. Every other pair runs twice at
the form's rate on the linear modules of two layers, to show that it learns; under fedsa it is the
clients' own models that do. The rows stand in results/form_rates.jsonl; resumable, as
benchmarks/rates.py is.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.otherwise import OWN
from benchmarks.rates import SEED, WIDE, best_of, climb
from benchmarks.short_runs import FACTORS, QUICKSTART, Row, run_missing
from fedlora.strategies import STRATEGIES
from fedlora.strategies.forms import FORMS, problem

RESULTS = Path(__file__).parent / "results" / "form_rates.jsonl"
SIZES: Mapping[str, int] = {
    "dora": 8, "vera": 256, "randlora": 32, "gralora": 4, "loha": 2, "lokr": 8, "hira": 4,
    "fourierft": 3072, "waveft": 3072, "c3a": 48, "shira": 4, "miss": 8, "bat": 8, "ia3": 1,
    "beft": 1, "supertuning": 1, "oft": 16, "hra": 8, "road": 64, "delora": 4, "vblora": 4,
    "tinylora": 64, "psoft": 48, "lora-xs": 48, "pmss": 48, "paca": 8, "loldu": 384, "losia": 48,
    "smt": 24, "melora": 4, "moslora": 4, "lora-mini": 8, "nora": 8, "lotr": 8, "msplora": 4,
}  # fmt: skip
"""clients.ranks of each form that has sizes. Without lora, which has its own search, and alora,
which acts from an invocation on that these texts do not have."""
OPTIONS: Mapping[str, str] = {"vblora": "vector_length=96", "lora-mini": "width=96",
                              "nora": "width=96"}  # fmt: skip
SEEDS = (1001, 1002)
"""Of the pairs that are only shown to learn."""
MORE = {"lora.layers": "-2,-1", "lora.target-modules": "all-linear"}
"""What pairs adapt: all linear modules of two layers."""
ON_ALL = " on all"
"""Behind a form's name, of a run of the search that adapts all linear modules of all layers."""
ENOUGH, LOST = 0.95, 0.5
"""Of a trained head's accuracy: what is below the first may be better at a lower rate, and what is
below the second is lost."""


def changes(form: str) -> Mapping[str, Any]:
    """Of the short setting, what a form's runs have; the scale is the strategy's own."""
    size = SIZES[form]
    ranks = str(size) if FORMS[form].size else QUICKSTART["clients.ranks"]  # as if it was not set
    given: dict[str, Any] = {"lora.form": form, "clients.ranks": ranks}
    return given | ({"lora.options": OPTIONS[form]} if form in OPTIONS else {})


def changed(row: Row) -> Mapping[str, Any]:
    """What a run has beside its setting."""
    if not row["factor"]:
        return {}
    form = row["factor"].removesuffix(ON_ALL)
    more = MORE if row["stage"] == "pair" else {}
    more = FACTORS["all linear modules"] if form != row["factor"] else more
    own = OWN if (row["stage"], row["strategy"]) == ("pair", "fedsa") else {}
    return {**changes(form), **more, **own}


def strategies_of(form: str) -> list[str]:
    """Those that run a form."""
    return [name for name, cls in STRATEGIES.items() if not problem(FORMS[form], cls())]


def searched(form: str) -> list[str]:
    """fedavg, and one that is exact with a form of which fedavg is not."""
    there = strategies_of(form)
    return ["fedavg", *["ffa"] * ("ffa" in there and FORMS[form].law != "linear")]


def pairs(form: str) -> list[str]:
    """The others to be shown: of a linear form, whose mean all take alike, fedex for all."""
    there = ["fedex"] if FORMS[form].law == "linear" else strategies_of(form)
    return [name for name in there if name not in searched(form)]


def lower(rows: Sequence[Mapping[str, Any]], name: str, form: str) -> float | None:
    """From a form's best rate downwards, the first that is enough on all modules, else the last
    that was better than the one above it; or the next to be run. None: all are lost."""
    best = best_of(rows, name, form) or 0.0
    (head,) = (r["accuracy"] for r in rows if r["strategy"] == "head" and r["seed"] == SEED)
    ran, found = on_all(rows, name, form), None
    for lr in (lr for lr in reversed(WIDE) if lr <= best):
        if lr not in ran:
            return lr
        if found and ran[lr] <= ran[found]:
            return found
        if ran[lr] >= head * ENOUGH:
            return lr
        found = lr if ran[lr] >= head * LOST else None
    return found


def on_all(rows: Sequence[Mapping[str, Any]], name: str, form: str) -> dict[float, float]:
    """By rate, the accuracy with all linear modules of all layers adapted."""
    return {r["lr"]: r["accuracy"] for r in rows
            if (r["strategy"], r["factor"]) == (name, form + ON_ALL)}  # fmt: skip


def rate_of(rows: Sequence[Mapping[str, Any]], name: str, form: str) -> float | None:
    """The rate that the search found, where it has come to an end."""
    lr = lower(rows, name, form)
    return lr if lr in on_all(rows, name, form) else None


def plan(rows: Sequence[Row], forms: Sequence[str]) -> Iterator[Row]:
    """Form by form; `rows` grows as they are run."""
    base = {"stage": "search", "setting": "short", "data": "trec"}
    for seed in (SEED, *SEEDS):
        yield {**base, "strategy": "head", "lr": None, "seed": seed, "factor": ""}
    for form in forms:
        yield from climb(rows, searched(form), form)
        for name in searched(form):
            while (lr := lower(rows, name, form)) and not rate_of(rows, name, form):
                yield {**base, "setting": "half", "strategy": name, "lr": lr, "seed": SEED,
                       "factor": form + ON_ALL}  # fmt: skip
    for seed in SEEDS:
        for form in forms:
            lr = rate_of(rows, "fedavg", form)
            for name in pairs(form):
                yield {**base, "stage": "pair", "strategy": name, "lr": lr, "seed": seed,
                       "factor": form}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--forms", default=",".join(SIZES))
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    forms = asked.forms.split(",")
    run_missing(
        lambda rows: plan(rows, forms),
        asked.results,
        asked.hours,
        changed,
    )


if __name__ == "__main__":
    main()
