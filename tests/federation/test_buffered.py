"""Buffered asynchronous rounds: late updates count for what they changed, and nobody waits."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Context, Message
from torch.testing import assert_close

from client_app.app import app as client_app
from fedlora import preflight
from fedlora.errors import ConfigError
from fedlora.federation.server import loop
from fedlora.federation.server.asynchronous import Flight, fresh
from fedlora.lora.adapter import Factors
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Round, Upload
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.probing import vector
from tests.support.doc_tables import DOCS, table
from tests.support.long import few
from tests.support.strategy_federation import EQUAL, make_start, noise
from tests.support.tiny_federation import federate, quick, read_tensors

Settings = Callable[..., dict[str, object]]
DEVICES = "fast:4:100,middle:1:20,slow:0.1:2"
# What the documentation says takes late updates; the tests hold the code to it.
TAKES = {
    row["strategy"]
    for row in table(DOCS / "extend" / "composing.md", "strategy")
    if row["late updates"] == "yes"
}


def moved(x: Factors, seed: int) -> Factors:
    change = {
        c: {n: t + noise(t.shape, seed, 0, f"{c}/{n}") for n, t in getattr(x, c).items()}
        for c in ("A", "B", "R", "other")
    }
    return Factors(x.scale, **change)


def test_the_mean_of_late_updates_is_the_papers_step() -> None:
    """x + sum_i p_i (1 + tau_i)^-1/2 (x_i - x_then), in float64, for staleness 0, 1 and 3."""
    strategy, start = FedAvg(), make_start(EQUAL)
    states = [strategy.init(start)]
    states += [moved(states[0], seed) for seed in (1, 2, 3)]
    now, round = states[3], Round(4, 0)
    want = {(c, n): x.clone() for c, n, x in now.items()}
    late, plain = [], []
    for client, stale, n in zip(start.clients, (0, 1, 3), (5, 2, 9), strict=False):
        then, weight = states[3 - stale], (1 + stale) ** -0.5
        upload = Upload(client, moved(then, 10 + client.id), n)
        flight = Flight(client, Round(4 - stale, 0), then, 0.0)
        late.append(fresh(strategy, now, flight, upload, round, weight))
        plain.append(upload)
        was = vector(then)
        for key, x in vector(upload.sent).items():
            want[key] += n / 16 * weight * (x - was[key])
    got = vector(strategy.aggregate(now, late, round))
    for key, x in want.items():
        assert_close(got[key], x, rtol=0, atol=1e-12)
    # a counterexample: late updates taken as they are give another model
    other = vector(strategy.aggregate(now, plain, round))
    assert max(float((other[k] - x).abs().max()) for k, x in want.items()) > 0.1


@pytest.mark.parametrize("name", few(sorted(TAKES), *sorted(TAKES)[:2]))
def test_a_buffer_of_the_whole_cohort_is_the_plain_round_bit_for_bit(
    settings: Settings, name: str
) -> None:
    plain = federate(settings(**quick(name)))
    whole = federate(settings(**quick(name, **{"run.name": "buffered", "round.buffer": 3})))
    assert whole.adapter == plain.adapter
    assert all(set(r["staleness"].values()) == {0} for r in whole.rounds[1:])


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - TAKES))
def test_a_strategy_whose_late_updates_mean_something_else_is_refused_before_round_1(
    settings: Settings, name: str
) -> None:
    asked: list[str] = []

    def app(message: Message, context: Context) -> Message:
        asked.append(message.metadata.message_type)
        return client_app(message, context)

    with pytest.raises(ConfigError, match=r"round\.buffer"):
        federate(
            settings(
                **quick(name, **{"round.buffer": 2, "strategy.fedsb.init-from": "orthogonal"})
            ),
            app,
        )
    assert "train" not in asked


def asynchronous(settings: Settings, run: str, **changes: object) -> dict[str, object]:
    """Six clients of unlike speed on a virtual clock, of which a round takes the first two."""
    given = {
        "run.name": run,
        "run.rounds": 6,
        "clients.count": 6,
        "round.buffer": 2,
        "devices.classes": DEVICES,
        "evaluate.every": 1,
    }
    return settings(**quick("ffa", **{**given, **changes}))


def test_a_simulation_ends_in_the_same_bits_on_any_number_of_workers(settings: Settings) -> None:
    one = federate(asynchronous(settings, "one"))
    two = federate(asynchronous(settings, "two", **{"simulate.workers": 2}))
    assert two.adapter == one.adapter
    assert [r["staleness"] for r in two.rounds[1:]] == [r["staleness"] for r in one.rounds[1:]]


def test_fast_devices_count_more_often_and_slow_ones_late(settings: Settings) -> None:
    ran = federate(asynchronous(settings, "async"))
    rounds = ran.rounds[1:]
    assert all(len(r["accepted"]) == 2 for r in rounds)
    counted = [i % 3 for r in rounds for i in r["accepted"]]
    assert counted.count(0) > counted.count(2)
    assert max(s for r in rounds for s in r["staleness"].values()) >= 1
    assert all(r["proof"]["deviation"] < 1e-5 for r in rounds), "ffa is exact, late or not"
    plain = federate(asynchronous(settings, "plain", **{"round.buffer": 0}))
    clock = [r.rounds[-1]["virtual"]["clock"] for r in (ran, plain)]
    assert clock[0] < clock[1] / 2, "waiting for the slow device is most of a plain round"
    assert all(r["virtual"]["waiting"] == 0 for r in rounds)


def test_a_run_stopped_between_rounds_ends_in_the_bits_of_one_that_was_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was training is asked again, with the model of then."""
    whole = federate(asynchronous(settings, "whole"))
    commit = loop.commit

    def stop(setting: Any, session: Any, run: Any, number: int, record: Any) -> None:
        commit(setting, session, run, number, record)
        if number == 3:
            assert session.flights.of
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "commit", stop)
    with pytest.raises(KeyboardInterrupt):
        federate(asynchronous(settings, "cut"))
    monkeypatch.setattr(loop, "commit", commit)
    cut = federate(asynchronous(settings, "cut", **{"run.resume": True}))
    assert cut.adapter == whole.adapter
    for again, once in zip(cut.metrics, whole.metrics, strict=True):
        assert {**again, "bytes": 0} == {**once, "bytes": 0}  # what was sent twice counts twice


