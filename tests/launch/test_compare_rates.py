"""`fedlora compare` at which rates, by which luck a winner is named, and what p-values say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from scipy import stats

from fedlora.errors import ConfigError
from fedlora.launch.compare import run as compare
from fedlora.launch.compare.difference import compared, holm, paired_p
from fedlora.launch.compare.experiment import (
    BEST,
    FRESH_SEEDS,
    Cell,
    Experiment,
    again,
    cells,
    trials,
)
from fedlora.launch.compare.row import Row, row
from fedlora.launch.compare.table import as_csv, as_markdown, idle
from fedlora.launch.experiment_file import load
from fedlora.strategies import list_strategies
from fedlora.strategies.defaults import defaults_of, rate
from tests.reports.test_report import change, make_run

Settings = Callable[..., dict[str, object]]


def experiment(tmp_path: Path, settings: dict[str, object], **table: object) -> Experiment:
    path = tmp_path / "tiny.toml"
    given = {k: v for k, v in settings.items() if k not in ("run.out", "run.name")}
    path.write_text(tomli_w.dumps({**given, "compare": table}))
    return Experiment.load(str(path))


def default(name: str) -> float:
    own = defaults_of(list_strategies()[name])
    return rate(own, "classification", "lora", "classification")[0]


# -- at which rates --------------------------------------------------------------------------------


def test_a_grid_is_at_each_strategys_own_default_whatever_the_file_says(
    tmp_path: Path, settings: Settings
) -> None:
    found = experiment(
        tmp_path, settings(**{"train.lr": 0.3}), set={"ffa": {"train.lr": 0.7, "lora.alpha": 3.0}},
        variants={"v": {"train.lr": 0.8, "set": {"ffa": {"train.lr": 0.9}}}},
        search={"train.lr": [1.0, 2.0]},
    )  # fmt: skip
    own = found.at_rates(["own"])
    assert own.search == {}
    for cell in cells(own, ["fedex", "ffa", "fedsb"], [0], {}, tmp_path, False):
        config = load(own.path, cell.given)
        assert config.train.lr == default(cell.strategy)
        assert cell.variant == "v"
        if cell.strategy == "ffa":
            assert config.lora.alpha == 3.0


def test_a_common_rate_stands_beside_each_strategys_own(tmp_path: Path, settings: Settings) -> None:
    found = experiment(tmp_path, settings(), base="v", variants={"v": {}, "w": {"lora.alpha": 1.0}})
    both = found.at_rates(["own", 0.04])
    grid = cells(both, ["fedsb"], [0], {}, tmp_path, False)
    rates = {c.variant: load(both.path, c.given).train.lr for c in grid}
    own = default("fedsb")
    assert rates == {"v own rate": own, "w own rate": own, "v lr 0.04": 0.04, "w lr 0.04": 0.04}
    assert both.base == "v own rate"
    assert len({c.directory for c in grid}) == 4
    assert found.at_rates([]) is found


def test_the_table_says_which_rate_a_row_has(tmp_path: Path) -> None:
    def made(name: str, **config: object) -> Row:
        found = row("", name, "exact", [make_run(tmp_path / name, clients=2, rounds=1)])
        found.runs = [replace(r, config={**r.config, **config}) for r in found.runs]
        return found

    record = {"run.defaults": ["ffa", "train.lr=0.02"]}
    rows = [made("ffa", **{"train.lr": 0.02, **record}),
            made("fedex", **{"train.lr": 0.03, "run.defaults": []}),
            made("fedsb", **{"train.lr": 0.03, "run.defaults": []})]  # fmt: skip
    rows[2].searched = {"train.lr": 0.03}
    assert [r.rate for r in rows] == ["0.02 (own)", "0.03 (set)", "0.03 (searched)"]
    text = as_markdown("t", "claim", rows, "command", None, {"train.lr": [0.03, 0.1]})
    for r in rows:
        assert f"| {r.strategy} | exact | {r.rate} |" in text
        assert r.rate in as_csv(rows)
    assert Row("", "ffa", "exact").rate == "-"


@pytest.mark.parametrize("text", ["owns", "", "0", "-1", "own,own", "0.1,0.10", "inf", "nan"])
def test_rates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        compare.parse_rates(text)


def test_rates_and_a_set_of_the_rate_are_refused_together(
    tmp_path: Path, settings: Settings
) -> None:
    path = str(experiment(tmp_path, settings()).path)
    with pytest.raises(ConfigError, match="leave one out"):
        compare.main(path, None, None, {"train.lr": 1.0}, "rounds", tmp_path, False, 1, False,
                     compare.parse_rates("own,0.004"))  # fmt: skip


def test_rates_in_the_file_are_checked(tmp_path: Path, settings: Settings) -> None:
    assert experiment(tmp_path, settings(), rates=["own", 0.1]).rates == ["own", 0.1]
    with pytest.raises(ConfigError, match=r"compare\.rates"):
        experiment(tmp_path, settings(), rates=["mine"])


# -- no winner's curse -----------------------------------------------------------------------------


def test_a_winner_is_named_by_fresh_seeds_alone(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value that was best by its luck on the first seed is not the one that stays best."""
    found = experiment(tmp_path, settings(), search={"train.lr": [1.0, 2.0, 3.0]})
    grid = cells(found, ["ffa"], [0], {}, tmp_path, False)
    (tried,) = trials(found, grid, found.search, tmp_path).values()
    scores = {(1.0, 1000): 0.9, (2.0, 1000): 0.8, (3.0, 1000): 0.1, (1.0, 1001): 0.5,
              (1.0, 1002): 0.6, (2.0, 1001): 0.7, (2.0, 1002): 0.6, (3.0, 1001): 1.0}  # fmt: skip

    def standing(cell: Cell) -> float:
        return scores[cell.searched["train.lr"], cell.seed]

    fresh = again(tried, standing)
    assert [(c.searched["train.lr"], c.seed) for c in fresh] == [
        (lr, seed) for lr in (1.0, 2.0) for seed in FRESH_SEEDS
    ]
    assert len(fresh) == BEST * len(FRESH_SEEDS)
    for cell in fresh:
        config = load(found.path, cell.given)
        assert (config.run.seed, config.train.lr) == (cell.seed, cell.searched["train.lr"])
    assert len({c.directory for c in [*tried, *fresh]}) == 7
    monkeypatch.setattr(compare, "_standing", standing)
    assert compare.winner(fresh).searched == {"train.lr": 2.0}
    assert compare.winner(tried).searched == {"train.lr": 1.0}
    assert again(tried[:1], standing) == []


