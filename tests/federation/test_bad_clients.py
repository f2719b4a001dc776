"""Clients that fail, lie or send rubbish: each costs its own reply, and never the run."""

import math
import pickle
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

from client_app.app import app as client_app
from fedlora.errors import RoundError
from tests.federation.test_federation import AtFirst, dense_adapter, nested
from tests.support.long import few
from tests.support.tiny_federation import Ran, federate, quick

Settings = Callable[..., dict[str, object]]
Spoil = Callable[[Message, Message, "Bad"], Message | None]


@dataclass
class Bad:
    """The real ClientApp, but for what chosen clients do to their replies in chosen rounds."""

    spoil: Spoil
    clients: tuple[int, ...] = (1,)
    rounds: tuple[int, ...] = (2,)
    kept: dict[tuple[int, int], Message] = field(default_factory=dict)

    def __call__(self, message: Message, context: Context) -> Message | None:
        reply = client_app(message, context)
        if message.metadata.message_type != "train":
            return reply
        job = message.content.config_records["job"]
        client, round = int(job["client"]), int(job["round"])  # type: ignore[arg-type]
        self.kept[client, round] = reply
        if client in self.clients and round in self.rounds:
            return self.spoil(message, reply, self)
        return reply


def arrays(reply: Message) -> ArrayRecord:
    return reply.content.array_records["sent"]


def first_key(reply: Message) -> str:
    return next(iter(arrays(reply)))


