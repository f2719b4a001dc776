"""What no honest client sends is refused by default, and leaves the run as if it had not come."""

import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from flwr.app import Array, Context, Error, Message

from client_app.app import app as client_app
from fedlora.errors import RoundError
from fedlora.federation.server import bounds
from fedlora.federation.server.loop import FederatedLora
from fedlora.launch.doctor import examine
from fedlora.reports import run_files, trust
from fedlora.strategies import STRATEGIES
from tests.federation.test_bad_clients import Bad, Spoil, arrays, metric, poison, reshape
from tests.federation.test_federation import dense_adapter
from tests.federation.test_hostile import Notes
from tests.support.tiny_federation import Ran, federate, quick

Settings = Callable[..., dict[str, object]]
BOTH = (1, 2)


def scaled(factor: float) -> Spoil:
    """Every tensor that it sends, so many times as large."""

    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        for key, old in list(arrays(reply).items()):
            x = np.frombuffer(old.data, dtype=np.float32) * np.float32(factor)
            arrays(reply)[key] = Array(old.dtype, old.shape, old.stype, x.tobytes())
        return reply

    return spoil


def head(factor: float) -> Spoil:
    """Its head alone, so many times as large."""

    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        for key, old in list(arrays(reply).items()):
            if key.startswith("other/"):
                x = np.frombuffer(old.data, dtype=np.float32) * np.float32(factor)
                arrays(reply)[key] = Array(old.dtype, old.shape, old.stype, x.tobytes())
        return reply

    return spoil


def typed(name: str, value: float | None = None) -> Spoil:
    """Its tensors in another of our own types, each number this value."""

    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}[name]
        for key, old in list(arrays(reply).items()):
            x = torch.frombuffer(bytearray(old.data), dtype=torch.float32).to(dtype)
            x = x if value is None else torch.full_like(x, value)
            data = x.view(torch.uint8).numpy().tobytes()
            arrays(reply)[key] = Array(name, old.shape, f"fedlora.{name}", data)
        return reply

    return spoil


def only(column: str, value: float) -> Spoil:
    """One number of the first tensor of this column."""

    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        key = next(k for k in arrays(reply) if k.startswith(f"{column}/"))
        old = arrays(reply)[key]
        x = np.frombuffer(old.data, dtype=np.float32).copy()
        x[-1] = value
        arrays(reply)[key] = Array(old.dtype, old.shape, old.stype, x.tobytes())
        return reply

    return spoil


def in_factors(times: float) -> Spoil:
    """The same product: A so many times as large, and B as many times smaller."""

    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        for key, old in list(arrays(reply).items()):
            factor = {"A": times, "B": 1 / times}.get(key[0], 1.0)
            x = np.frombuffer(old.data, dtype=np.float32) * np.float32(factor)
            arrays(reply)[key] = Array(old.dtype, old.shape, old.stype, x.tobytes())
        return reply

    return spoil


def silent(message: Message, *_: Any) -> Message:
    return Message(Error(7, "battery empty"), reply_to=message)


ATTACKS: dict[str, tuple[Spoil, str]] = {
    "2**62 examples": (metric("num-examples", 2**62), "round.max-examples = 1000000"),
    "1e18": (poison(1e18), "must be within"),
    "3e38": (poison(3e38), "must be within"),
    "float64 1e300": (typed("float64", 1e300), "type 'float64', must be 'float32'"),
    "bfloat16": (typed("bfloat16"), "type 'bfloat16', must be 'float32'"),
    "NaN": (poison(math.nan), "holds NaN or Inf"),
    "infinity": (poison(-math.inf), "holds NaN or Inf"),
    "NaN in the head alone": (only("other", math.nan), "holds NaN or Inf"),
    "another shape": (reshape(lambda s: (*s, 1)), "shape"),
    "no examples": (metric("num-examples", -5), "must be a positive whole number"),
    "a count that is no integer": (metric("num-examples", 2.0**62), "must be a positive whole"),
    "a count that is NaN": (metric("num-examples", math.nan), "must be a positive whole"),
    "NaN seconds": (metric("seconds", math.nan), "seconds = nan: must be a finite number"),
    "a thousand times": (scaled(1000.0), "round.norm-bound = 4 times the round's median"),
}
FOUR = {"clients.count": 4}