# -- what learned nothing --------------------------------------------------------------------------


def test_a_row_is_held_against_the_baselines_of_all_seeds_in_the_mean(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / n, clients=2, rounds=1) for n in ("a", "b", "c", "d")]
    for run, value in zip(runs, (0.4, 0.8, 0, 0), strict=True):  # of two seeds: .6 in the mean
        bars = {"majority class": {"accuracy": value}} if value else {}
        change(run, lambda *of, bars=bars: of[2].update(baselines=bars))
    rows = [row("", "x", "exact", runs[:2]), row("", "y", "exact", runs[2:])]
    rows[0].score, rows[1].score = [0.5, 0.6], [0.6, 0.61]
    idle(rows)
    assert [r.idle for r in rows] == ["learned nothing: no better than majority class 60.0%", ""]
    assert "Baselines, in the mean of their seeds: majority class 60.0%." in as_markdown(
        "t", "claim", rows, "command", None
    )


@pytest.mark.parametrize("key", ["privacy.epsilon", "privacy.noise-multiplier"])
def test_a_row_under_privacy_is_not_held_against_a_head_that_had_none(
    tmp_path: Path, key: str
) -> None:
    runs = [make_run(tmp_path / n, clients=2, rounds=1) for n in ("a", "b")]
    bars = {"majority class": {"accuracy": 0.3}, "trained head only": {"accuracy": 0.9}}
    change(runs[0], lambda *of: of[2].update(baselines=bars))
    change(runs[1], lambda *of: of[2].update(baselines={}))
    rows = [row("", n, "exact", [run]) for n, run in zip("xy", runs, strict=True)]
    rows[1].runs = [replace(x, config={**x.config, key: 2.0}) for x in rows[1].runs]
    rows[0].score, rows[1].score = [0.6], [0.6]
    idle(rows)
    assert [r.idle for r in rows] == ["learned nothing: no better than trained head only 90.0%", ""]
    rows[1].score = [0.2]
    idle(rows)
    assert rows[1].idle == "learned nothing: no better than majority class 30.0%"


