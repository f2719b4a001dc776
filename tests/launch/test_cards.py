"""LocalGrid on cards: one worker a card, one base a card, and the bytes of one worker."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.reader import Config
from fedlora.errors import ConfigError, RoundError
from fedlora.federation.server.loop import FederatedLora
from fedlora.launch.client_app import client_app
from fedlora.launch.simulate import cards as cards_of_a_run
from fedlora.launch.simulate.cards import card_workers, grid_of
from fedlora.launch.simulate.grid import LocalGrid
from fedlora.strategies.fedavg import FedAvg
from fedlora.training import cache
from fedlora.training.footprint import footprint
from fedlora.training.user_code import named
from tests.federation.test_device_runs import tensors, worst
from tests.launch.test_grid import running
from tests.support import own_code
from tests.support.pretend_device import CARDS, Card, plugged_in
from tests.support.tiny_federation import Ran, federate

Settings = Callable[..., dict[str, object]]
Cards = list[Card]
SHORT: dict[str, object] = {
    "run.rounds": 2,
    "clients.count": 4,
    "train.steps": 2,
    "data.limit": 80,
    "evaluate.every": 2,
    "model.attention": "eager",
    "model.dropout": 0.1,
    "strategy.name": "fedex",
    "simulate.workers": 0,
}
HERE = "tests.support.own_code"
OWN = {
    "model.path": f"py:{HERE}:make_model",
    "model.tokenizer": f"py:{HERE}:make_tokenizer",
    "data.path": f"py:{HERE}:rows",
    "train.loss": f"py:{HERE}:smoothed",
    "lora.target-modules": "inner,outer",
}


@pytest.fixture
def log(cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a worker's process says at its end what it had on the machine's cards."""
    place = tmp_path / "log"
    place.mkdir()
    for key, value in plugged_in(place).items():
        monkeypatch.setenv(key, value)
    return place


def played(
    given: Mapping[str, object], before: Callable[[LocalGrid], None] = lambda _: None
) -> tuple[Ran, dict[int, int]]:
    """A run whose workers are all there before it begins; how many messages each place answered."""
    config = Config.read(given)
    app = client_app(value for _, value in named(config))
    with grid_of(config, app) as grid:
        wait(grid)
        before(grid)
        FederatedLora(config).start(grid)
        served = [*grid._served.values()]
    return Ran(Path(config.run.out, config.run.name)), {n: served.count(n) for n in served}


def wait(grid: LocalGrid) -> None:
    until = time.monotonic() + 60
    while not all(w.ready for w in grid.workers) and time.monotonic() < until:
        grid._collect(0.1)


def said(log: Path) -> dict[int, dict[str, int]]:
    """What the one worker's process had on each card of the machine."""
    (path,) = log.glob("*.json")
    return {int(place): had for place, had in json.loads(path.read_text()).items()}


def check_places(log: Path, frozen: int) -> None:
    """One base on each card: the server's here, the worker's there, and none anywhere else."""
    there = said(log)
    assert there[0]["peak"] == 0, "the worker used the server's card"
    assert CARDS[1].peak == 0, "the server used the worker's card"
    for used in (CARDS[0].used, there[1]["used"]):
        assert frozen <= used < 2 * frozen, "a card holds one base"


def base_of(given: Mapping[str, object]) -> int:
    """Bytes of the base of a run that was played in this process."""
    config = Config.read(given)
    return footprint(cache.model(config, cache.corpus(config).labels), config).frozen


# -- in `make test` -------------------------------------------------------------------------------


def test_two_cards_end_in_the_bytes_of_one_with_one_base_on_each(
    settings: Settings, log: Path
) -> None:
    """With dropout, mixed ranks and a base that moves."""
    one = federate(settings(**SHORT, **{"run.name": "one", "simulate.devices": "pretend:0"}))
    cache._model.key = cache._model.value = None
    given = settings(**SHORT, **{"run.name": "two", "simulate.devices": "pretend:0,1"})
    two, served = played(given)
    assert {*served} == {0, 1}, "both cards had clients"
    assert worst(tensors(one), tensors(two))[0] == -1.0
    assert one.metrics == two.metrics
    assert two.rounds[-1]["accepted"] == [0, 1, 2, 3]
    check_places(log, base_of(given))


def test_workers_on_cards_are_as_many_as_asked_and_as_there_are(
    settings: Settings, cards: Cards
) -> None:
    def on(devices: str, workers: int) -> list[str]:
        given = {"simulate.devices": devices, "simulate.workers": workers}
        return [w.device for w in card_workers(Config.read(settings(**given)))]

    assert on("auto", 0) == on("pretend:0,1", 2) == ["pretend:1"]
    assert on("pretend:1,0", 0) == ["pretend:0"]
    assert on("auto", 1) == on("pretend:1", 0) == on("cpu", 2) == []
    with pytest.raises(ConfigError, match=r"simulate\.workers = 3: one worker a device"):
        on("auto", 3)


@pytest.mark.parametrize("what", ["an object", "of the script", "a strategy of the script"])
def test_what_a_fresh_process_cannot_import_is_refused_by_name(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    given = settings(**SHORT)
    key = "train.loss"
    if what == "an object":
        given["train.loss"] = "py:live:loss-1"
    elif what == "of the script":
        given["train.loss"] = "py:__main__:loss"
    else:
        key = "strategy.name = 'fedavg'"

        class Mine(FedAvg):
            pass

        added = {"name": "fedavg", "cls": cards_of_a_run.name_of(Mine), "states": []}
        monkeypatch.setattr(cards_of_a_run, "_added", lambda _: iter([added]))
    with pytest.raises(ConfigError, match=rf"{key}: this is known to this process alone.*workers"):
        card_workers(Config.read(given))
    alone = Config.read({**given, "simulate.workers": 1})
    assert card_workers(alone) == []