def spoilt(given: dict[str, object], name: str, spoil: Spoil) -> Ran:
    return federate({**given, "run.name": name}, Bad(spoil, rounds=BOTH))


def in_turn(message: Message, reply: Message, bad: Bad) -> Message | None:
    """Another attack in each round."""
    number = int(message.content.config_records["job"]["round"])  # type: ignore[arg-type]
    return [*ATTACKS.values()][number - 1][0](message, reply, bad)


def test_the_run_with_an_attacker_is_the_run_without_it_byte_for_byte(settings: Settings) -> None:
    rounds = tuple(range(1, len(ATTACKS) + 1))
    more = {"run.rounds": len(rounds), "round.quarantine-after": 0, **FOUR}
    given = settings(**quick("fedavg", **more, **{"lora.target-modules": "query"}))
    ran = federate({**given, "run.name": "attacked"}, Bad(in_turn, rounds=rounds))
    for line, (_, reason) in zip(ran.rounds[1:], ATTACKS.values(), strict=True):
        (failure,) = line["failures"]
        assert failure["client"] == 1
        assert reason in failure["reason"]
        assert line["accepted"] == [0, 2, 3]
        assert "1" not in line["clients"]
    without = federate({**given, "run.name": "without"}, Bad(silent, rounds=rounds))
    assert ran.adapter == without.adapter


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_so_it_is_under_every_strategy(settings: Settings, name: str) -> None:
    rounds = tuple(range(1, len(ATTACKS) + 1))
    more = {"run.rounds": len(rounds), "round.quarantine-after": 0, **FOUR}
    given = settings(**quick(name, **more, **{"lora.target-modules": "query"}))
    ran = federate({**given, "run.name": "attacked"}, Bad(in_turn, rounds=rounds))
    assert [r["accepted"] for r in ran.rounds[1:]] == [[0, 2, 3]] * len(rounds)
    without = federate({**given, "run.name": "without"}, Bad(silent, rounds=rounds))
    assert ran.adapter == without.adapter


@pytest.mark.slow
def test_without_the_bound_a_thousandfold_change_has_the_model(settings: Settings) -> None:
    """The counterexample: the default is what keeps it out."""
    given = settings(**quick("fedavg", **FOUR, **{"round.norm-bound": 0.0}))
    ran = spoilt(given, "attacked", scaled(1000.0))
    assert ran.rounds[1]["accepted"] == [0, 1, 2, 3]
    assert ran.adapter != spoilt(given, "without", silent).adapter


def test_a_head_is_held_against_the_others_heads(settings: Settings) -> None:
    ran = spoilt(settings(**quick("fedavg", **FOUR)), "attacked", head(100.0))
    (failure,) = ran.rounds[1]["failures"]
    assert "the change of its other tensors" in failure["reason"]


def test_a_round_in_which_the_bound_acts_names_the_client_and_all_lengths(
    settings: Settings,
) -> None:
    ran = spoilt(settings(**quick("fedavg", **FOUR)), "attacked", scaled(1000.0))
    found = ran.rounds[1]["bounds"]
    assert found["refused"] == [1]
    norms = {i: x["adapter"] for i, x in found["norms"].items()}
    assert norms["1"] > 4 * sorted(norms.values())[1]
    assert ran.rounds[1]["failures"][0]["kind"] == "bounds"
    assert "bounds" not in ran.rounds[0]