def poison(value: float) -> Spoil:
    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        old = arrays(reply)[first_key(reply)]
        x = np.frombuffer(old.data, dtype=np.float32).copy()
        x[len(x) // 2] = value
        arrays(reply)[first_key(reply)] = Array(
            dtype=old.dtype, shape=old.shape, stype=old.stype, data=x.tobytes()
        )
        return reply

    return spoil


def reshape(shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Spoil:
    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        old = arrays(reply)[first_key(reply)]
        arrays(reply)[first_key(reply)] = Array(
            dtype=old.dtype, shape=shape(tuple(old.shape)), stype=old.stype, data=old.data
        )
        return reply

    return spoil


def metric(name: str, value: Any) -> Spoil:
    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        reply.content["metrics"] = MetricRecord(
            {**reply.content.metric_records["metrics"], name: value}
        )
        return reply

    return spoil


def tagged(**changes: Any) -> Spoil:
    def spoil(_: Message, reply: Message, __: Bad) -> Message:
        reply.content["reply"] = ConfigRecord({**reply.content.config_records["reply"], **changes})
        return reply

    return spoil


def fails(*_: Any) -> Message:
    raise RuntimeError("out of memory, say")


def error(message: Message, *_: Any) -> Message:
    return Message(Error(7, "battery empty"), reply_to=message)


def nothing(*_: Any) -> None:
    return None


def without(record: str) -> Spoil:
    def spoil(message: Message, reply: Message, _: Bad) -> Message:
        records = {k: v for k, v in reply.content.items() if k != record}
        return Message(RecordDict(records), reply_to=message)

    return spoil


def missing(_: Message, reply: Message, __: Bad) -> Message:
    del arrays(reply)[first_key(reply)]
    return reply


def more(_: Message, reply: Message, __: Bad) -> Message:
    reply.content["more"] = ConfigRecord({"x": bytes(10_000)})
    return reply


def extra(_: Message, reply: Message, __: Bad) -> Message:
    arrays(reply)["A/smuggled"] = arrays(reply)[first_key(reply)]
    return reply


def earlier(message: Message, _: Message, bad: Bad) -> Message:
    return Message(bad.kept[1, 1].content, reply_to=message)


def anothers(message: Message, _: Message, bad: Bad) -> Message:
    return Message(bad.kept[0, 2].content, reply_to=message)


def foreign(_: Message, reply: Message, __: Bad) -> Message:
    arrays(reply)[first_key(reply)] = Array(np.zeros((2, 24), dtype=np.float32))
    return reply


def pickled(_: Message, reply: Message, __: Bad) -> Message:
    arrays(reply)[first_key(reply)] = Array(
        dtype="float32", shape=(3, 24), stype="fedlora.float32", data=pickle.dumps([1.0])
    )
    return reply


SPOILT: dict[str, tuple[Spoil, str]] = {
    "raises": (fails, "out of memory"),
    "error reply": (error, "battery empty"),
    "no reply object": (nothing, "no reply"),
    "NaN": (poison(math.nan), "holds NaN or Inf"),
    "Inf": (poison(math.inf), "holds NaN or Inf"),
    "-Inf": (poison(-math.inf), "holds NaN or Inf"),
    "turned": (reshape(lambda s: s[::-1]), "shape .* must be"),
    "huge": (reshape(lambda s: (2**40, *s[1:])), "shape .* must be"),
    "missing tensor": (missing, "missing: "),
    "extra record": (more, "records that nobody asked for: 'more'"),
    "extra tensor": (extra, "too many: A/smuggled"),
    "foreign type": (foreign, "none of ours"),
    "pickle": (pickled, "bytes, must be"),
    "another round's": (earlier, "client 1's of round 1, not client 1's of round 2"),
    "another client's": (anothers, "client 0's of round 2, not client 1's"),
    "another run's": (tagged(token="other"), "of another run"),
    "no examples": (metric("num-examples", 0), "num-examples = 0"),
    "negative examples": (metric("num-examples", -1), "num-examples = -1"),
    "more examples than there are": (metric("num-examples", 2**62), "at most round.max-examples"),
    "fractional examples": (metric("num-examples", 2.5), r"num-examples = 2\.5"),
    "list of examples": (metric("num-examples", [3]), r"num-examples = \[3\]"),
    "loss is a list": (metric("loss", [1.0, 2.0]), "loss"),
    "seconds are a list": (metric("seconds", [1]), "seconds"),
    "score is a list": (metric("before.accuracy", [1.0]), "accuracy"),
    "no metrics": (without("metrics"), "lacks 'metrics'"),
    "no tensors": (without("sent"), "lacks 'sent'"),
    "no tag": (without("reply"), "lacks 'reply'"),
}


@pytest.mark.parametrize("what", few(SPOILT, *[*SPOILT][::3]))
def test_a_bad_reply_is_refused_with_client_round_and_reason(settings: Settings, what: str) -> None:
    spoil, reason = SPOILT[what]
    given = quick("fedex", **{"output.keep-updates": True, "lora.target-modules": "query"})
    first = AtFirst()
    ran = federate(settings(**given), Bad(spoil), before=first.watch)
    assert [len(r["failures"]) for r in ran.rounds] == [0, 0, 1]
    (failure,) = ran.rounds[2]["failures"]
    assert (failure["client"], failure["round"]) == (1, 2)
    assert re.search(reason, failure["reason"]), failure["reason"]
    assert ran.rounds[2]["accepted"] == [0, 2]
    assert "1" not in ran.rounds[2]["clients"]
    assert_only_the_others_count(ran, first)


def assert_only_the_others_count(ran: Ran, first: AtFirst) -> None:
    """The shipped model is the sum over those that were accepted, p_i over them alone."""
    got = dense_adapter(ran.directory / "adapter")
    assert got
    for m in got:
        want = nested(ran, m, first.factors)
        assert np.linalg.norm(got[m] - want) < 1e-4 * np.linalg.norm(want)


def test_a_loss_that_is_no_number_costs_nothing_but_itself(settings: Settings) -> None:
    """A diverged loss is news, not a lie: the update is finite, so it counts."""
    ran = federate(settings(**quick("fedex")), Bad(metric("loss", math.nan)))
    assert not ran.rounds[2]["failures"]
    assert ran.rounds[2]["accepted"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["fedsa", "fedex", "flora"])
def test_one_whose_reply_was_refused_goes_on_where_the_server_last_saw_it(
    settings: Settings, name: str
) -> None:
    given = quick(name, **{"run.rounds": 4})
    ran = federate(settings(**given), Bad(poison(math.nan), (1,), (2,)))
    assert [r["accepted"] for r in ran.rounds[1:]] == [[0, 1, 2], [0, 2], [0, 1, 2], [0, 1, 2]]


def test_fewer_than_min_replies_stop_the_run(settings: Settings) -> None:
    given = settings(**quick("fedex", **{"round.min-replies": 3}))
    with pytest.raises(RoundError, match=r"round 2: 2 updates .*min-replies = 3.*client 1: .*NaN"):
        federate(given, Bad(poison(math.nan)))


@pytest.mark.parametrize("name", ["fedex", "fedsa"])
def test_when_all_fail_the_run_stops_and_resumes_to_the_same_bytes(
    settings: Settings, name: str
) -> None:
    given = settings(**quick(name, **{"run.rounds": 3}))
    with pytest.raises(RoundError, match=r"round 2: 0 updates .* resume"):
        federate(given, Bad(poison(math.nan), (0, 1, 2), (2,)))
    ran = federate({**given, "run.resume": True})
    whole = federate({**given, "run.name": "whole"})
    assert [r["round"] for r in ran.rounds] == [0, 1, 2, 3]
    assert ran.adapter == whole.adapter


def test_a_client_that_never_answers_is_left_out_at_the_deadline(settings: Settings) -> None:
    def sleeps(_: Message, reply: Message, __: Bad) -> Message:
        time.sleep(8)
        return reply

    given = quick("fedex", **{"simulate.workers": 2, "round.deadline": 4.0})
    ran = federate(settings(**given), Bad(sleeps))
    (failure,) = ran.rounds[2]["failures"]
    told = {"kind": "late", "reason": "no reply within 4 s"}
    assert failure == {"client": 1, "round": 2, **told}
    assert ran.rounds[2]["accepted"] == [0, 2]
