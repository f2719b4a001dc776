"""The search for rates: which rows score it, what it runs in which order, and its verdict."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import rates, short_runs, verdict
from benchmarks.rates import FULL, ORDER, RATES, REFERENCE, SEEDS_OF_VERDICT, STAGE_2, WIDE
from benchmarks.short_runs import Row
from fedlora.config.reader import Config

ROWS = [(f"text {n}", str(n % 3)) for n in range(400)]
NAMES = ["fedex", "fedavg", "ffa"]


def tried(name: str, lr: float, accuracy: float, data: str = "trec", **other: Any) -> Row:
    return {"stage": "search", "setting": "short", "data": data, "strategy": name, "lr": lr,
            "seed": 1000, "factor": "", "accuracy": accuracy, **other}  # fmt: skip


# -- rows ------------------------------------------------------------------------------------------


def test_no_row_that_a_verdict_scores_was_ever_seen_by_the_search() -> None:
    seen = set()
    for seed in (1000, 1001, *SEEDS_OF_VERDICT):
        for part in short_runs.parts(ROWS, seed, "search", (10**6, 10**6)):
            seen |= set(part)
    for seed in SEEDS_OF_VERDICT:
        train, scored = short_runs.parts(ROWS, seed, "verdict", (10**6, 50))
        assert len(scored) == 50
        assert not set(scored) & (seen | set(train))
        assert set(train) | set(scored) == set(ROWS)


def test_two_seeds_of_a_verdict_score_other_rows() -> None:
    first, second = (short_runs.parts(ROWS, s, "verdict", (9, 20))[1] for s in SEEDS_OF_VERDICT[:2])
    assert set(first) != set(second)


# -- the plan --------------------------------------------------------------------------------------


def test_a_search_that_is_cut_short_has_each_strategys_middle_rates() -> None:
    names = rates.ordered()
    runs = [r for r in rates.search("short", names, (1000,)) if r["strategy"] != "head"]
    assert len(runs) == len(names) * len(RATES) * len(rates.SEARCHED)
    assert len({short_runs.key_of(r) for r in runs}) == len(runs)
    assert [(r["lr"], r["strategy"]) for r in runs[: len(names)]] == [(ORDER[0], n) for n in names]
    assert {r["data"] for r in runs[: len(runs) // 2]} == {"trec"}


def carried_out(plan: Iterator[Row], rows: list[Row], score: Callable[[Row], float]) -> list[Row]:
    """What a plan runs where each run gets this score."""
    added = []
    for row in plan:
        added.append(row)
        rows.append({**row, "accuracy": score(row)})
    return added


def stage_1(name: str, score: Callable[[Row], float]) -> list[Row]:
    """Each rate of a strategy on both data sets."""
    there = [tried(name, lr, 0.0, data) for lr in RATES for data in rates.SEARCHED]
    return [{**row, "accuracy": score(row)} for row in there]


def away(best: float) -> Callable[[Row], float]:
    """A score that falls by a fiftieth for each step of RATES between a rate and the best."""
    return lambda row: 0.9 - abs(RATES.index(row["lr"]) - RATES.index(best)) / 50


def test_stage_2_runs_the_best_rate_and_its_two_neighbours() -> None:
    rows = [*stage_1("ffa", away(1e-2)), *stage_1("fedex", away(2e-3))]
    runs = carried_out(
        rates.stage2(rows, ["ffa", "fedex", "fedsa"]),
        rows,
        lambda row: away({"ffa": 1e-2, "fedex": 2e-3}[row["strategy"]])(row),
    )
    for name, expected in (("ffa", {5e-3, 1e-2, 2e-2}), ("fedex", {2e-3, 5e-3})):
        for factor in STAGE_2:
            mine = [r["lr"] for r in runs if (r["strategy"], r["factor"]) == (name, factor)]
            assert set(mine) == expected
            assert len(mine) == len(expected)
    assert not [r for r in runs if r["strategy"] == "fedsa"]
    assert [r["lr"] for r in runs[:2]] == [1e-2, 2e-3]


def test_stage_2_goes_on_where_another_rate_is_the_best_of_all_settings() -> None:
    rows = stage_1("ffa", away(1e-2))
    assert rates.best_rate(rows, "ffa") == 1e-2
    runs = carried_out(rates.stage2(rows, ["ffa"]), rows, lambda row: 2 * away(5e-2)(row))
    assert rates.best_rate(rows, "ffa") == 2e-2  # at most two fiftieths from the best of each
    for factor in STAGE_2:
        there = {r["lr"] for r in runs if r["factor"] == factor}
        assert there >= {1e-2, 2e-2, 5e-2}  # it, and its two neighbours


def test_a_neighbour_that_was_lost_somewhere_is_run_nowhere_else() -> None:
    rows = stage_1("ffa", away(1e-2))
    rows += [
        tried("ffa", 2e-2, 0.2, factor="all layers"),
        tried("ffa", 1e-2, 0.9, factor="all layers"),
    ]
    runs = carried_out(rates.stage2(rows, ["ffa"]), rows, away(1e-2))
    assert {r["lr"] for r in runs} == {5e-3, 1e-2}
    assert rates.best_rate(rows, "ffa") == 1e-2


def test_where_every_rate_was_too_high_lower_ones_are_run_and_held_against_the_others() -> None:
    def score(row: Row) -> float:
        fell = row["factor"] == "all layers" and row["lr"] > 2e-3
        return 0.2 if fell else away(1e-2)(row)

    rows = stage_1("ffa", score)
    runs = carried_out(rates.stage2(rows, ["ffa"]), rows, score)
    assert rates.best_rate(rows, "ffa") == 2e-3
    assert {r["lr"] for r in runs if r["factor"] == "all layers"} >= {2e-3, 5e-3}


def test_the_best_rate_for_few_modules_has_its_neighbours_where_few_are_adapted() -> None:
    def score(row: Row) -> float:
        fell = row["factor"] == rates.MANY and row["lr"] > 5e-3
        return 0.2 if fell else away(2e-2)(row)

    rows = stage_1("ffa", score)
    many = [{**tried("ffa", lr, 0.0, factor=rates.MANY), "setting": rates.SIZES[rates.MANY]}
            for lr in (2e-3, 5e-3, 1e-2)]  # fmt: skip
    rows += [{**row, "accuracy": score(row)} for row in many]
    runs = carried_out(rates.stage2(rows, ["ffa"]), rows, score)
    assert rates.best_rate(rows, "ffa") == 5e-3
    assert rates.best_rate(rates.few(rows), "ffa") == 2e-2
    for factor in (f for f in STAGE_2 if f != rates.MANY):
        assert {r["lr"] for r in runs if r["factor"] == factor} >= {1e-2, 2e-2, 5e-2}


def test_what_is_too_high_is_held_against_scores_of_the_same_task() -> None:
    rows = [*stage_1("ffa", away(1e-2)), tried("ffa", 1e-2, 0.4, factor=rates.WRITES)]
    assert rates.below(rows, "ffa", rates.WRITES) is None  # .4 of a right token is no collapse
    rows.append(tried("ffa", 1e-2, 0.1, factor=rates.WRITING[1]))
    assert rates.below(rows, "ffa", rates.WRITING[1]) == 5e-3
    rows.append(tried("ffa", 5e-4, 0.1, factor=rates.WRITING[1]))
    assert rates.below(rows, "ffa", rates.WRITING[1]) is None  # there is none lower


def test_one_factor_is_changed_at_a_time_and_another_data_set_is_one() -> None:
    rows = stage_1("fedex", away(2e-3))
    runs = carried_out(rates.stage2(rows, ["fedex"]), rows, away(2e-3))
    assert {(r["data"], r["factor"]) for r in runs} == {
        ("products", "products"), *(("trec", f) for f in STAGE_2 if f != "products")
    }  # fmt: skip
    assert {(r["factor"], r["setting"]) for r in runs if r["setting"] != "short"} == {
        ("all linear modules", "half")
    }  # fmt: skip
    assert {r["data"] for r in rates.search("short", ["fedex"], (1,))} == {"trec", "movies"}
    for factor in (*STAGE_2, *rates.WRITING):
        changed = {**short_runs.QUICKSTART, **short_runs.FACTORS[factor]}
        config = Config.read({**changed, "data.path": "x.jsonl"})
        assert config.model.task == rates.task_of(f"trec {factor}")


def test_a_language_model_is_tuned_over_its_own_settings_and_rates() -> None:
    def score(row: Row) -> float:
        best = {"causal-lm": 1.0, "causal-lm all layers": 0.1}[row["factor"]]
        return 0.9 - abs(WIDE.index(row["lr"]) - WIDE.index(best)) / 10

    rows = stage_1("fedsb", away(2e-3))
    runs = carried_out(rates.writes(rows, ["fedsb"]), rows, score)
    assert {(r["factor"], r["setting"], r["data"]) for r in runs} == {
        ("causal-lm", "short", "trec"), ("causal-lm all layers", "small", "trec")
    }  # fmt: skip
    assert rates.best_rate(rows, "fedsb", "causal-lm") == 0.2  # of .2 and .5, alike, the lower
    for factor in rates.WRITING:
        assert {1e-1, 2e-1, 5e-1} <= {r["lr"] for r in runs if r["factor"] == factor}
    assert rates.best_rate(rows, "fedsb") == 2e-3
    assert runs[0]["lr"] == 1e-2


def test_a_climb_goes_on_until_the_best_rate_has_both_its_neighbours() -> None:
    def row(lr: float, accuracy: float) -> Row:
        return tried("fedavg", lr, accuracy, factor="vera")

    def score(lr: float) -> float:
        return 0.9 - abs(np.log10(lr) + 1.0) / 10  # best at .1

    rows = [row(lr, score(lr)) for lr in (1e-2, 2e-2, 5e-2)]
    added = []
    for planned in rates.climb(rows, ["fedavg"], "vera"):
        added.append(planned["lr"])
        rows.append(row(planned["lr"], score(planned["lr"])))
    assert added == [1e-1, 2e-1]
    assert rates.best_of(rows, "fedavg", "vera") == 1e-1
    rows.append(row(2e-3, score(1e-1) - rates.TIE / 2))
    assert rates.best_of(rows, "fedavg", "vera") == 2e-3  # of those that are alike the lowest
    assert [r["lr"] for r in itertools.islice(rates.climb(rows, ["ffa"], "vera"), 1)] == [1e-2]


def test_a_score_is_the_accuracy_or_how_probable_a_right_token_is() -> None:
    assert short_runs.score({"accuracy": 0.7, "loss": 1.0}) == 0.7
    two = np.array([0.9, 0.4])  # its loss is the mean of -log p: the geometric mean is .6
    assert short_runs.score({"loss": float(-np.log(two).mean())}) == pytest.approx(0.6, abs=1e-4)


def test_what_a_rate_loses_is_held_against_the_best_of_its_own_setting() -> None:
    rows = [tried("ffa", 1e-2, 0.8), tried("ffa", 2e-2, 0.7), tried("ffa", 2e-2, 0.9, seed=1001)]
    rows += [
        tried("ffa", 1e-2, 0.5, factor="causal-lm"),
        tried("ffa", 5e-3, 0.6, factor="causal-lm"),
    ]
    found = rates.losses(rows, "ffa")
    assert found["trec"] == pytest.approx({1e-2: 0.0, 2e-2: 0.0})
    assert found["trec causal-lm"] == pytest.approx({1e-2: 0.1, 5e-3: 0.0})


def test_the_best_rate_is_that_whose_worst_loss_over_the_settings_is_the_least() -> None:
    rows = [tried("ffa", 5e-3, 0.6), tried("ffa", 1e-2, 0.8), tried("ffa", 2e-2, 0.7)]
    assert rates.best_rate(rows, "ffa") == 1e-2
    rows += [tried("ffa", 5e-3, 0.5, "movies"), tried("ffa", 2e-2, 0.9, "movies")]
    assert rates.best_rate(rows, "ffa") == 2e-2  # 1e-2 was not run on both
    rows += [tried("ffa", 1e-2, 0.85, "movies")]
    assert rates.best_rate(rows, "ffa") == 1e-2  # .05 there, where 2e-2 loses .1 at home
    rows += [tried("ffa", lr, x, factor="alpha 0.1") for lr, x in ((1e-2, 0.3), (2e-2, 0.6))]
    assert rates.best_rate(rows, "ffa") == 2e-2
    assert rates.best_rate(rows, "fedex") is None


def test_a_language_model_has_no_part_in_the_rate_of_those_that_read_and_equals_go_low() -> None:
    rows = [tried("ffa", 1e-2, 0.8), tried("ffa", 5e-3, 0.8)]
    rows += [tried("ffa", 1e-2, 0.8, factor=rates.WRITES), tried("ffa", 5e-3, 0.1, factor="iid")]
    rows += [tried("ffa", 1e-2, 0.1, factor="iid")]
    assert rates.best_rate(rows, "ffa") == 5e-3


def test_a_verdict_is_paired_seed_by_seed_with_the_reference_at_the_same_ranks() -> None:
    runs = [*rates.verdict(NAMES)]
    for seed in SEEDS_OF_VERDICT:
        mine = [(r["strategy"], r["factor"]) for r in runs if r["seed"] == seed]
        assert mine == [(REFERENCE, ""), (REFERENCE, "rank 8"), ("fedavg", ""), ("ffa", "")]
    assert [r["seed"] for r in runs] == sorted(r["seed"] for r in runs)


def test_the_full_setting_is_run_for_some_strategies_at_every_rate() -> None:
    runs = {(r["strategy"], r["lr"]) for r in rates.order([*FULL])}
    assert runs == {*itertools.product(FULL, RATES)}


def test_a_line_that_was_cut_short_is_run_again(tmp_path: Path) -> None:
    row = tried("ffa", 1e-2, 0.5)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    assert short_runs.read(path) == [row]


def test_a_row_that_a_plan_names_twice_is_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Row] = []

    def run_one(row: Row, home: Path, changes: Any) -> Row:
        ran.append(row)
        return row

    monkeypatch.setattr(short_runs, "run_one", run_one)
    first, second = tried("ffa", 1e-2, 0.5), tried("ffa", 2e-2, 0.5)
    short_runs.run_missing(lambda _: iter([first, second, first]), tmp_path / "rows.jsonl", 1.0)
    assert ran == short_runs.read(tmp_path / "rows.jsonl") == [first, second]


# -- the verdict -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gaps", "word"),
    [([0.0] * 9 + [0.01], "passes"), ([0.05, 0.06, 0.055], "fails"), ([0.0, 0.04], "inconclusive"),
     ([0.019, 0.0195, 0.0199], "inconclusive"), ([-0.1, -0.1, -0.09], "passes")],
)  # fmt: skip
def test_a_verdict_is_the_word_of_the_one_sided_end(gaps: list[float], word: str) -> None:
    found = verdict.judged(gaps)
    assert found.word == word
    test = stats.ttest_1samp(gaps, verdict.MARGIN, alternative="less")  # equal to the upper end
    assert (test.pvalue < 0.05) == (word == "passes")
    assert found.high == pytest.approx(
        float(stats.ttest_1samp(gaps, 0.0, alternative="less").confidence_interval(0.95).high)
    )


def test_the_power_is_how_often_a_strategy_one_point_below_passes() -> None:
    n, sd = 10, 0.014
    drawn = np.random.default_rng(0).normal(verdict.TRUE, sd, (4000, n))
    passed = [verdict.judged(x).word == "passes" for x in drawn[:400].tolist()]
    half = stats.t.ppf(0.95, n - 1) * drawn.std(axis=1, ddof=1) / n**0.5
    share = float((drawn.mean(axis=1) + half < verdict.MARGIN).mean())
    assert verdict.power(sd, n) == pytest.approx(share, abs=0.03)
    assert verdict.power(sd, n) == pytest.approx(np.mean(passed), abs=0.08)


def test_gaps_are_of_seeds_that_both_have_at_the_defaults_of_now() -> None:
    def row(name: str, seed: int, accuracy: float, factor: str = "", lr: float = 0.0) -> Row:
        lr = lr or rates.default(name)
        return {"stage": "verdict", "setting": "short", "data": "trec", "strategy": name,
                "lr": lr, "seed": seed, "factor": factor, "accuracy": accuracy}  # fmt: skip

    a, b, c, other = (*SEEDS_OF_VERDICT[:3], 1)
    rows = [row("fedex", a, 0.9), row("fedex", b, 0.8), row("fedex", a, 0.7, "rank 8"),
            row("ffa", b, 0.75), row("ffa", a, 0.85), row("ffa", c, 0.1),
            row("ffa", a, 0.2, lr=0.3), row("fedavg", a, 0.6),
            row("fedex", other, 0.9), row("ffa", other, 0.1)]  # fmt: skip
    assert verdict.gaps(rows, "ffa") == pytest.approx([0.05, 0.05])
    assert verdict.gaps(rows, "fedavg") == pytest.approx([0.1])


def test_there_is_no_verdict_before_all_seeds_are_run() -> None:
    def rows(seeds: tuple[int, ...]) -> list[Row]:
        return [{"stage": "verdict", "setting": "short", "data": "trec", "strategy": name,
                 "lr": rates.default(name), "seed": seed, "factor": "", "accuracy": 0.8}
                for name in (REFERENCE, "flora") for seed in seeds]  # fmt: skip

    assert set(verdict.verdicts(rows(SEEDS_OF_VERDICT))) == {"flora"}
    assert not verdict.verdicts(rows(SEEDS_OF_VERDICT[:-1]))
