"""LocalGrid on cards: one worker a card, one base a card, and the bytes of one worker."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedlora.config.reader import Config
from fedlora.errors import ConfigError, RoundError
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.wire.codes import FailureKind, kind_of
from fedlora.launch.client_app import client_app
from fedlora.launch.doctor.the_memory import crew
from fedlora.launch.simulate.cards import card_workers, grid_of
from fedlora.launch.simulate.grid import FIRST_NODE, LocalGrid
from fedlora.launch.simulate.workers import MODULE, CardWorker, WorkerProcess
from fedlora.strategies import register_strategy, registry
from fedlora.strategies.registry import Registry
from fedlora.training import cache
from fedlora.training.footprint import footprint
from fedlora.training.user_code import named
from tests.federation.test_device_runs import tensors, unmarked, worst
from tests.launch.test_grid import app, ask, running, told, within
from tests.support.own_state import Padded
from tests.support.own_strategy import Mine
from tests.support.pretend_device import CARDS, Card, plugged_in
from tests.support.tiny_federation import Ran, federate

Settings = Callable[..., dict[str, object]]
Cards = list[Card]
SHORT: dict[str, object] = {
    "run.rounds": 1,
    "clients.count": 3,
    "clients.ranks": "2,3",
    "train.steps": 1,
    "data.limit": 50,
    "data.test-size": 15,
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
    "model.attention": "auto",
    "model.dropout": -1.0,
}
ALONE, BOTH = {"simulate.devices": "pretend:0"}, {"simulate.devices": "pretend:0,1"}


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
    with grid_of(config, client_app(value for _, value in named(config))) as grid:
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
        assert frozen <= used < 1.5 * frozen, "a card holds one base"


def base_of(given: Mapping[str, object]) -> int:
    """Bytes of the base of a run that was played in this process."""
    config = Config.read(given)
    return footprint(cache.model(config, cache.corpus(config).labels), config).frozen


@pytest.mark.slow
def test_workers_on_the_host_beside_a_card_are_started_anew_in_the_bytes_of_one(
    settings: Settings, log: Path
) -> None:
    """Twice in one process, whose copies could compute no gradients by then."""
    host = {**SHORT, "simulate.devices": "cpu"}
    one, _ = played(settings(**{**host, "simulate.workers": 1, "run.name": "one"}))
    for name in ("first", "second"):
        two, served = played(settings(**{**host, "simulate.workers": 2, "run.name": name}))
        assert {*served} == {0, 1}, "both workers trained"
        assert worst(tensors(one), tensors(two))[0] == -1.0


@pytest.mark.slow
def test_two_cards_end_in_the_bytes_of_one_with_one_base_on_each(
    settings: Settings, log: Path
) -> None:
    """With dropout, mixed ranks and a base that moves."""
    check_same(settings, log, SHORT)


def check_same(settings: Settings, log: Path, changes: Mapping[str, object]) -> Ran:
    """A run on one card and on two: the same files, with one base on each card."""
    one = federate(settings(**{**changes, **ALONE, "run.name": "one"}))
    cache._model.key = cache._model.value = None
    given = settings(**{**changes, **BOTH, "run.name": "two"})
    two, served = played(given)
    assert {*served} == {0, 1}, "both cards had clients"
    assert worst(tensors(one), tensors(two))[0] == -1.0
    assert unmarked(one.metrics) == unmarked(two.metrics)
    check_places(log, base_of(given))
    return two


# -- in `make test` -------------------------------------------------------------------------------


def test_workers_on_cards_are_as_many_as_asked_and_as_there_are(
    settings: Settings, cards: Cards
) -> None:
    def on(devices: str, workers: int) -> list[str]:
        given = {"simulate.devices": devices, "simulate.workers": workers}
        return [w.device for w in card_workers(Config.read(settings(**given)))]

    assert on("auto", 0) == on("pretend:0,1", 2) == ["pretend:1"]
    assert on("pretend:1,0", 0) == ["pretend:0"]
    assert on("auto", 1) == on("pretend:1", 0) == []
    assert on("cpu", 2) == ["cpu"], "no copy of a process computes beside a card"
    with pytest.raises(ConfigError, match=r"simulate\.workers = 3: one worker a device"):
        on("auto", 3)


def test_doctor_says_who_trains_where_and_refuses_more_workers_than_cards(
    settings: Settings, cards: Cards
) -> None:
    (said,) = crew(Config.read(settings(**{"simulate.workers": 0})))
    assert said.what == "workers: 2, the server's process and one on pretend:1"
    (said,) = crew(Config.read(settings(**{"simulate.workers": 3})))
    assert said.level == "problem"
    assert said.what.startswith("simulate.workers = 3: one worker a device")
    assert [*crew(Config.read(settings()))] == []


@pytest.mark.parametrize("what", ["an object", "of the script", "a strategy of the script"])
def test_what_a_fresh_process_cannot_import_is_refused_by_name(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    given, key = {**settings(**SHORT)}, "train.loss"
    if what == "an object":
        given["train.loss"] = "py:live:loss-1"
    elif what == "of the script":
        given["train.loss"] = "py:__main__:loss"
    else:
        key = "strategy.name = 'mine'"
        monkeypatch.setattr(registry, "REGISTRY", Registry({}, []))

        @dataclass(frozen=True)
        class Here(Mine):
            pass

        register_strategy("mine", Here, states=(Padded,))
        given["strategy.name"] = "mine"
    with pytest.raises(ConfigError, match=rf"{key}: this is known to this process alone.*workers"):
        card_workers(Config.read(given))
    assert card_workers(Config.read({**given, "simulate.workers": 1})) == []


def test_others_are_served_while_a_client_trains_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """With processes that are forked in the place of cards' workers, which take their time."""
    grid: LocalGrid
    monkeypatch.setattr(CardWorker, "start", lambda _: WorkerProcess.fork(grid._serve))
    grid = LocalGrid(app(), 8, {}, cards=[CardWorker("a card")])
    with within(30), grid:
        begun = time.monotonic()
        naps = [0.2, 1.5] + [0.2] * 6
        replies = [*grid.send_and_receive([ask(i, sleep=x) for i, x in enumerate(naps)])]
        took = time.monotonic() - begun
    by = {told(r, "node"): told(r, "pid") for r in replies}
    assert [by[FIRST_NODE + i] == os.getpid() for i in range(8)] == [i == 1 for i in range(8)]
    assert took < 2.2, "the worker's seven took as long as the one here"


