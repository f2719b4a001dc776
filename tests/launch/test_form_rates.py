"""The search for a rate of each adapter form, and the pairs that are shown to learn."""

from typing import Any

import numpy as np

from benchmarks.form_rates import (
    SEEDS,
    SIZES,
    changed,
    lower,
    pairs,
    plan,
    rate_of,
    searched,
    strategies_of,
)
from benchmarks.rates import SEED, best_of
from benchmarks.short_runs import QUICKSTART, SETTINGS, ranks_of
from fedlora import preflight
from fedlora.strategies.forms import FORMS


def test_every_form_is_searched_but_lora_and_the_one_that_needs_an_invocation() -> None:
    assert {*FORMS} - {*SIZES} == {"lora", "alora"}


def test_every_run_that_is_planned_is_one_that_preflight_lets_begin() -> None:
    for form in SIZES:
        runs = [("search", n) for n in searched(form)] + [("pair", n) for n in pairs(form)]
        for stage, name in runs:
            row = {"stage": stage, "strategy": name, "factor": form}
            given = {**QUICKSTART, **SETTINGS["short"][0], **ranks_of(name), **changed(row),
                     "strategy.name": name, "data.path": "rows.jsonl"}  # fmt: skip
            assert preflight.read(given).lora.form == form


def test_every_pair_that_can_run_is_searched_or_shown_but_for_means_that_are_alike() -> None:
    for form, law in ((f, FORMS[f].law) for f in SIZES):
        there = [*searched(form), *pairs(form)]
        assert len({*there}) == len(there)
        assert {*there} <= {*strategies_of(form)}
        if law != "linear":
            assert {*there} == {*strategies_of(form)}
    assert searched("vera") == ["fedavg", "ffa"]
    assert (searched("shira"), pairs("shira")) == (["fedavg"], ["fedex"])


def test_a_form_is_shown_at_the_rate_that_was_found_for_it_on_seeds_of_its_own() -> None:
    best = {"fedavg": 0.05, "ffa": 0.2}
    rows: list[Any] = []
    shown = []
    for row in plan(rows, ["vera"]):
        if row["stage"] == "pair":
            shown.append((row["strategy"], row["lr"], row["seed"]))
            continue
        score = 0.8
        if row["strategy"] != "head":
            assert row["seed"] == SEED
            score = 0.9 - abs(np.log10(row["lr"] / best[row["strategy"]])) / 10
            if row["factor"] == "vera on all":  # where .02 is the highest that learns
                assert changed(row)["lora.target-modules"] == "all-linear"
                assert (row["setting"], changed(row)["lora.layers"]) == ("half", "")
                score = 0.2 if row["lr"] > 0.02 else 0.77
        rows.append({**row, "accuracy": score})
    tried = {n: sorted(r["lr"] for r in rows if (r["strategy"], r["factor"]) == (n, "vera"))
             for n in best}  # fmt: skip
    assert tried == {"fedavg": [5e-3, 1e-2, 2e-2, 5e-2, 0.1],
                     "ffa": [5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5]}  # fmt: skip
    more = [(r["strategy"], r["lr"]) for r in rows if r["factor"] == "vera on all"]
    assert more == [(n, lr) for n, high in best.items() for lr in (0.2, 0.1, 0.05, 0.02)
                    if lr <= high]  # fmt: skip
    assert {*shown} == {(n, 0.02, s) for n in ("fedsa", "rolora") for s in SEEDS}
    assert best_of(rows, "ffa", "vera") == 0.2
    assert rate_of(rows, "ffa", "vera") == 0.02


def test_a_rate_that_learns_less_than_a_head_is_lowered_as_long_as_that_is_better() -> None:
    """A head alone has .8: .76 is enough, and below .4 a rate is lost."""
    search: dict[str, Any] = {"stage": "search", "strategy": "fedavg", "seed": SEED}
    rows: list[Any] = [{**search, "strategy": "head", "factor": "", "lr": None, "accuracy": 0.8}]
    rows += [{**search, "factor": "vera", "lr": lr, "accuracy": x}
             for lr, x in ((0.05, 0.7), (0.1, 0.9), (0.2, 0.7))]  # fmt: skip

    def after(*scores: float) -> float | None:
        rates = (0.1, 0.05, 0.02, 0.01, 5e-3, 2e-3, 1e-3, 5e-4)
        more = [{**search, "factor": "vera on all", "lr": lr, "accuracy": x}
                for lr, x in zip(rates, scores, strict=False)]  # fmt: skip
        return lower(rows + more, "fedavg", "vera")

    assert after() == 0.1  # to be run
    assert after(0.77) == 0.1
    assert after(0.6) == 0.05  # to be run
    assert after(0.6, 0.6) == 0.1
    assert after(0.6, 0.7) == 0.02
    assert after(0.6, 0.7, 0.65) == 0.05
    assert after(0.6, 0.78) == 0.05
    assert after(0.2, 0.2, 0.5, 0.4) == 0.02
    assert after(*[0.2] * 8) is None
