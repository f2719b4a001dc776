"""A rate that is left to the strategy, where how many modules are adapted decides which it is."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tomli_w

from fedlora.config.origins import BY_MODULES, origin
from fedlora.config.reader import Config
from fedlora.errors import FedLoraError
from fedlora.launch.compare.experiment import Experiment, cells
from fedlora.launch.compare.run import run as run_cells
from fedlora.launch.doctor.the_run import experiment
from fedlora.launch.experiment_file import of_run
from fedlora.launch.simulate.run import resumed
from fedlora.reports.changed import changed
from fedlora.reports.run_files import read
from fedlora.training import cache
from tests.support.tiny_federation import QUICK, Ran, federate
from tests.support.under_policy import named as under
from tests.support.under_policy import written

Settings = Callable[..., dict[str, object]]
FEW, MANY = 1e-2, 5e-3
"""fedex's."""


def of(ran: Ran) -> tuple[float, str]:
    """The rate that a run had, and where it is from."""
    config = of_run(ran.directory / "config.toml")
    return config.train.lr, origin(config.run.defaults, "train.lr", config.train.lr)


def left_out(given: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in given.items() if key != "train.lr"}


def test_a_run_trains_at_the_rate_for_as_many_modules_as_its_model_has(settings: Settings) -> None:
    """On the clients as well, whose own config does not have it."""
    ends = {}
    for name, more in (
        ("left", {}),
        ("few", {"train.lr": FEW}),
        ("many", {"train.lr": MANY}),
    ):
        given = left_out(settings(**QUICK, **{"run.name": name, "strategy.name": "fedex"}))
        ends[name] = federate({**given, **more})
    assert of(ends["left"]) == (FEW, "from fedex's defaults")
    assert of(ends["few"]) == (FEW, "")
    assert "train.lr" not in changed(read(ends["left"].directory))  # its page says it is the own
    for by_hand in ("few", "many"):
        said = changed(read(ends[by_hand].directory))["train.lr"]
        assert said == "0.005, of few modules 0.01"
    assert ends["left"].adapter == ends["few"].adapter
    assert ends["left"].adapter != ends["many"].adapter


def test_a_model_of_many_modules_has_the_rate_for_many(settings: Settings) -> None:
    """Of the tiny BERT: six linear modules a layer, and the pooler's."""
    given = {**QUICK, "strategy.name": "fedex", "lora.target-modules": "all-linear"}
    ran = federate(left_out(settings(**given)))
    config = of_run(ran.directory / "config.toml")
    assert len(cache.model(config, cache.corpus(config).labels).shapes) > 12
    assert of(ran) == (MANY, "from fedex's defaults")
    assert BY_MODULES not in config.run.defaults


def test_doctor_says_the_rate_that_the_run_has(settings: Settings) -> None:
    given = left_out(settings(**QUICK, **{"strategy.name": "fedex"}))
    findings, _ = experiment(Config.read(given))
    (plan,) = [f.what for f in findings if f.what.startswith("plan: ")]
    assert "lr 0.01 (linear), from fedex's defaults (found by search with at most 12" in plan


def test_a_run_that_goes_on_keeps_the_rate_that_it_began_with(
    settings: Settings, tmp_path: Path
) -> None:
    """Also one that began with the rate for many, before there was one for few."""
    given = left_out(settings(**QUICK, **{"strategy.name": "fedex"}))
    ran = federate({**given, "run.rounds": 1})
    saved = ran.directory / "config.toml"
    for lr in (FEW, MANY):
        text = saved.read_text().replace("lr = 0.01", f"lr = {lr}")
        saved.write_text(text.replace("train.lr=0.01", f"train.lr={lr}"))
        path, changes = resumed(ran.directory)
        config = of_run(path)
        assert BY_MODULES not in config.run.defaults
        assert config.train.lr == lr
        assert config.for_modules(1).train.lr == lr
        assert changes["run.resume"] is True


def test_a_comparison_given_again_keeps_its_cells(settings: Settings, tmp_path: Path) -> None:
    given = left_out(settings(**QUICK, **{"strategy.name": "fedex"}))
    path = tmp_path / "again.toml"
    path.write_text(tomli_w.dumps({k: v for k, v in given.items() if not k.startswith("run.o")}))
    found, said = Experiment.load(str(path)), list[str]()
    for _ in range(2):
        grid = cells(found, ["fedex"], [0], {}, tmp_path / "out", False)
        run_cells(found, grid, 1, said.append)
    assert said[-1] == "1 of 1 cells are done already"
    assert of(Ran(grid[0].directory)) == (FEW, "from fedex's defaults")
    other = cells(found, ["fedex"], [0], {"train.lr": MANY}, tmp_path / "out", False)
    with pytest.raises(FedLoraError, match=r"another train\.lr"):
        run_cells(found, other, 1, said.append)


def test_nodes_under_a_policy_train_at_it_too(
    settings: Settings, tiny: dict[str, str], tmp_path: Path
) -> None:
    given = left_out(settings(**QUICK, **{"strategy.name": "fedex"}))
    given |= {"data.path": "", "data.test-path": tiny["rows"], "data.dedupe": False}
    ends = []
    for name, more in (("left", {}), ("few", {"train.lr": FEW})):
        nodes = {
            i: under(written(tmp_path / f"{name}-{i}", tiny["bert"], tiny["rows"]))
            for i in range(3)
        }
        ends.append(federate({**given, "run.name": name, **more}, nodes=nodes))
    assert of(ends[0])[0] == FEW
    assert ends[0].adapter == ends[1].adapter
