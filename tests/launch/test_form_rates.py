"""The search for a rate of each adapter form, and the pairs that are shown to learn."""

from typing import Any

import numpy as np

from benchmarks.form_rates import SEEDS, SIZES, changed, pairs, plan, searched, strategies_of
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
        if row["strategy"] == "head":
            continue
        if row["stage"] == "pair":
            shown.append((row["strategy"], row["lr"], row["seed"]))
            continue
        assert row["seed"] == SEED
        away = abs(np.log10(row["lr"] / best[row["strategy"]]))
        rows.append({**row, "accuracy": 0.9 - away / 10})
    tried = {n: sorted(r["lr"] for r in rows if r["strategy"] == n) for n in best}
    assert tried == {"fedavg": [5e-3, 1e-2, 2e-2, 5e-2, 0.1],
                     "ffa": [5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5]}  # fmt: skip
    assert {*shown} == {(n, 0.05, s) for n in ("fedsa", "rolora") for s in SEEDS}
    assert best_of(rows, "ffa", "vera") == 0.2
