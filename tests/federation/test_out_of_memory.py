"""A client whose device runs out of memory goes on with half; then again, it is an error reply."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlora.config.reader import Config
from fedlora.errors import DeviceMemoryError
from fedlora.federation.client import attempts, job
from fedlora.federation.server import setup
from fedlora.training import devices, train
from tests.federation.test_device_runs import SHORT, TWO, tensors, worst
from tests.support.killing import kill_on_card
from tests.support.pretend_device import CARDS, Card
from tests.support.tiny_federation import federate

Settings = Callable[..., dict[str, object]]
Cards = list[Card]
ROOMY: dict[str, object] = {
    **SHORT, "strategy.name": "fedex", "simulate.devices": TWO, "data.test-size": 10,
    "output.keep-updates": True, "evaluate.every": 0, "evaluate.clients": False,
    "train.batch-size": 12, "train.steps": 1, "proof.enforce": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the training check, which is most of so short a run."""
    monkeypatch.setattr(job.ClientJob, "check", lambda *_: None)
    monkeypatch.setattr(setup, "check_first", lambda *_: None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(round, client, microbatch) of each training that began."""
    seen: list[tuple[int, int, int]] = []
    real = train.fit

    def fit(
        model: Any, rows: Any, columns: Any, config: Any, round: int, client: int, *rest: Any
    ) -> Any:
        seen.append((round, client, config.train.microbatch))
        return real(model, rows, columns, config, round, client, *rest)

    monkeypatch.setattr(job, "fit", fit)
    return seen


def short_of_memory(monkeypatch: pytest.MonkeyPatch, fits: int, client: int, *rounds: int) -> None:
    """In these rounds more than so many examples at once are too many for that client.

    The card's own limit, set to what is in use plus what so many take.
    """
    real, card, needed = train.example_losses, CARDS[1], dict[int, int]()
    training_of: list[tuple[int, int]] = []
    around = train.training

    def training(model: Any, config: Any, round: int, who: int) -> Any:
        training_of[:] = [(round, who)]
        return around(model, config, round, who)

    def losses(model: Any, batch: Any, *rest: Any) -> Any:
        n = len(batch["input_ids"])
        here = training_of == [(r, client) for r in rounds if training_of == [(r, client)]]
        card.limit = card.used + 1000 if training_of and here and n > fits else None
        try:
            return real(model, batch, *rest)
        finally:
            card.limit = None
            needed[n] = card.peak

    monkeypatch.setattr(train, "training", training)
    monkeypatch.setattr(train, "example_losses", losses)


def as_above() -> None:
    """What the killed process has of this one."""
    patch = pytest.MonkeyPatch()
    patch.setattr(job.ClientJob, "check", lambda *_: None)
    patch.setattr(setup, "check_first", lambda *_: None)
    short_of_memory(patch, 6, 1, 1)


def test_out_of_memory_halves_what_is_in_memory_at_once(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    given = settings(**ROOMY)
    whole = federate({**given, "run.name": "whole"})
    asked.clear()
    short_of_memory(monkeypatch, 6, 1, 1)
    halved = federate(given)
    assert asked == [(1, 0, 0), (1, 1, 0), (1, 1, 6), (1, 2, 0), (2, 0, 0), (2, 1, 6), (2, 2, 0)]
    for round in halved.rounds[1:]:
        told = {i: facts.get("microbatch") for i, facts in round["clients"].items()}
        assert told == {"0": None, "1": 6, "2": None}
        assert not round["failures"]
    memory = [*halved.directory.glob("clients/*/client-1/microbatch.txt")]
    assert [Path(x).read_text() for x in memory] == ["6"]
    same_others = [whole.update(1, i)[0] for i in (0, 2)], [halved.update(1, i)[0] for i in (0, 2)]
    for a, b in zip(*same_others, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = whole.update(1, 1)[0], halved.update(1, 1)[0]
    assert any(not torch.equal(a[k], b[k]) for k in a)
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_second_time_is_an_error_reply_and_the_run_goes_on(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    short_of_memory(monkeypatch, 2, 1, 1, 2)
    ran = federate(settings(**ROOMY))
    assert [x for x in asked if x[1] == 1] == [(1, 1, 0), (1, 1, 6), (2, 1, 6), (2, 1, 3)]
    for round in ran.rounds[1:]:
        (failure,) = round["failures"]
        assert failure["client"] == 1
        assert "out of memory" in failure["reason"]
        assert "data.max-length" in failure["reason"]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_half(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    given = settings(**ROOMY)
    short_of_memory(monkeypatch, 6, 1, 1)
    whole = federate({**given, "run.name": "whole"})
    kill_on_card("checkpoint-kept", 1, given, f"{__name__}:as_above")
    asked.clear()
    resumed = federate({**given, "run.resume": True})
    assert [x for x in asked if x[1] == 1] == [(2, 1, 6)]
    assert worst(tensors(whole), tensors(resumed))[0] == -1.0


@pytest.mark.slow
def test_a_client_that_lost_its_memory_has_the_half_from_the_checkpoint(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    given = settings(**ROOMY)
    kill_on_card("checkpoint-kept", 1, given, f"{__name__}:as_above")
    for path in Path(str(given["run.out"])).rglob("microbatch.txt"):
        path.unlink()
    federate({**given, "run.resume": True})
    assert (2, 1, 6) in asked


@pytest.mark.slow
def test_a_private_round_is_not_begun_anew(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fits hangs on who was drawn: a second try would not be what was accounted."""
    from fedlora.privacy import training

    begun: list[int] = []
    real = training.private_fit

    def private_fit(*args: Any, **options: Any) -> Any:
        begun.append(args[5])
        if args[5] == 1:
            raise devices.OutOfMemory("no room")
        return real(*args, **options)

    monkeypatch.setattr(training, "private_fit", private_fit)
    given = {**ROOMY, "privacy.epsilon": 8.0, "strategy.name": "fedavg", "clients.ranks": "4"}
    ran = federate(settings(**{**given, "run.rounds": 1}))
    assert begun == [0, 1, 2]
    (failure,) = ran.rounds[-1]["failures"]
    assert "privacy.microbatch" in failure["reason"]
    assert not [*ran.directory.rglob("microbatch.txt")]


@pytest.mark.slow
def test_one_example_at_a_time_cannot_be_halved(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    short_of_memory(monkeypatch, 0, 1, 1)
    ran = federate(settings(**{**ROOMY, "train.microbatch": 1, "run.rounds": 1}))
    assert [x for x in asked if x[1] == 1] == [(1, 1, 1)]
    assert [f["client"] for f in ran.rounds[-1]["failures"]] == [1]


def test_memory_is_given_back_before_the_second_attempt(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    real = job.fit

    def fit(*args: Any) -> Any:
        used.append(cards[1].used)
        return real(*args)

    monkeypatch.setattr(job, "fit", fit)
    short_of_memory(monkeypatch, 6, 1, 1)
    federate(settings(**{**ROOMY, "run.rounds": 1}))
    first, second = used[1:3]
    assert second <= first * 1.02


def test_what_the_first_attempt_held_is_let_go_of_whoever_keeps_the_error(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log or a debugger keeps it, and with it the frames; and torch's own is given back."""
    released: list[str] = []
    monkeypatch.setattr(attempts, "release", lambda card: released.append(str(card)))
    work: Any = SimpleNamespace(config=Config.read(settings(**ROOMY)))
    attempt, before, kept = attempts.Attempt(work, last=False), cards[1].used, list[Exception]()

    def train() -> None:
        held = torch.ones(1000, device=TWO)
        raise devices.OutOfMemory(str(held.shape))

    try:
        train()
    except devices.OutOfMemory as e:
        kept.append(e)
        held = cards[1].used - before
        again = attempt.__exit__(type(e), e, e.__traceback__)
    assert (held, again) == (4000, True)
    assert kept[0].__traceback__
    assert cards[1].used == before
    assert released == [TWO]


def test_a_server_out_of_memory_ends_the_run_with_what_to_do(
    settings: Settings, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(*_: Any) -> None:
        raise devices.OutOfMemory("no room")

    monkeypatch.setattr(setup, "check_first", evaluated)
    with pytest.raises(DeviceMemoryError, match=r"the server: pretend:1.*evaluate\.batch-size"):
        federate(settings(**ROOMY))