# -- with real workers ----------------------------------------------------------------------------


def ask_who(node: int) -> Message:
    return Message(RecordDict(), FIRST_NODE + node, "query")


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_message_and_is_replaced(log: Path) -> None:
    with LocalGrid(client_app(), 6, {}, cards=[CardWorker("pretend:1")]) as grid:
        wait(grid)
        first = grid.workers[0].pid
        os.kill(first, signal.SIGKILL)
        replies = [*grid.send_and_receive([ask_who(i) for i in range(6)])]
        lost = [r for r in replies if r.has_error()]
        assert len(replies) == 6
        assert [kind_of(r.error.code) for r in lost] in ([], [FailureKind.LOST])
        wait(grid)
        assert grid.workers[0].pid != first
        assert not any(r.has_error() for r in grid.send_and_receive(map(ask_who, range(6))))
        assert {*grid._served.values()} == {0, 1}
        last = grid.workers[0].pid
    assert not running(last)


@pytest.mark.slow
def test_a_worker_that_cannot_begin_ends_the_run_and_is_not_tried_for_ever(log: Path) -> None:
    with (
        LocalGrid(client_app(), 3, {}, cards=[CardWorker("nonsense:1")]) as grid,
        pytest.raises(RoundError, match="a worker for nonsense:1 ended with status 1 before it"),
    ):
        wait(grid)


