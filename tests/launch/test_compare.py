"""`fedlora compare`: the grid, its table, and that it goes on where it was."""

import csv
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from fedlora.errors import CompareError, ConfigError, FedLoraError
from fedlora.launch.compare import run as compare
from fedlora.launch.compare.difference import compared
from fedlora.launch.compare.experiment import (
    FRESH_SEEDS,
    SEARCH_SEED,
    Cell,
    Experiment,
    cells,
    chosen,
    trials,
)
from fedlora.launch.compare.row import Row, once, row
from fedlora.launch.compare.table import as_csv, as_html, as_markdown, target_of
from fedlora.launch.experiment_file import load
from fedlora.reports.html import interval
from fedlora.strategies import STRATEGIES
from tests.reports.test_report import change, make_run
from tests.support.tiny_federation import Ran

Settings = Callable[..., dict[str, object]]
GRIDS = [
    "many-clients", "mixed-ranks", "label-skew", "exact-vs-averaged", "bytes", "legend", "attacks",
    "adaptive",
]  # fmt: skip


def experiment(tmp_path: Path, settings: dict[str, object], **table: object) -> Path:
    path = tmp_path / "tiny.toml"
    given = {k: v for k, v in settings.items() if k not in ("run.out", "run.name")}
    path.write_text("# Claim: it runs.\n\n" + tomli_w.dumps({**given, "compare": table}))
    return path


# -- the shipped experiments --------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_every_shipped_experiment_says_its_claim_and_every_cell_of_it_is_a_valid_config(
    name: str,
) -> None:
    found = Experiment.load(name)
    assert "Claim under test" in found.claim
    for full in (False, True):
        names = chosen(None, found)
        grid = cells(found, names, found.seeds, {}, Path("x"), full)
        assert len(grid) == len(names) * len(found.seeds) * len(found.variants)
        for cell in grid:
            if cell.strategy == "fedsa" and "robust.method" in cell.given:
                with pytest.raises(ConfigError, match="fedsa keeps a factor on its clients"):
                    load(found.path, cell.given)
                continue
            if name == "mixed-ranks" and cell.strategy in ("fedavg", "lora-fair", "frlora"):
                with pytest.raises(ConfigError, match=r"one rank for all|one B for all"):
                    load(found.path, cell.given)
                continue
            config = load(found.path, cell.given)
            assert (config.strategy.name, config.run.seed) == (cell.strategy, cell.seed)


def test_an_experiment_with_a_compare_table_is_a_config_file_still() -> None:
    assert load("legend").devices.classes


# -- what is asked for ----------------------------------------------------------------------------


def test_all_means_every_strategy_and_names_are_checked() -> None:
    found = Experiment.load("bytes")
    assert chosen("all", found) == list(STRATEGIES)
    assert chosen("ffa, fedex", found) == ["ffa", "fedex"]
    with pytest.raises(ConfigError, match="fedx is none of fedavg"):
        chosen("fedx", found)


def test_an_experiment_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"nor one of.*legend"):
        Experiment.load("nothing")


def test_a_key_that_compare_has_not_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[compare]\nstrategy = 1\n")
    with pytest.raises(ConfigError, match=r"compare\.strategy: must be one of"):
        Experiment.load(str(path))


def test_what_the_command_sets_goes_over_the_strategy_over_the_variant_over_full(
    tmp_path: Path, settings: Settings
) -> None:
    path = experiment(
        tmp_path, settings(), full={"run.rounds": 9, "train.lr": 1.0, "lora.alpha": 1.0},
        variants={"v": {"train.lr": 2.0, "lora.alpha": 2.0}}, set={"fedex": {"lora.alpha": 3.0}},
    )  # fmt: skip
    found = Experiment.load(str(path))
    (cell,) = cells(found, ["fedex"], [0], {"train.batch-size": 4}, tmp_path, True)
    config = load(path, cell.given)
    assert (config.run.rounds, config.train.lr, config.lora.alpha) == (9, 2.0, 3.0)
    assert config.train.batch_size == 4