@pytest.mark.parametrize(
    ("lengths", "refused"),
    [
        ([1.0, 1.0, 1.0, 4.1], [3]),
        ([1.0, 1.0, 1.0, 3.9], []),
        ([1.0, 2.64, 0.3, 1.0], []),
        ([1.0, 1.0, 4.1], [2]),
        ([1.0, 50.0], []),  # of two nobody can say which is the odd one
        ([50.0], []),
        ([1.0, 701.0], [1]),  # but it is 100 times the weights that it changes
        ([701.0], [0]),
        ([0.0, 0.0, 0.0, 5.0], []),  # nothing moved: no measure
        ([1.0, 1.0, 1.0, math.inf], [3]),
        ([1.0, 1.0, 1.0, math.nan], [3]),
    ],
)
def test_the_median_needs_three_and_fewer_are_held_against_the_weights(
    lengths: list[float], refused: list[int]
) -> None:
    found = {i: {"adapter": x} for i, x in enumerate(lengths)}
    assert sorted(bounds.too_long(found, 4.0, longest=700.0)) == refused


def test_where_most_did_not_move_tensors_are_held_against_what_was_sent() -> None:
    """A does not move while B is 0, and a huge A would show in the next round only."""
    still = {"adapter": 0.0, "tensors": 0.0, "sent": 10.0}
    found = {i: {**still, "tensors": x} for i, x in enumerate([0.0, 0.0, 39.0, 41.0])}
    assert sorted(bounds.too_long(found, 4.0)) == [3]


def test_a_change_that_hides_in_its_factors_is_refused(settings: Settings) -> None:
    """1000 A and B / 1000 change nothing, and would have the mean of the A."""
    ran = spoilt(settings(**quick("fedavg", **FOUR)), "turned", in_factors(1e3))
    assert [r["accepted"] for r in ran.rounds[1:]] == [[0, 2, 3]] * 2
    assert "the change of its adapter's factors has norm" in ran.rounds[1]["failures"][0]["reason"]


@pytest.mark.slow
def test_by_its_product_alone_such_a_change_would_have_counted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterexample: the model that it makes is no honest one."""
    given = settings(**quick("fedavg", **FOUR))
    without = spoilt(given, "without", silent)
    monkeypatch.setattr(bounds, "WHAT", {"adapter": "adapter", "other": "other tensors"})
    turned = spoilt(given, "turned", in_factors(1e3))
    assert [r["accepted"] for r in turned.rounds[1:]] == [[0, 1, 2, 3]] * 2
    assert size_of(turned) > 50 * size_of(without)


def size_of(ran: Ran) -> float:
    """The norm of the products of the model that a run ended with."""
    found = dense_adapter(ran.directory / "adapter")
    return math.hypot(*(float(np.linalg.norm(x)) for x in found.values()))


# -- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ([500, 500, 500, 1_000_000], {3: 2000}),
        ([500, 500, 500, 1950], {}),  # 3.9 times the median is honest
        ([500, 500, 500, 2001], {3: 2000}),
        ([1, 1, 9], {2: 4}),
        ([1, 9], {}),  # of two nobody can say which is the odd one
        ([9], {}),
        ([], {}),
        ([1, 2**63, 2**63], {}),
    ],
)
def test_a_count_above_four_times_the_median_counts_as_that(
    counts: list[int], found: dict[int, int]
) -> None:
    assert bounds.capped(dict(enumerate(counts)), 4.0) == found
    assert bounds.capped(dict(enumerate(counts)), 0.0) == {}
    assert bounds.capped(dict(enumerate(counts)), 1e308) == {}


def test_a_million_examples_count_as_four_times_the_median_and_all_say_so(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """fedex promises (E), so its proof and its certificate are held against the capped weights."""
    given = settings(**quick("fedex", **FOUR))
    notes = Notes()

    def listen(server: FederatedLora) -> None:
        server.observer = notes

    app = Bad(metric("num-examples", 1_000_000), rounds=BOTH)
    ran = federate({**given, "run.name": "claims"}, app, listen)
    for line in ran.rounds[1:]:
        n = {i: c["examples"] for i, c in line["clients"].items()}
        most = 4 * int(statistics.median(n.values()))
        assert line["accepted"] == [0, 1, 2, 3]
        assert line["bounds"]["capped"] == {"1": {"examples": 1_000_000, "counted": most}}
        assert line["clients"]["1"]["counted"] == most
        assert not [x for i, x in line["clients"].items() if i != "1" and "counted" in x]
    said = [x for x in notes.said if "client 1 claims 1000000 examples and counts as" in x]
    assert len(said) == 2
    told = " ".join(trust.proof(run_files.read(ran.directory)))
    assert "client 1 counted as 4 times the round's median in rounds 1, 2" in told
    honest = spoilt(given, "honest", metric("num-examples", most))
    assert honest.adapter == ran.adapter
    assert not any("bounds" in line for line in honest.rounds)


@pytest.mark.slow
def test_without_the_cap_a_million_examples_own_the_model(settings: Settings) -> None:
    """The counterexample: nothing is left of the others."""
    given = settings(**quick("fedavg", **FOUR, **{"round.count-bound": 0.0}))
    app = metric("num-examples", 1_000_000)
    owned = spoilt(given, "owned", app)
    alone = federate({**given, "run.name": "alone"}, Bad(silent, (0, 2, 3), BOTH))
    mean = federate({**given, "run.name": "mean"})
    near, far = distance(owned, alone), distance(mean, alone)
    assert near < 0.01 * far


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("fedsa", "query.collect", {"strategy.fedsa.average-at-end": True}),
        ("fedsb", "train.gradient", {"strategy.fedsb.init-from": "update-approx"}),
    ],
)
def test_what_is_sent_beside_the_rounds_is_bounded_too(
    settings: Settings, name: str, kind: str, change: dict[str, object]
) -> None:
    """Lengths and claims of what fedsa collects at the end, and fedsb begins with."""
    given = settings(**quick(name, **FOUR, **change, **{"run.rounds": 1}))

    def app(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        i = context.node_config["partition-id"]
        if message.metadata.message_type != kind or i not in (1, 2):
            return reply
        spoil = scaled(100.0) if i == 1 else metric("num-examples", 1_000_000)
        found = spoil(message, reply, Bad(spoil))
        assert found
        return found

    notes = Notes()

    def listen(server: FederatedLora) -> None:
        server.observer = notes
        notes.client_failed = lambda i, why: notes.said.append(f"{i}: {why}")  # type: ignore[method-assign]

    federate(given, app, listen)
    assert any(re.match(r"1: the change of its .* has norm", x) for x in notes.said)
    assert any("client 2 claims 1000000 examples and counts as" in x for x in notes.said)


def distance(x: Ran, y: Ran) -> float:
    """Between the products of two runs' models."""
    a, b = (dense_adapter(r.directory / "adapter") for r in (x, y))
    return math.hypot(*(float(np.linalg.norm(a[m] - b[m])) for m in a))