@pytest.mark.slow
def test_ctrl_c_while_a_client_trains_here_leaves_no_worker(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with LocalGrid(client_app(), 4, {}, cards=[CardWorker("pretend:1")]) as grid:
        wait(grid)
        (worker,) = grid.workers
        monkeypatch.setattr(grid, "client_app", stop)
        with pytest.raises(KeyboardInterrupt):
            grid.send_and_receive(map(ask_who, range(4)))
    assert not running(worker.pid)
    assert not [t for t in threading.enumerate() if t.name == "fedlora-cards"]


LONGER = {**SHORT, "run.rounds": 2, "clients.count": 5, "train.steps": 2, "evaluate.every": 1}
RUNS: dict[str, dict[str, object]] = {
    "a language model": {"model.attention": "eager", "strategy.name": "flora"},
    "buffered, by a virtual clock": {
        "strategy.name": "ffa", "clients.ranks": "3", "round.buffer": 2, "clients.count": 4,
        "devices.classes": "fast:4:100,slow:0.1:2",
    },
    "secure aggregation": {
        "strategy.name": "fedavg", "clients.ranks": "4", "secure.aggregation": True,
        "secure.colluding": 0,
    },
    "example DP": {
        "strategy.name": "fedavg", "clients.ranks": "4", "privacy.epsilon": 8.0,
        "privacy.insecure-reproducible-noise": True, "model.dropout": 0.0,
    },
    "memory of its own": {"strategy.name": "fedsa", "personalize.epochs": 1.0},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_round_ends_in_the_same_bytes(
    settings: Settings, log: Path, name: str
) -> None:
    kind = partial(settings, "llama") if name == "a language model" else settings
    check_same(kind, log, {**LONGER, **RUNS[name]})


@pytest.mark.slow
def test_ones_own_model_data_and_loss_go_to_the_other_card_by_their_names(
    settings: Settings, log: Path
) -> None:
    one = federate(
        settings(**{**SHORT, **OWN, **ALONE, "run.name": "one"}),
        client_app(v for v in OWN.values() if str(v).startswith("py:")),  # type: ignore[misc]
    )
    two, served = played(settings(**{**SHORT, **OWN, **BOTH, "run.name": "two"}))
    assert {*served} == {0, 1}
    assert worst(tensors(one), tensors(two))[0] == -1.0


@pytest.mark.slow
def test_a_strategy_that_a_call_registered_is_known_there(
    settings: Settings, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "REGISTRY", Registry({}, []))
    register_strategy("mine", Mine, states=(Padded,))
    given = {**SHORT, "strategy.name": "mine"}
    one = federate(settings(**{**given, **ALONE, "run.name": "one"}))
    two, served = played(settings(**{**given, **BOTH, "run.name": "two"}))
    assert {*served} == {0, 1}
    assert worst(tensors(one), tensors(two))[0] == -1.0


@pytest.mark.slow
@pytest.mark.parametrize("slip", ["the server's card", "two bases here", "two bases there"])
def test_a_base_in_the_wrong_place_is_seen(
    settings: Settings, log: Path, monkeypatch: pytest.MonkeyPatch, slip: str
) -> None:
    """What the check of places would say of a worker on the wrong card, and of a second base."""
    given = settings(**{**SHORT, **BOTH})
    kept: list[Any] = []
    if slip == "the server's card":
        monkeypatch.setattr(CardWorker, "start", on_the_servers_card)
    elif slip == "two bases here":
        load = cache._load_model
        monkeypatch.setattr(cache._model, "make", lambda *a: kept.extend([load(*a)]) or load(*a))
    else:
        given["train.loss"] = "py:tests.support.two_bases:loss"
    cache._model.key = cache._model.value = None
    _, served = played(given)
    assert {*served} == {0, 1}
    with pytest.raises(AssertionError, match="server's card" if "card" in slip else "one base"):
        check_places(log, base_of(given))
    if slip == "two bases there":
        assert CARDS[0].used < 1.5 * base_of(given), "and not here"


def on_the_servers_card(worker: CardWorker) -> WorkerProcess:
    told = replace(worker, device="pretend:0")
    return WorkerProcess.spawn(MODULE, asdict(told))


def test_the_slip_of_two_bases_is_planted_in_no_process_of_the_tests() -> None:
    from tests.support import two_bases

    assert cache._model.make is not two_bases._twice