def test_a_variant_has_keys_of_its_own_for_one_strategy(tmp_path: Path, settings: Settings) -> None:
    path = experiment(
        tmp_path, settings(), set={"ffa": {"train.lr": 3.0, "lora.alpha": 3.0}},
        variants={
            "v": {"train.lr": 2.0, "set": {"ffa": {"train.lr": 4.0}}}, "w": {"train.lr": 1.0},
        },
    )  # fmt: skip
    found = Experiment.load(str(path))
    grid = cells(found, ["ffa", "fedex"], [0], {}, tmp_path, False)
    rates = {c.name: load(path, c.given).train.lr for c in grid}
    assert rates == {"v ffa seed 0": 4, "v fedex seed 0": 2, "w ffa seed 0": 3, "w fedex seed 0": 1}


def test_keys_of_a_strategy_that_is_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    for where in ("set", "variants.v.set"):
        path.write_text(f"[compare.{where}.fda]\n'train.lr' = 1.0\n")
        with pytest.raises(ConfigError, match=rf"compare\.{where}\.fda: must be one of fedavg"):
            Experiment.load(str(path))


def test_a_set_that_would_make_two_variants_one_is_refused(
    tmp_path: Path, settings: Settings
) -> None:
    variants = {"few": {"clients.count": 2}, "many": {"clients.count": 3}}
    found = Experiment.load(str(experiment(tmp_path, settings(), variants=variants)))
    with pytest.raises(ConfigError, match=r"clients\.count: variants few and many .* would be one"):
        cells(found, ["ffa"], [0], {"clients.count": 5}, tmp_path, False)


def test_the_quick_size_has_strategies_and_keys_of_its_own_and_one_seed() -> None:
    found = Experiment.load("attacks").small()
    assert chosen(None, found) == ["fedavg", "fedex"]
    grid = cells(found, ["fedex"], found.seeds, {}, Path("x"), True)
    assert [(c.seed, c.hostile) for c in grid] == [
        (0, x) for x in ("", "", "flipped", "flipped", "labels", "labels")
    ]
    assert {load(found.path, c.given).data.limit for c in grid} == {1500}
    with pytest.raises(ConfigError, match=r"--quick: bytes\.toml has no \[compare\.quick\]"):
        Experiment.load("bytes").small()


def test_an_attack_and_a_base_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[compare.variants.v]\nhostile = "flip"\n')
    with pytest.raises(ConfigError, match=r"variants\.v\.hostile: must be one of flipped, labels"):
        Experiment.load(str(path))
    path.write_text('[compare]\nbase = "w"\n[compare.variants.v]\n')
    with pytest.raises(ConfigError, match=r"compare\.base = 'w': must be one of the variants"):
        Experiment.load(str(path))


# -- a whole grid ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grid_with_a_cell_that_died_says_so_and_is_no_success(
    tmp_path: Path, settings: Settings
) -> None:
    """The first strategy's too, which alone measures baselines."""
    given = settings(
        **{"run.rounds": 1, "train.steps": 1, "clients.count": 2, "data.label": "none"}
    )
    path = experiment(tmp_path, given, strategies=["fedex"], seeds=[0])
    with pytest.raises(CompareError, match=r"(?s)1 of 1 cells .*fedex.*data.label = \"none\".*log"):
        compare.main(str(path), None, None, {}, "rounds", tmp_path / "out", False, 1)
    assert "no such column" in (tmp_path / "out" / "table.md").read_text()


def test_baselines_that_the_experiment_does_not_want_are_not_measured(
    tmp_path: Path, settings: Settings
) -> None:
    path = experiment(tmp_path, settings(), strategies=["fedex", "ffa"], seeds=[0])
    found = Experiment.load(str(path))
    for wanted, first in ((False, False), (True, True)):
        over = {"evaluate.baselines": wanted}
        grid = cells(found, ["fedex", "ffa"], [0], over, tmp_path, False)
        assert [c.given["evaluate.baselines"] for c in grid] == [first, False]


