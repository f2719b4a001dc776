"""A run that began before a key existed goes on as it began, and says so."""

import re
from pathlib import Path

import pytest
import tomli_w

from fedlora.config.older import MEANT, kept, missing, of_strategy
from fedlora.config.reader import Config
from fedlora.launch.experiment_file import meant, of_run
from fedlora.strategies import STRATEGIES


def test_every_older_rule_is_one_that_its_key_can_still_have() -> None:
    for key, value in MEANT.items():
        assert of_strategy(key) in STRATEGIES
        assert Config.read({key: value}).flat()[key] == value


def test_a_config_without_a_key_means_the_older_rule_and_one_with_it_what_it_says(
    tmp_path: Path,
) -> None:
    written = {k: v for k, v in Config().flat().items() if k not in MEANT}
    (path := tmp_path / "config.toml").write_text(tomli_w.dumps(written))
    assert meant(path) == MEANT == missing(written)
    assert {k: of_run(path).flat()[k] for k in MEANT} == MEANT
    path.write_text(Config().toml())
    assert meant(path) == {}
    assert of_run(path).flat() == Config.read({}).flat()


@pytest.mark.parametrize("name", sorted({of_strategy(k) for k in MEANT}))
def test_what_a_resumed_run_keeps_is_said_for_its_own_strategy_alone(name: str) -> None:
    now = Config().flat()
    lines = list(kept({}, now, name))
    keys = [re.match(r"\S+", line) for line in lines]
    assert {m[0] for m in keys if m} == {
        k for k, v in MEANT.items() if of_strategy(k) == name and now[k] != v
    }
    assert not list(kept(now, now, name))
    assert not list(kept({}, now, "fedavg"))


def test_an_option_is_told_from_the_strategys_name() -> None:
    names = [of_strategy(k) for k in ("strategy.name", "strategy.lora-a2.choice", "train.lr")]
    assert names == ["", "lora-a2", ""]