# -- what waits, and sums -------------------------------------------------------------------------


def test_updates_that_wait_on_the_disk_are_the_same_bytes_and_leave_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(**quick("fedex", **FOUR))
    here = spoilt(given, "here", silent)
    monkeypatch.setattr(bounds, "IN_MEMORY", 0)
    there = spoilt(given, "there", silent)
    assert there.adapter == here.adapter
    assert not [*there.directory.glob(".updates*")]


SECURE = {**FOUR, "clients.ranks": "3", "secure.aggregation": True}
LIES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "its examples": (lambda x: np.concatenate([x[:1] + 100_000, x[1:]]), "has weight 100"),
    "its values": (lambda x: np.concatenate([x[:2], x[2:] + 2**30]), "secure.clipping-range"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_sum_that_no_honest_clients_have_is_never_committed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    """Who it was cannot be told, so the run stops with the state before it."""
    from fedlora.federation.secure import vector

    spoil, reason = LIES[lie]
    encode, calls = vector.encode, [0]

    def lying(*args: Any) -> Any:
        words = encode(*args)
        if sys._getframe(1).f_code.co_name != "secagg_collect":  # the server measures with it
            return words
        calls[0] += 1
        return spoil(words).astype(words.dtype) if calls[0] == 2 else words

    monkeypatch.setattr(vector, "encode", lying)
    given = settings(**quick("fedavg", **SECURE))
    with pytest.raises(RoundError, match=f"the sum of 4 clients .*{reason}"):
        federate(given)


def test_a_sum_far_longer_than_the_weights_is_none(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def look(setting: Any, state: Any, sums: Any, round: Any, n: int, most: float) -> str:
        seen.append(judge(setting, state, sums, round, n, most))
        seen.append(judge(setting, state, sums, round, n, 1e-9))
        return ""

    judge = bounds.implausible
    monkeypatch.setattr(bounds, "implausible", look)
    federate(settings(**quick("fedavg", **SECURE, **{"run.rounds": 1})))
    assert seen[0] == ""
    assert "100 times that of the weights" in seen[1]


def test_doctor_and_report_say_that_no_client_of_a_sum_is_bounded(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    given = settings(**quick("fedavg", **SECURE, **{"run.rounds": 1}))
    (file := tmp_path / "x.toml").write_text(tomli_w.dumps(given))
    assert examine(file, {}) == 0
    assert "no bound on a single client can be enforced" in capsys.readouterr().out
    told = dict(trust.left(run_files.read(federate(given).directory)))
    assert told["Bound on one client"].startswith("none")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clients.count": 2}, "no majority to judge by"),
        ({**FOUR, "round.norm-bound": 0.5}, "trains more than 0.5 times the steps"),
        ({**FOUR, "round.count-bound": 0.5}, "training rows and will count as"),
    ],
)
def test_the_doctor_says_where_the_median_is_no_measure(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    says: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    given = settings(**quick("fedavg", **changes))
    (file := tmp_path / "x.toml").write_text(tomli_w.dumps(given))
    assert examine(file, {}) == 0
    assert says in capsys.readouterr().out


def test_too_few_that_are_left_stop_the_run(settings: Settings) -> None:
    given = settings(**quick("fedavg", **FOUR, **{"round.min-replies": 4}))
    with pytest.raises(RoundError, match=r"3 updates were accepted.*round\.norm-bound"):
        spoilt(given, "attacked", scaled(1000.0))


def test_where_a_bound_of_ones_own_let_them_through_the_round_goes_again_without_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no honest client sends makes the new state NaN: it is never committed."""
    from fedlora.strategies.fedavg import FedAvg

    aggregate, rounds = FedAvg.aggregate, []

    def fragile(self: FedAvg, state: Any, uploads: Any, round: Any) -> Any:
        after = aggregate(self, state, uploads, round)
        rounds.append(round.number)
        if max(float(B.abs().max()) for B in after.B.values()) > 5:
            next(iter(after.B.values()))[0, 0] = math.nan
        return after

    monkeypatch.setattr(FedAvg, "aggregate", fragile)
    given = settings(**quick("fedavg", **FOUR, **{"round.norm-bound": 0.0}))
    notes = Notes()

    def listen(server: FederatedLora) -> None:
        server.observer = notes

    app = Bad(scaled(1000.0), rounds=(1,))
    ran = federate({**given, "run.name": "attacked"}, app, listen)
    assert rounds == [1, 1, 2]
    assert ran.rounds[1]["accepted"] == [0, 2, 3]
    assert ran.rounds[1]["bounds"]["refused"] == [1]
    assert "holds NaN or Inf" in ran.rounds[1]["again"]
    assert any("It is played again" in x for x in notes.said)
    assert "again" not in ran.rounds[2]
    without = federate({**given, "run.name": "without"}, Bad(silent, rounds=(1,)))
    assert ran.adapter == without.adapter


def test_a_model_that_is_no_number_is_never_committed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever made it so: the strategy's own arithmetic, here."""
    from fedlora.strategies.fedavg import FedAvg

    aggregate = FedAvg.aggregate

    def broken(self: FedAvg, state: Any, uploads: Any, round: Any) -> Any:
        after = aggregate(self, state, uploads, round)
        if round.number == 2:
            next(iter(after.B.values()))[0, 0] = math.nan
        return after

    given = settings(**quick("fedavg", **FOUR))
    monkeypatch.setattr(FedAvg, "aggregate", broken)
    with pytest.raises(RoundError, match=r"round 2: the new model holds NaN or Inf.*resume"):
        federate(given)
    monkeypatch.undo()
    resumed = federate({**given, "run.resume": True})
    whole = federate({**given, "run.name": "whole"})
    assert resumed.adapter == whole.adapter