def test_the_baselines_are_measured_by_the_first_cell_of_a_seed_that_can_run(
    tmp_path: Path, settings: Settings
) -> None:
    path = experiment(tmp_path, settings(), strategies=["fedavg"], seeds=[0, 1])
    found = Experiment.load(str(path))
    over = {"evaluate.baselines": True, "clients.ranks": "2,3"}  # which fedavg refuses
    grid = cells(found, ["fedavg", "fedex", "fslora"], [0, 1], over, tmp_path, False)
    measured = [(c.strategy, c.seed) for c in grid if c.given["evaluate.baselines"]]
    assert measured == [("fedavg", 0), ("fedex", 0), ("fedavg", 1), ("fedex", 1)]


def test_a_grid_writes_one_table_with_results_refusals_and_plots_and_goes_on_where_it_was(
    tmp_path: Path, settings: Settings
) -> None:
    path = experiment(
        tmp_path,
        settings(**{"run.rounds": 2, "train.steps": 1, "clients.count": 3}),
        strategies=["fedex", "fedavg"],
        seeds=[0],
        set={"fedex": {"train.optimizer": "sgd"}},
    )
    out = tmp_path / "out"

    def go(**more: object) -> None:
        compare.main(str(path), None, None, {}, "rounds", out, False, 2)

    go()
    with (out / "table.csv").open() as f:
        table = {r["strategy"]: r for r in csv.DictReader(f)}
    assert 0 <= float(table["fedex"]["mean"]) <= 1
    assert float(table["fedex"]["up"]) > 0
    assert float(table["fedex"]["deviation"]) < 2e-5
    assert "one rank for all" in table["fedavg"]["refused"]
    markdown = (out / "table.md").read_text()
    assert "Claim: it runs." in markdown
    lr = load(path, {"strategy.name": "fedex"}).train.lr
    assert f"| fedex | exact | {lr:g} (set) | 1 |" in markdown
    assert "fedavg: fedavg averages factors" in markdown
    page = (out / "table.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((out / "plots").glob("*.png"))) >= 3
    summary = out / "cells" / "all" / "fedex" / "seed-0" / "summary.json"
    written = summary.stat().st_mtime_ns
    begun = list((out / "cells/all/fedavg").glob("seed-0/checkpoint"))
    assert begun == []  # refused before round 1
    found = Experiment.load(str(path))
    grid = cells(found, ["fedex"], [0], {}, out, False)
    compare.run(found, grid, 1, lambda _: None)
    assert summary.stat().st_mtime_ns == written
    other = cells(found, ["fedex"], [0], {"train.lr": 0.1}, out, False)
    with pytest.raises(FedLoraError, match=r"another train\.lr .*another --out"):
        compare.run(found, other, 1, lambda _: None)


@pytest.mark.slow
def test_a_variant_may_have_a_client_that_means_harm_and_is_held_against_one_without(
    tmp_path: Path, settings: Settings
) -> None:
    """fedex promises (E), and its certificate holds: the liar measures what it sends."""
    path = experiment(
        tmp_path, settings(**{
            "run.rounds": 2, "train.steps": 2, "clients.count": 4, "round.norm-bound": 0.0,
        }), strategies=["fedex"], seeds=[0], base="clean",
        variants={"clean": {}, "flipped": {"hostile": "flipped"}, "labels": {"hostile": "labels"}},
    )  # fmt: skip
    out = tmp_path / "out"
    compare.main(str(path), None, None, {}, "rounds", out, False, 1)
    rounds = {
        name: Ran(out / f"cells/{name}/fedex/seed-0").rounds
        for name in ("clean", "flipped", "labels")
    }
    claims = {n: [r["clients"]["1"]["examples"] for r in found[1:]] for n, found in rounds.items()}
    assert claims["flipped"] == [1600, 1600] != claims["clean"] == claims["labels"]
    for found in rounds.values():
        assert all(r["accepted"] == [0, 1, 2, 3] for r in found[1:])
        assert all(r["certificate"]["excess"] <= 1 for r in found[1:])
    ends = {n: found[-1]["evaluation"]["loss"] for n, found in rounds.items()}
    assert len({*ends.values()}) == 3
    assert ends["flipped"] > ends["clean"]
    with (out / "table.csv").open() as f:
        against = {r["variant"]: r["against_first"] for r in csv.DictReader(f)}
    assert against["clean"] == ""
    assert against["flipped"].startswith(("+", "-"))
    assert "less clean's" in (out / "table.md").read_text()


def test_equal_bytes_gives_each_strategy_the_rounds_that_its_bytes_allow(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiment(tmp_path, settings(**{"run.rounds": 10}))
    found = Experiment.load(str(path))
    grid = cells(found, ["fedex", "ffa", "flora"], [0, 1], {}, tmp_path / "out", False)
    bytes_ = {"fedex": (100, 100), "ffa": (300, 10), "flora": (150, 250)}

    def fake(_: object, given: list[Cell], *__: object) -> None:
        for cell in given:
            cell.directory.mkdir(parents=True)
            first, second = bytes_[cell.strategy]
            sizes = enumerate((0, first, second))
            lines = [{"round": r, "bytes": {"up": n, "down": 0}} for r, n in sizes]
            (cell.directory / "rounds.jsonl").write_text("\n".join(map(json.dumps, lines)))
            (cell.directory / "summary.json").write_text("{}")

    monkeypatch.setattr(compare, "run", fake)
    compare.equal_bytes(found, grid, 1, lambda _: None)
    rounds = {c.strategy: c.given["run.rounds"] for c in grid}
    assert rounds == {"fedex": 10, "ffa": 40, "flora": 4}  # ffa is held at four times the rounds


@pytest.mark.slow
def test_search_gives_each_row_the_value_that_it_scores_best_with(
    tmp_path: Path, settings: Settings
) -> None:
    path = experiment(
        tmp_path,
        settings(**{"run.rounds": 3, "clients.count": 2, "clients.ranks": [2]}),
        strategies=["fedavg", "ffa"], seeds=[0], search={"train.lr": [1e-9, 3e-2]},
    )  # fmt: skip
    out = tmp_path / "out"
    compare.main(str(path), None, None, {}, "rounds", out, False, 2)
    with (out / "table.csv").open() as f:
        table = {r["strategy"]: r for r in csv.DictReader(f)}
    for name in ("fedavg", "ffa"):
        tried = [json.loads((out / f"search/all/{name}/train.lr={value}/summary.json").read_text())
                 for value in (1e-9, 3e-2)]  # fmt: skip
        logs = {x.name for x in (out / f"search/all/{name}").glob("*.log") if "seed" not in x.name}
        assert logs == {"train.lr=1e-09.log", "train.lr=0.03.log"}, "a log of its own for each"
        low, high = (t["validation"]["accuracy"] for t in tried)
        assert [t["final"] for t in tried] == [None, None], "a search scores no test row"
        again = {x.name for x in (out / f"search/all/{name}").glob("*seed=*") if x.is_dir()}
        assert len(again) == 4, "the two of them on two fresh seeds"
        fresh = {value: statistics.fmean(
            json.loads((out / f"search/all/{name}/train.lr={value},seed={s}/summary.json")
                       .read_text())["validation"]["accuracy"] for s in FRESH_SEEDS
        ) for value in (1e-9, 3e-2)}  # fmt: skip
        best = 3e-2 if (fresh[3e-2], high > low) > (fresh[1e-9], high <= low) else 1e-9
        assert [t["rounds"] for t in tried] == [2, 2], "half of three, rounded up"
        assert float(table[name]["train.lr"]) == best
        cell = load(out / f"cells/all/{name}/seed-0/config.toml")
        assert (cell.train.lr, cell.run.rounds) == (best, 3)
    markdown = (out / "table.md").read_text()
    assert "| strategy | promise | train.lr |" in markdown
    assert "of 1e-09, 0.03 which scored best" in markdown
    assert "At an end of these, so more might be had: fedavg, ffa." in markdown


def test_a_key_that_the_command_sets_is_not_searched(tmp_path: Path, settings: Settings) -> None:
    search: dict[str, object] = {"train.lr": [1.0, 2.0]}
    found = Experiment.load(str(experiment(tmp_path, settings(), search=search)))
    grid = cells(found, ["ffa"], [0], {"train.lr": 3.0}, tmp_path, False)
    compare.search(found, grid, {"train.lr": 3.0}, tmp_path, 1, lambda _: pytest.fail("searched"))
    assert (grid[0].searched, grid[0].given["train.lr"]) == ({}, 3.0)


def test_the_seed_of_the_search_is_refused_to_the_grid(tmp_path: Path, settings: Settings) -> None:
    found = Experiment.load(str(experiment(tmp_path, settings(), search={"train.lr": [1.0]})))
    grid = cells(found, ["ffa"], [SEARCH_SEED], {}, tmp_path, False)
    with pytest.raises(ConfigError, match=r"--seeds 1000: .* take another"):
        compare.search(found, grid, {}, tmp_path, 1)


def test_values_to_search_must_be_a_list(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[compare.search]\n'train.lr' = 1.0\n")
    with pytest.raises(ConfigError, match=r"compare\.search\.train\.lr = 1\.0: must be a list"):
        Experiment.load(str(path))


# -- the table's numbers ---------------------------------------------------------------------------


def test_the_interval_is_student_s() -> None:
    assert interval([1.0]) is None
    assert interval([0.0, 1.0, 2.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)  # s = 1
    assert interval([float(n) for n in range(40)]) == pytest.approx(3.739, rel=1e-3)


def test_once_is_what_a_client_is_sent_only_the_first_time() -> None:
    rounds = [
        {"round": 0, "bytes": {"down": 7, "up": 100}},
        {"round": 1, "clients": {"0": {"bytes_down": 50}}, "bytes": {"down": 50, "up": 9}},
        {"round": 2, "clients": {"0": {"bytes_down": 20}, "1": {"bytes_down": 50}}},
        {"round": 3, "clients": {"0": {"bytes_down": 20}, "1": {"bytes_down": 60}}},
    ]
    assert once(rounds) == 30 + 107
    assert once(rounds[1:]) == 30


def test_the_target_is_one_that_all_meet() -> None:
    rows = [Row("", "a", "exact", score=[0.8, 0.6]), Row("", "b", "exact", score=[0.5])]
    assert target_of(rows) == pytest.approx(0.475)
    assert target_of([]) is None
    assert row("", "a", "exact", [], "why").reason == "why"


def test_a_difference_is_taken_seed_by_seed_and_so_is_its_interval() -> None:
    """Seeds that differ by 20 points for both strategies say nothing against a steady 2 points."""
    first = Row("", "fedavg", "approximate", score=[0.5, 0.6, 0.7])
    better = Row("", "fedex", "exact", score=[0.52, 0.621, 0.719])
    other = Row("x", "fedavg", "approximate", score=[0.1, 0.2, 0.3])
    fewer = Row("", "flora", "exact", score=[0.9, 0.9])
    assert compared([first, better, fewer, other]) == "fedavg"
    assert (first.against, fewer.against, other.against) == ("", "", ""), "nothing to pair with"
    assert better.against == "+2.0 +- 0.2"
    assert better.half is not None
    assert better.half > 0.2


def test_with_a_base_a_difference_is_from_the_same_strategy_under_it() -> None:
    found = [
        Row("clean", "a", "exact", runs=[None, None], score=[0.5, 0.7]),
        Row("clean", "b", "exact", runs=[None, None], score=[0.1, 0.1]),
        Row("bad", "a", "exact", runs=[None, None], score=[0.4, 0.6]),
        Row("bad", "b", "exact", runs=[None, None], score=[0.3, 0.3]),
    ]
    assert compared(found, "clean") == "clean"
    assert [r.against for r in found] == ["", "", "-10.0 +- 0.0", "+20.0 +- 0.0"]
    one = [Row("clean", "a", "", score=[0.5]), Row("bad", "a", "", score=[0.4])]
    compared(one, "clean")
    assert one[1].against == "-10.0"  # of one seed there is no interval


def test_variants_of_one_strategy_are_compared_with_the_first_variant() -> None:
    rows = [Row(v, "fedex", "exact", score=s) for v, s in (("a", [0.5, 0.6]), ("b", [0.4, 0.5]))]
    assert compared(rows) == "a"
    assert rows[1].against == "-10.0 +- 0.0"


# -- what speaks against a run ---------------------------------------------------------------------


def test_a_row_with_a_run_that_came_to_nothing_is_marked_with_the_reason_and_no_other_is(
    tmp_path: Path,
) -> None:
    why = "The final accuracy, 16.0%, is no better than: majority class 23.0%."
    runs = [make_run(tmp_path / name, clients=3, rounds=1) for name in ("a", "b", "c")]
    change(runs[1], lambda *run: run[2].update(warnings=[why], seed=8))
    bad, well = row("v", "ffa", "exact", runs[:2]), row("v", "fedex", "exact", runs[2:])
    assert bad.warnings == [f"seed 8: {why}"]
    assert well.warnings == []
    markdown = as_markdown("t", "claim", [bad, well], "command", None)
    lines = {name: next(x for x in markdown.splitlines() if f"| {name} |" in x)
             for name in ("ffa", "fedex")}  # fmt: skip
    assert "(!) |" in lines["ffa"]
    assert "(!)" not in lines["fedex"]
    assert f"Marked (!):\n\n- v ffa, seed 8: {why}\n" in markdown
    page = as_html("t", "claim", [bad, well], "command", None, {})
    assert page.count('<td class="bad">') == 1
    assert f"<li>v ffa, seed 8: {why}</li>" in page
    first, second = csv.DictReader(as_csv([bad, well]).splitlines())
    assert (first["warnings"], second["warnings"]) == (f"seed 8: {why}", "")
    assert "Marked" not in as_markdown("t", "claim", [well], "command", None)
    assert "Marked" not in as_html("t", "claim", [well], "command", None, {})


def test_a_search_stands_by_validation_rows_where_there_are_any(tmp_path: Path) -> None:
    """The test scores say the opposite; they count only where there are no others."""

    def standing(name: str, summary: dict[str, object]) -> float:
        cell = Cell("", "fedavg", 1000, tmp_path / name)
        cell.directory.mkdir()
        (cell.directory / "summary.json").write_text(json.dumps(summary))
        return compare._standing(cell)

    low = standing("low", {"validation": {"accuracy": 0.4}, "final": {"accuracy": 0.9}})
    high = standing("high", {"validation": {"accuracy": 0.6}, "final": {"accuracy": 0.1}})
    assert (low, high) == (0.4, 0.6)
    assert standing("test", {"final": {"loss": 0.5}}) == -0.5
    assert standing("none", {"final": None}) == -math.inf


def test_a_search_takes_validation_rows_and_leaves_the_test_alone(
    tmp_path: Path, settings: Settings
) -> None:
    found = Experiment.load(str(experiment(tmp_path, settings(), search={"train.lr": [1.0]})))
    grid = cells(found, ["fedex"], [0], {}, tmp_path, False)
    ((trial,),) = trials(found, grid, found.search, tmp_path).values()
    assert (trial.given["data.validation-size"], trial.given["evaluate.every"]) == (0.1, 0)
    own = {"data.validation-size": 7}
    grid = cells(found, ["fedex"], [0], own, tmp_path, False)
    ((trial,),) = trials(found, grid, found.search, tmp_path).values()
    assert (trial.given["data.validation-size"], trial.given["evaluate.every"]) == (7, 0)