def test_a_server_optimiser_steps_from_a_buffer_at_its_own_rate(settings: Settings) -> None:
    """FedAvgM without momentum: half the rate is half of the way, in the first round."""
    given = {"run.rounds": 1, "server.optimizer": "fedavgm", "server.beta1": 0.0}
    moved = {}
    for rate in (1.0, 0.5):
        ran = federate(asynchronous(settings, f"at-{rate}", **given, **{"server.lr": rate}))
        tensors, _ = read_tensors(ran.directory / "adapter" / "adapter_model.safetensors")
        moved[rate] = {name: x for name, x in tensors.items() if "lora_B" in name}  # from zero
    assert all(float(x.norm()) > 0 for x in moved[1.0].values())
    for name, x in moved[1.0].items():
        assert_close(moved[0.5][name], x / 2, rtol=1e-4, atol=1e-7)


def test_late_updates_are_judged_by_robust_aggregation_and_paid_for_under_dp(
    settings: Settings,
) -> None:
    judged = federate(asynchronous(settings, "robust", **{"robust.method": "norm-bound"}))
    assert all(r["robust"] for r in judged.rounds[1:])
    given = {"privacy.epsilon": 8.0, "privacy.delta": 1e-3, "privacy.sample-rate": 0.5}
    private = federate(asynchronous(settings, "private", **given))
    spent = [c["privacy"]["epsilon"] for r in private.rounds[1:] for c in r["clients"].values()]
    assert len(spent) == 12
    assert all(0 < epsilon <= 8.0 for epsilon in spent)
    for ran in (judged, private):
        assert max(s for r in ran.rounds[1:] for s in r["staleness"].values()) >= 1


def slow(client: int, rounds: set[int], seconds: float) -> Callable[..., Message]:
    """An app whose one client takes its time in some rounds."""

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            job = message.content.config_records["job"]
            if job["client"] == client and job["round"] in rounds:
                time.sleep(seconds)
        return client_app(message, context)

    return app


def test_a_slow_client_is_not_waited_for_and_counts_in_a_later_round(settings: Settings) -> None:
    given = quick(
        "fedavg",
        **{"run.rounds": 4, "round.buffer": 2, "simulate.workers": 3, "output.keep-updates": True},
    )
    ran = federate(settings(**given), slow(0, {1}, 3.0))
    first, *later = ran.rounds[1:]
    assert 0 not in first["accepted"]
    if late := [r for r in later if 0 in r["accepted"]]:
        assert late[0]["staleness"]["0"] >= 1
    assert not any(r["failures"] for r in ran.rounds[1:])


def test_an_update_past_max_staleness_does_not_count_and_its_client_is_asked_again(
    settings: Settings,
) -> None:
    changes = {"round.max-staleness": 1, "round.buffer": 1, "devices.classes": "alike:1:10"}
    ran = federate(asynchronous(settings, "old", **changes))
    told = [f["reason"] for r in ran.rounds[1:] for f in r["failures"]]
    assert told
    assert all("rounds old, round.max-staleness = 1" in reason for reason in told)
    assert all(s <= 1 for r in ran.rounds[1:] for s in r["staleness"].values())


def test_a_client_past_its_deadline_is_given_up(settings: Settings) -> None:
    given = quick("fedavg", **{"round.buffer": 3, "simulate.workers": 3, "round.deadline": 1.5})
    ran = federate(settings(**given), slow(1, {1}, 4.0))
    (failure,) = ran.rounds[1]["failures"]
    assert failure["client"] == 1
    assert "no reply within 1.5 s" in failure["reason"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"round.buffer": 9}, "at most 4, the clients that train at a time"),
        ({"secure.aggregation": True}, "a masked sum needs all of its clients"),
        ({"privacy.level": "client", "privacy.epsilon": 1.0}, "depends on how fast it is"),
        ({"ranks.policy": "legend"}, "changes a client's layers"),
    ],
)
def test_what_does_not_go_with_a_buffer_is_said_at_once(
    settings: Settings, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        preflight.read(settings(**{"round.buffer": 2, **changes}))