def test_a_row_no_better_than_the_tables_baselines_is_marked_though_its_own_runs_have_none(
    tmp_path: Path,
) -> None:
    runs = [make_run(tmp_path / n, clients=2, rounds=1) for n in ("a", "b", "c")]
    bars = {"majority class": {"accuracy": 0.4}, "TF-IDF": {"accuracy": 0.99}}
    for run, own in zip(runs, (bars, {}, {}), strict=True):
        change(run, lambda *of, own=own: of[2].update(baselines=own))
    rows = [row("", name, "exact", [run]) for name, run in zip("xyz", runs, strict=True)]
    for r, score in zip(rows, (0.6, 0.4, 0.39), strict=True):
        r.score = [score]
    idle(rows)
    said = "learned nothing: no better than majority class 40.0%"
    assert [r.idle for r in rows] == ["", said, said]
    text = as_markdown("t", "claim", rows, "command", None)
    assert f"- y: {said}" in text
    assert "40.0% (!)" in text
    assert "60.0% (!)" not in text


# -- p-values --------------------------------------------------------------------------------------


def test_the_p_value_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7))
    assert paired_p([*(a - b)]) == pytest.approx(float(stats.ttest_rel(a, b).pvalue), rel=1e-12)
    assert paired_p([0.3]) is None
    assert (paired_p([0.0, 0.0]), paired_p([0.1, 0.1])) == (1.0, 0.0)


def test_holms_values_are_those_of_his_steps() -> None:
    """Reject the smallest while p_(i) <= level / (m - i + 1): the corrected value is the least
    level at which each is rejected."""
    ps = [0.01, 0.04, 0.03, 0.005, None, 0.9]

    def rejected(level: float) -> set[int]:
        ordered = sorted((p, n) for n, p in enumerate(ps) if p is not None)
        out = set()
        for i, (p, n) in enumerate(ordered):
            if p > level / (len(ordered) - i):
                break
            out.add(n)
        return out

    found = holm(ps)
    assert found == [pytest.approx(x) if x is not None else None
                     for x in (0.04, 0.09, 0.09, 0.025, None, 0.9)]  # fmt: skip
    for level in np.linspace(0.001, 0.999, 200):
        assert rejected(float(level)) == {n for n, p in enumerate(found) if p and p <= level}
    assert holm([]) == []


def test_among_equal_strategies_one_differs_in_five_tables_of_a_hundred_at_most() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(300):
        seeds = rng.normal(size=5)
        rows = [Row("", str(n), "", score=[*(seeds + rng.normal(size=5))]) for n in range(8)]
        compared(rows)
        wrong += any(r.p is not None and r.p < 0.05 for r in rows)
    assert wrong / 300 < 0.08
    assert rows[0].p is None


def test_a_difference_and_its_p_are_in_the_table() -> None:
    runs = [None, None, None]
    rows = [Row("", "a", "exact", runs=runs, score=[0.5, 0.6, 0.7]),
            Row("", "b", "exact", runs=runs, score=[0.52, 0.621, 0.719])]  # type: ignore[list-item]  # fmt: skip
    compared(rows)
    assert rows[1].p == pytest.approx(float(stats.ttest_rel(*(r.score for r in rows)).pvalue))
