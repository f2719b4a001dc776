"""What a strategy brings where a config says nothing, and what a user sets stays."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest

from benchmarks import form_rates, short_runs
from fedlora.config.origins import UNSET, origin, told
from fedlora.config.reader import Config
from fedlora.errors import StrategyError
from fedlora.launch.doctor.the_plan import crowded, far_off, few
from fedlora.launch.federation import Federation
from fedlora.reports import tables
from fedlora.strategies import (
    STRATEGIES,
    defaults,
    list_strategies,
    register_strategy,
    registry,
)
from fedlora.strategies.defaults import FAMILIES, OF_FORMS, RULES, Defaults, defaults_of, rate
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.forms import INITS
from fedlora.strategies.registry import Registry
from fedlora.testing.federation import make_clients, make_start
from tests.support.doc_tables import load as module
from tests.support.tiny_federation import ROOT

every = pytest.mark.parametrize("name", STRATEGIES)
pages = module(ROOT / "docs" / "write_rates.py", "docs_write_rates")
forms_page = module(ROOT / "docs" / "write_form_rates.py", "docs_write_form_rates")


@dataclass(frozen=True)
class Bold(FedAvg):
    defaults: ClassVar[Defaults] = Defaults({"classification": 0.04}, "orthogonal", 8.0)


@pytest.fixture
def bold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", Registry({}, []))
    register_strategy("bold", Bold)


# -- what is declared ------------------------------------------------------------------------------


@every
def test_every_strategy_declares_defaults_of_its_own_that_can_be(name: str) -> None:
    cls = STRATEGIES[name]
    assert "defaults" in vars(cls)
    assert defaults_of(cls).problems() == []
    assert defaults_of(cls).init in INITS


@every
@pytest.mark.parametrize("task", FAMILIES)
@pytest.mark.parametrize("form", ["lora", "vera"])
def test_every_rate_follows_a_named_rule(name: str, task: str, form: str) -> None:
    lr, rule = rate(defaults_of(STRATEGIES[name]), task, form, task)
    assert rule in RULES
    assert 0 < lr < 1
    given = {"strategy.name": name, "model.task": task, "lora.form": form}
    assert Config.read(given).train.lr == lr


def test_a_rate_is_the_forms_else_the_tasks_else_the_familys_that_was_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Defaults({"classification": 0.01, "classification/vera": 0.3})
    assert rate(own, "classification", "lora", "classification") == (0.01, "searched")
    assert rate(own, "classification", "vera", "classification") == (0.3, "searched")
    monkeypatch.setattr(defaults, "OF_FORMS", {"dora": 0.02, "vera": 0.2})
    assert rate(own, "classification", "dora", "classification") == (0.02, "of the form")
    assert rate(own, "regression", "vera", "classification") == (0.2, "of the form")
    assert rate(own, "classification", "alora", "classification") == (0.01, "as with lora")
    assert rate(Defaults({"causal-lm": 0.3}), "causal-lm", "vera", "causal-lm") == (
        0.3, "as with lora",
    )  # fmt: skip
    assert rate(own, "regression", "lora", "classification") == (0.01, "as in its family")
    usual = FAMILIES["causal-lm"]
    assert rate(own, "causal-lm", "lora", "causal-lm") == (usual, "of the task")
    assert rate(Defaults(), "causal-lm", "lora", "causal-lm") == (usual, "of the task")


@every
@pytest.mark.parametrize(("task", "settings"), [("classification", 9), ("causal-lm", 2)])
def test_a_searched_rate_is_that_of_the_least_worst_loss_in_the_committed_search(
    name: str, task: str, settings: int
) -> None:
    """Over all settings of the task, and its two neighbours were run in each of them, or had lost
    more in one. A task of which a setting was not run has no rate."""
    rows = [r for r in pages.read() if (r["strategy"], r["stage"]) == (name, "search")]
    of_task = [r for r in rows if ("causal-lm" in r["factor"]) == (task == "causal-lm")]
    table = pd.DataFrame([r for r in of_task if r["setting"] != "full"])
    scores = table.pivot_table("accuracy", ["data", "factor"], "lr")
    if len(scores) < settings:
        assert task not in defaults_of(STRATEGIES[name]).rates
        return
    losses = scores.rsub(scores.max(axis=1), axis=0).round(6)
    best = losses.max(axis=0, skipna=False).dropna().idxmin()
    assert defaults_of(STRATEGIES[name]).rates[task] == best
    grid = [5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0]
    grid = grid[2:7] if task == "classification" else grid
    at = grid.index(best)
    for lr in grid[max(0, at - 1) : at + 2]:
        assert losses[lr].notna().all() or losses[lr].max() > max(0.1, losses[best].max()), lr


@every
def test_a_rate_for_few_modules_is_that_of_the_settings_but_all_linear_modules(name: str) -> None:
    """By the same rule; declared where it is another."""
    rows = [r for r in pages.read() if (r["strategy"], r["stage"]) == (name, "search")]
    read = [r for r in rows if "causal-lm" not in r["factor"] and r["setting"] != "full"]
    table = pd.DataFrame([r for r in read if r["factor"] != "all linear modules"])
    scores = table.pivot_table("accuracy", ["data", "factor"], "lr")
    assert len(scores) == 8
    losses = scores.rsub(scores.max(axis=1), axis=0).round(6)
    best = losses.max(axis=0, skipna=False).dropna().idxmin()
    own = defaults_of(STRATEGIES[name])
    assert own.few == ({} if best == own.rates["classification"] else {"classification": best})
    grid = [2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
    at = grid.index(best)
    for lr in grid[max(0, at - 1) : at + 2]:
        assert losses[lr].notna().all() or losses[lr].max() > max(0.1, losses[best].max()), lr


@pytest.mark.parametrize(("modules", "few"), [(1, True), (12, True), (13, False), (400, False)])
def test_a_config_has_the_rate_for_few_modules_once_their_number_is_known(
    modules: int, few: bool
) -> None:
    for name, rates in (("fedex", (5e-3, 1e-2)), ("frlora", (2e-3, 1e-2)), ("ffa", (2e-2, 2e-2))):
        left = Config.read({"strategy.name": name})
        assert left.train.lr == rates[0]
        config = left.for_modules(modules)
        assert config.train.lr == rates[few]
        assert origin(config.run.defaults, "train.lr", config.train.lr) == f"from {name}'s defaults"
        assert config.for_modules(1) == config  # it is decided once
        again = Config.read(config.flat())
        assert again.for_modules(13 if few else 1) == again  # a saved one stays as it is
        assert Config.read(left.flat()).for_modules(modules) == config  # one that is still open
        assert Config.read({**left.flat(), "strategy.name": "ffa"}).for_modules(1).train.lr == 2e-2
        by_hand = Config.read({**left.flat(), "train.lr": 0.3})
        assert by_hand.for_modules(modules) == by_hand
    for more, expected in (
        ({"model.task": "regression"}, 1e-2),
        ({"lora.form": "alora", "lora.invocation": "x"}, 1e-2),
        ({"lora.form": "vera"}, OF_FORMS["vera"]), ({"train.optimizer": "sgd"}, 2e-3),
        ({"model.task": "seq2seq", "data.prompt": "p"}, FAMILIES["causal-lm"]),
        ({"train.lr": 5e-3}, 5e-3),
    ):  # fmt: skip
        own = Config.read({"strategy.name": "fedex", **more})
        assert own.for_modules(1).train.lr == expected


def test_under_example_level_privacy_the_number_of_modules_decides_nothing() -> None:
    given = {"privacy.level": "example", "privacy.epsilon": 3.0, "privacy.clip-norm": 1.0}
    config = Config.read({"strategy.name": "fedex", **given})
    assert config.for_modules(1) == config


@every
@pytest.mark.parametrize("task", ["seq2seq", "token-classification"])
def test_no_rate_of_another_kind_of_task_is_raised_by_what_was_found_for_classification(
    name: str, task: str
) -> None:
    lr = Config.read({"strategy.name": name, "model.task": task, "data.prompt": "p"}).train.lr
    assert lr == FAMILIES["causal-lm"]


@every
def test_a_page_says_what_its_strategy_declares_and_what_was_searched(name: str) -> None:
    """After a change: python docs/write_rates.py."""
    text = (ROOT / "docs" / "strategies" / f"{name}.md").read_text()
    assert pages.written(text, name, pages.read()) == text
    lr, rule = rate(defaults_of(STRATEGIES[name]), "classification", "lora", "classification")
    assert f"| `train.lr`, classification | {lr:g} | {RULES[rule]}" in text


def test_each_forms_rate_is_that_of_the_committed_search_and_the_page_says_so() -> None:
    """After a change: python docs/write_form_rates.py."""
    rows = short_runs.read(form_rates.RESULTS)
    tried = pd.DataFrame([r for r in rows if r["stage"] == "search"])
    head = tried[(tried.strategy == "head") & (tried.seed == 1000)].accuracy.item()
    for (name, form), mine in tried[tried.factor.isin(OF_FORMS)].groupby(["strategy", "factor"]):
        scores = mine.set_index("lr")["accuracy"]
        best = scores[scores >= scores.max() * 0.995].index.min()
        assert (scores.index < best).any(), (name, form)
        assert (scores.index > best).any(), (name, form)
        of_more = (tried.strategy == name) & (tried.factor == f"{form} on all")
        more = tried[of_more].set_index("lr")["accuracy"]
        assert best in more.index
        enough = more[more >= head * 0.95]
        steady = enough.index.max() if len(enough) else more.idxmax()
        own = defaults_of(STRATEGIES[str(name)]).rates.get(f"classification/{form}")
        assert steady == (OF_FORMS[str(form)] if name == "fedavg" else own), (name, form)
    assert forms_page.declared(rows) == OF_FORMS
    assert not {"lora", "alora", "dora"} & {*OF_FORMS}
    text = (ROOT / "docs" / "extend" / "forms.md").read_text()
    assert forms_page.written(text, rows) == text


# -- what a config makes of it ---------------------------------------------------------------------


def test_a_key_that_is_left_out_is_the_strategys(bold: None) -> None:
    config = Config.read({"strategy.name": "bold"})
    assert (config.train.lr, config.lora.init, config.lora.alpha) == (0.04, "orthogonal", 8.0)
    assert told(config.run.defaults) == ("bold", {"train.lr=0.04", "lora.init=orthogonal",
                                                  "lora.alpha=8.0"})  # fmt: skip
    assert origin(config.run.defaults, "train.lr", config.train.lr) == "from bold's defaults"


@pytest.mark.parametrize(
    ("key", "value"), [("train.lr", 0.5), ("lora.init", "gaussian"), ("lora.alpha", 3.0)]
)
def test_what_a_user_sets_stays(bold: None, key: str, value: Any) -> None:
    config = Config.read({"strategy.name": "bold", key: value})
    assert config.flat()[key] == value
    assert not origin(config.run.defaults, key, value)
    assert len(told(config.run.defaults)[1]) == len(UNSET) - 1
    other = Config.read({**config.flat(), "strategy.name": "fedavg"})
    assert other.flat()[key] == value


def test_a_saved_config_keeps_its_values_when_the_defaults_have_changed(
    bold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Config.read({"strategy.name": "bold"}).flat()
    monkeypatch.setattr(Bold, "defaults", Defaults({"classification": 0.9}))
    again = Config.read(saved)
    assert again.train.lr == 0.04
    assert again.flat() == saved
    assert Config.read({"strategy.name": "bold"}).train.lr == 0.9


def test_an_old_config_without_the_record_keeps_what_it_had(bold: None) -> None:
    old = {**Config.read({"strategy.name": "bold"}).flat(), "train.lr": 2e-3}
    del old["run.defaults"]
    config = Config.read(old)
    assert config.train.lr == 2e-3
    assert config.run.defaults == ()


def test_a_resolved_config_takes_the_defaults_of_another_strategy(bold: None) -> None:
    first = Config.read({"strategy.name": "bold"})
    other = Config.read({**first.flat(), "strategy.name": "fedavg"})
    assert other == Config.read({"strategy.name": "fedavg"})
    later = Config.read({**first.flat(), "strategy.name": "fedavg", "train.lr": 0.7})
    assert later.train.lr == 0.7


def test_where_a_value_comes_from_is_no_part_of_the_experiment(bold: None) -> None:
    config = Config.read({"strategy.name": "bold"})
    set_by_hand = {key: value for key, value in config.flat().items() if key != "run.defaults"}
    assert Config.read(set_by_hand).identity() == config.identity()


def test_under_example_level_privacy_the_clip_decides_the_rate(bold: None) -> None:
    given = {"strategy.name": "bold", "privacy.epsilon": 4.0, "privacy.clip-norm": 2.0}
    config = Config.read(given)
    assert config.train.lr == 1.5
    assert not origin(config.run.defaults, "train.lr", 1.5)
    assert config.lora.alpha == 8.0


# -- strategies from elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defaults", "said"),
    [(0.1, "must be Defaults"), (Defaults({"/vera": 0.1}), "must be a task"),
     (Defaults(few={"classification": 2}), r"few\['classification'\] = 2: must be a float"),
     (Defaults(few=[0.1]), "few: must be a mapping"),
     (Defaults({"classification": -1.0}), "must be a float above 0"),
     (Defaults(alpha=0.0), "alpha"), (Defaults(init="auto"), "init")],
)  # fmt: skip
def test_defaults_that_cannot_be_are_refused_as_a_strategy_is_registered(
    monkeypatch: pytest.MonkeyPatch, defaults: Any, said: str
) -> None:
    monkeypatch.setattr(registry, "REGISTRY", Registry({}, []))
    cls = dataclass(frozen=True)(type("Wrong", (FedAvg,), {"defaults": defaults}))
    with pytest.raises(StrategyError, match=said):
        register_strategy("wrong", cls)
    assert "wrong" not in list_strategies()


# -- where it is said ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "said"),
    [(10.0, "10 times"), (25.0, "25 times"), (0.1, "1/10 of"), (0.01, "1/100 of"), (9.9, ""),
     (0.11, ""), (1.0, "")],
)  # fmt: skip
def test_doctor_notes_a_rate_ten_times_too_high_or_low(bold: None, times: float, said: str) -> None:
    config = Config.read({"strategy.name": "bold", "train.lr": 0.04 * times})
    found = [*far_off(config)]
    assert bool(found) == bool(said)
    for note in found:
        assert note.level == "note"
        assert said in note.what
        assert "bold's default, 0.04" in note.what


def test_doctor_has_nothing_to_hold_a_rate_of_sgd_against(bold: None) -> None:
    given = {"strategy.name": "bold", "train.lr": 1.0, "train.optimizer": "sgd"}
    assert not [*far_off(Config.read(given))]


def test_doctor_notes_a_default_rate_on_more_modules_than_it_was_found_with(bold: None) -> None:
    config = Config.read({"strategy.name": "bold"})
    (note,) = crowded(config, 37)
    assert note.level == "note"
    assert "37 modules are adapted" in note.what
    assert "halve train.lr" in note.do
    assert not [*crowded(config, 36, 768)]
    assert "up to 769 wide" in next(crowded(config, 36, 769)).what
    writes = Config.read({"strategy.name": "fedex", "model.task": "causal-lm", "data.prompt": "p"})
    assert not [*crowded(writes, 210, 1152)]
    assert "7 to 210 of 576" in next(crowded(writes, 211, 576)).what
    assert [*crowded(writes, 7, 1153)]
    for other in ({"train.lr": 0.3}, {"model.task": "causal-lm", "data.prompt": "p"}):
        assert not [*crowded(Config.read({"strategy.name": "bold", **other}), 400)]


@pytest.mark.parametrize(
    ("name", "ranks", "said"),
    [("fedsb", (1, 2), "4 numbers of layers.0.q_proj at rank 2, where lora trains 164"),
     ("ravan", (4, 8), "32 numbers"), ("fedsb", (2, 8), ""), ("ffa", (1, 2), ""),
     ("lora-a2", (1, 2), "")],
)  # fmt: skip
def test_doctor_notes_a_core_of_few_numbers_with_the_rank_that_has_loras(
    name: str, ranks: tuple[int, ...], said: str
) -> None:
    strategy: Any = STRATEGIES[name]()
    clients = make_clients(ranks, step=0)
    state = strategy.init(make_start(clients))
    found = [*few(Config.read({"strategy.name": name}), strategy, state, clients)]
    assert bool(found) == bool(said)
    for note in found:
        assert note.level == "note"
        assert said in note.what
        rank = int(note.do.split("rank ")[1].split()[0])
        x = clients[1].layers["layers.0.q_proj"]
        assert abs(rank * rank - x.rank * (x.d + x.k)) < 2 * rank + 1
        assert ("size of its blocks" in note.do) == (name == "ravan")


@pytest.mark.parametrize(
    ("changes", "said"), [({}, "0.04, from bold's defaults"), ({"train.lr": 0.3}, "0.3")]
)
def test_a_report_says_where_the_rate_comes_from(
    bold: None, changes: Mapping[str, Any], said: str
) -> None:
    config = Config.read({"strategy.name": "bold", **changes})

    saved = SimpleNamespace(config=json.loads(json.dumps(config.flat())))
    assert tables.rate(saved) == said  # type: ignore[arg-type]
    assert tables.scale_and_start(saved) == 'lora.alpha 8, lora.init "orthogonal"'  # type: ignore[arg-type]


def test_a_servers_messages_carry_what_its_defaults_gave(
    bold: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that a node whose own fedlora has other defaults trains as the server says."""
    monkeypatch.setattr("fedlora.launch.federation.Server", lambda *given: given)
    monkeypatch.setattr("fedlora.preflight.check", lambda config: None)
    federation: Any = Federation(Config.read({"strategy.name": "bold", "run.out": str(tmp_path)}))
    *_, changes = federation._server
    assert changes == {"train.lr": 0.04, "lora.init": "orthogonal", "lora.alpha": 8.0}
    monkeypatch.setattr(Bold, "defaults", Defaults())
    assert Config.read({"strategy.name": "bold", **changes}).train.lr == 0.04
