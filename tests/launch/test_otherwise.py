"""Other settings beside the default: pairs, and what a failed verdict must say."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import otherwise, verdict
from benchmarks.otherwise import ALL_SEEDS, SEEDS, SETTINGS, gap, plan, reference, scores
from benchmarks.rates import REFERENCE, RESULTS, SEEDS_OF_VERDICT, default
from benchmarks.short_runs import QUICKSTART, ranks_of, read
from fedlora.config.reader import Config
from tests.support.doc_tables import load as module
from tests.support.tiny_federation import ROOT

pages = module(ROOT / "docs" / "write_rates.py", "docs_write_rates_otherwise")


def made(strategy: str, seed: int, accuracy: float, factor: str = "", **more: Any) -> Any:
    return {"stage": "verdict", "strategy": strategy, "seed": seed, "accuracy": accuracy,
            "factor": factor, "lr": default(strategy), **more}  # fmt: skip


def test_a_gap_is_of_the_seeds_that_both_have_with_the_paired_interval() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5))
    found = gap(dict(enumerate(a.tolist())), {**dict(enumerate(b.tolist())), 9: 7.0})
    assert found is not None
    ends = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(
        (ends.low, ends.high)
    )
    assert found.seeds == 5
    assert gap({1: 0.5}, {1: 0.4}) is None


def test_a_setting_is_held_against_the_reference_with_the_same_change_where_it_was_run() -> None:
    label = "12 rounds"
    rows = [made(REFERENCE, 1, 0.5), made(REFERENCE, 1, 0.6, label), made("ffa", 1, 0.4, label),
            made(REFERENCE, 1, 0.7, "rank 8"),
            {**made("ffa", 2, 0.9, label), "lr": 1.0}]  # fmt: skip
    assert scores(rows, "ffa", label) == {1: 0.4}
    assert reference(rows, "ffa", label, "accuracy") == {1: 0.6}
    assert reference(rows, "ffa", "rank 64 for all", "accuracy") == {1: 0.5}
    assert reference(rows, "lora-fair", "mode = cosine", "accuracy") == {1: 0.7}


def test_every_setting_is_a_config_that_changes_something() -> None:
    for row in (r for r in plan([*SETTINGS]) if r["factor"] not in ("", "rank 8")):
        name, changes = row["strategy"], SETTINGS[row["strategy"]][row["factor"]]
        given = {**QUICKSTART, **ranks_of(name), "strategy.name": name, "train.lr": row["lr"]}
        assert Config.read({**given, **changes}) != Config.read(given), row["factor"]
    seeds = [r["seed"] for r in plan([*SETTINGS])]
    assert seeds == sorted(seeds)


def test_a_reason_has_all_seeds_of_the_verdict_and_another_setting_five() -> None:
    seeds: dict[tuple[str, str], set[int]] = {}
    for row in plan([*SETTINGS]):
        seeds.setdefault((row["strategy"], row["factor"]), set()).add(row["seed"])
    own = "clients' own models"
    assert seeds["fedsa", own] == seeds[REFERENCE, own] == {*SEEDS}
    assert seeds["lora-a2", "rank 16 for all"] == {*ALL_SEEDS}
    assert seeds["hetlora", "rounding = down"] == seeds["hetlora", ""] == {*SEEDS}
    assert seeds[REFERENCE, ""] == seeds["rolora", ""] == seeds["ffa", ""] == {*ALL_SEEDS}
    assert seeds[REFERENCE, "rank 8"] == {*SEEDS}
    assert not {*ALL_SEEDS} & {*SEEDS_OF_VERDICT}


def test_every_strategy_that_fails_says_why_and_no_other_does() -> None:
    judged = verdict.verdicts(read(RESULTS))
    failed = {name for name, v in judged.items() if v.word == "fails"}
    assert failed == {*verdict.BECAUSE} & {*judged}
    assert all(x.startswith("inherent, because ") for x in verdict.BECAUSE.values())


def test_nothing_is_called_inherent_that_no_run_has_shown() -> None:
    label = otherwise.SHOWN_BY["fedsb"][1]
    default = [made("fedsb", s, 0.7) for s in SEEDS]
    shown = [made("fedsb", s, 0.8 + s % 2 / 100, label) for s in SEEDS]
    why, told = pages.because("fedsb", default + shown)
    assert why == f": {verdict.BECAUSE['fedsb']}"
    assert told[0].startswith(f"Shown by {label}: +10.4 +- 0.7 points beside fedsb's default, 5")
    why, told = pages.because("fedsb", default + shown[:1])
    assert (why, "were not made yet" in told[0]) == ("", True)
    level = [made("fedsb", s, 0.68 + s % 2 / 20, label) for s in SEEDS]
    why, told = pages.because("fedsb", default + level)
    assert (why, "do not: " in told[0]) == ("", True)
    assert {*otherwise.SHOWN_BY} == {*verdict.BECAUSE}
    for strategy, label in otherwise.SHOWN_BY.values():
        assert not label or label in SETTINGS[strategy]


def test_a_page_marks_the_data_of_which_no_rate_is_above_the_trained_head() -> None:
    tried = (("head", None, 0.7), ("ffa", 1e-2, 0.7), ("fedex", 1e-2, 0.69), ("fedex", 2e-2, 0.71))
    rows = [{"data": "trec", "strategy": s, "lr": lr, "seed": 1, "accuracy": x}
            for s, lr, x in tried]  # fmt: skip
    assert "nothing was gained: TREC" in pages.no_better(rows, "ffa")[0]
    assert pages.no_better(rows, "fedex") == []
    assert pages.no_better(rows[1:], "ffa") == []
