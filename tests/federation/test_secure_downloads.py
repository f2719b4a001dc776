"""A server that trains one member of a sum on another model than all others reads no sum.

The others would be sent one that teaches nothing: the sum is then that member's update.
"""

import copy
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client_app.app import app as client_app
from fedlora.config.reader import Config
from fedlora.errors import PrivacyError, RoundError
from fedlora.federation.client import handlers
from fedlora.federation.client.agreed_base import check_base, check_whole
from fedlora.federation.client.job import ClientJob
from fedlora.federation.secure.agreement import Agreement, RoundName
from fedlora.federation.server import secure_cohort
from fedlora.federation.wire.codes import FailureKind
from fedlora.federation.wire.job import Job
from fedlora.federation.wire.messages import pack, pack_download, pack_pairs
from fedlora.federation.wire.sent_digest import digest_of
from fedlora.lora.adapter import Factors, Pair
from fedlora.strategies.base import Download, Penalty, Version
from fedlora.training import cache
from fedlora.training.model.model import Model
from tests.federation.test_secure_aggregation import Lossy, five, play
from tests.federation.test_secure_stories import Liar

Settings = Callable[..., dict[str, object]]
VICTIM = 0


def no_factors(message: Message) -> None:
    """All factors 0: then no factor has a gradient."""
    sent = message.content.array_records["send"]
    for key, x in [*sent.items()]:
        if key.startswith(("A", "B")):
            sent[key] = pack(torch.zeros(tuple(x.shape)), "float32")


def no_factors_in_a_form_of_their_own(message: Message) -> None:
    no_factors(message)
    message.content["more"] = ArrayRecord({"x": pack(torch.zeros(1), "float32")})


def job(**changes: Any) -> Callable[[Message], None]:
    def change(message: Message) -> None:
        message.content["job"] = ConfigRecord({**message.content["job"], **changes})  # type: ignore[dict-item]

    return change


def told_to_all_but_one(change: Callable[[Message], None]) -> Liar:
    return Liar(lambda client, message: change(message) if client != VICTIM else None)


@pytest.mark.parametrize(
    "change", [no_factors_in_a_form_of_their_own, job(**{"base-number": 1})], ids=["form", "base"]
)
def test_members_that_are_sent_something_else_than_one_send_nothing(
    settings: Settings, change: Callable[[Message], None]
) -> None:
    liar = told_to_all_but_one(change)
    with pytest.raises(RoundError):
        play(settings(**five("fedavg")), app=liar)
    for i in range(1, 5):
        assert "was sent something else than all members were told" in liar.replies[i].error.reason


DERIVED = {
    "round": "name", "token": "name", "incarnation": "name", "since": "name", "config": "name",
    "changes": "name",  # by the config's digest
    "client": "the table", "memory-round": "the table: does it begin with what it kept?",
    "last-round": "what rounding lost is added in the clear alone", "microbatch": "its parts",
    "ledger": "what was charged", "charges": "what was charged",
}  # fmt: skip
"""Fields of a job that are in no digest of what is sent, and what says them to all, or what they
decide and no sum."""


def whole() -> RecordDict:
    """A download with all that one may have, and its job."""
    pair = Pair(torch.ones(2, 3), torch.ones(4, 2), 2.0)
    factors = Factors({"m": 2.0}, {"m": torch.ones(2, 3)}, {"m": torch.ones(4, 2)})
    download = Download(factors, frozenset({"A"}), (Version(1, {"m": pair}),), {"m": pair},
                        Penalty("tail", 0.1, {"m": 1}), 2)  # fmt: skip
    told = Job(1, "run", "start", 0, {"m": 2}, 3, 1, "print", ("x", "y"), 2, (2,), "code", "config",
               {"train.lr": 1.0}, 4, 5, 6, 7)  # fmt: skip
    offset = {"base-offset": pack_pairs({"m": pair}, "float32")}
    return RecordDict({**pack_download(download, "float32"), **offset, "job": told.record()})


def test_whatever_a_client_is_sent_is_in_its_digest() -> None:
    """Each array and setting, changed by itself; but for fields of the job that are agreed on
    otherwise, which a new field is not until somebody says how."""
    content = whole()
    before = digest_of(content)
    tried = 0
    for name, record in content.items():
        for key in record:
            other = copy.deepcopy(content)
            value = other[name][key]  # type: ignore[index]
            other[name][key] = changed(value)  # type: ignore[index]
            same = digest_of(other)[1] == before[1]
            assert same == (name == "job" and key in DERIVED), f"{name}, {key}"
            tried += 1
    assert tried > 25
    lacking = RecordDict({name: x for name, x in content.items() if name != "base-offset"})
    assert digest_of(lacking)[1] != before[1]


def changed(value: Any) -> Any:
    if isinstance(value, Array):
        data = bytes([value.data[0] ^ 1]) + value.data[1:]
        return Array(value.dtype, value.shape, value.stype, data)
    if isinstance(value, list):
        return value[1:] if value else ["more"]
    return f"{value}x" if isinstance(value, str) else value + 1


def test_without_that_the_sum_would_be_the_update_of_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, trained = handlers.trained, dict[int, Any]()

    def kept(works: Any) -> Iterator[Any]:
        for work, done in honest(works):
            trained[work.job.client] = done
            yield work, done

    monkeypatch.setattr(handlers, "trained", kept)
    monkeypatch.setattr(Agreement, "check_sent", lambda *_: None)
    got = play(settings(**five("fedavg")), app=told_to_all_but_one(no_factors))
    one, N = trained[VICTIM], sum(done.examples for done in trained.values())
    for m, B in one.sent.B.items():
        read = got.factors.B[m] * N / one.examples
        assert float(B.norm()) > 0
        assert torch.allclose(read, B, rtol=0, atol=1e-5 * N / one.examples)


def test_two_configs_of_one_short_digest_are_two_all_the_same(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 bits two that are alike can be searched for; all but one would train at no rate."""
    monkeypatch.setattr(Config, "identity", lambda _: "0" * 16)
    told = five("fedavg")
    said: dict[int, str] = {}

    def app(message: Message, context: Context) -> Message:
        if (client := int(context.node_config["partition-id"])) != VICTIM:
            context.run_config = {**context.run_config, "train.lr": 1e-12}
        reply = client_app(message, context)
        if reply.has_error():
            said[client] = reply.error.reason
        return reply

    with pytest.raises(RoundError):
        play(settings(**told), app=app)
    assert {*said} == {1, 2, 3, 4}
    assert all("is of another run, round or config" in reason for reason in said.values())


def test_the_agreement_names_all_of_the_configs_digest() -> None:
    config = Config.read({"data.path": "x"})
    name = RoundName(config.digest(), "run", 1, "start")
    assert len(name.config) == 64
    assert config.digest() != Config.read({"data.path": "x", "train.lr": 0.5}).digest()
    assert config.digest().startswith(config.identity())


FEDSA = {"strategy.fedsa.average-at-end": False, "run.rounds": 2}


def test_who_is_told_to_begin_anew_beside_one_that_goes_on_sends_nothing(
    settings: Settings,
) -> None:
    """With a B of 0 their A has no gradient: the sum of A would be of the one that goes on."""

    def anew(client: int, message: Message) -> None:
        if client != VICTIM:
            job(**{"memory-round": 0})(message)

    liar = Liar(anew)
    with pytest.raises(RoundError):
        play(settings(**five("fedsa", **FEDSA)), app=liar)
    for i in range(1, 5):
        assert "begins with what it kept, or not" in liar.replies[i].error.reason


@pytest.mark.parametrize(
    ("name", "late", "there"),
    [
        ("fedsa", (1,), [0, 2, 3, 4]),
        pytest.param("fedsa", (1, 3), [0, 1, 2, 3, 4], marks=pytest.mark.slow),
        ("ffa", (1,), [0, 1, 2, 3, 4]),
    ],
)
def test_a_newcomer_is_in_the_sum_where_it_begins_as_the_others_or_is_not_alone(
    settings: Settings, name: str, late: tuple[int, ...], there: list[int]
) -> None:
    """What fedsa keeps at home a newcomer has not; ffa's A and frlora's base are sent to all."""
    given = settings(**five(name, **(FEDSA if name == "fedsa" else {"run.rounds": 2})))
    got = play(given, app=Lossy("setup", late, rounds=(1,)))
    assert got.last["accepted"] == there
    alone = [f for f in got.last["failures"] if f["kind"] == FailureKind.ONLY_OF_ITS_RANKS]
    assert [f["client"] for f in alone] == [i for i in range(5) if i not in there]
    assert all("that begins as it does" in f["reason"] for f in alone)


def test_a_base_that_came_in_another_round_is_not_trained_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rounds over other clients: those would have another base, and each its own in a sum."""
    monkeypatch.setattr(secure_cohort, "_alike", lambda *args: ([*args[3]], set()))
    with pytest.raises(RoundError, match="a base of which a part was sent in other rounds"):
        play(settings(**five("frlora", **{"run.rounds": 2})))


def test_a_head_that_an_earlier_message_left_is_not_trained_on(settings: Settings) -> None:
    """A head of 0, left by a download of one client's own, teaches its factors nothing."""
    config = Config.read(settings(**five("fedavg")))
    labels = cache.corpus(config).labels
    model = Model(config, labels)
    whole = model.read()
    model.load(whole)
    check_whole(whole, model)
    lacks = Factors(whole.scale, whole.A, whole.B)
    model.load(lacks)
    with pytest.raises(PrivacyError, match=r"to train a model of which .* was not sent"):
        check_whole(lacks, model)


def other_base(message: Message) -> None:
    """A change of the base, under the number of the one that all are sent, which is another."""
    for key, x in message.content.array_records["base-1"].items():
        if key.startswith(("A", "B")):
            message.content.array_records["base-1"][key] = pack(torch.ones(tuple(x.shape)), x.dtype)


@pytest.mark.slow
def test_a_base_that_an_earlier_message_left_in_the_process_is_not_trained_on(
    settings: Settings,
) -> None:
    """Of the same start, under the same number: it was not looked at again, whatever came."""
    given = settings(**five("frlora", **{"run.rounds": 2}))
    poisoned: list[int] = []

    def app(message: Message, context: Context) -> Message:
        second = message.content["job"]["base-number"] == 1 if "job" in message.content else False  # type: ignore[index]
        if second and message.metadata.message_type == "train.secagg_collect":
            changes = {"secure.aggregation": False}  # in a sum nothing is scored
            config = Config.read({**context.run_config, **changes}).identity()
            for number in (0, 1):  # away from the honest change, and to the other one
                content = RecordDict(dict(copy.deepcopy(message.content).items()))
                del content["secagg"]
                asked = Message(content, context.node_id, "evaluate", ttl=60.0)
                other_base(asked)
                of = {"changes": json.dumps(changes), "config": config, "base-number": number}
                job(**of)(asked)
                assert client_app(asked, context).has_content()
            poisoned.append(context.node_id)
        return client_app(message, context)

    want = play(given)
    got = play({**given, "run.name": "poisoned"}, app=app)
    assert len(poisoned) == 5
    assert got.ran.adapter == want.ran.adapter


def test_a_sum_begins_its_base_anew_and_other_messages_go_on_from_it() -> None:
    job = SimpleNamespace(token="run", incarnation="start")
    plain, summed = (
        ClientJob.token.fget(SimpleNamespace(job=job, probes=x)) for x in ("", "agreed")
    )
    assert (plain, summed) == ("run/start", "run/start/agreed")


def test_a_base_is_agreed_on_from_its_first_change_or_a_snapshot() -> None:
    """And what an initialisation takes out of it comes with the message, or nothing does."""
    changes = [Version(n, {}) for n in (1, 2, 3)]
    for came, offset in ((changes, True), ([Version(2, {}, True), changes[2]], True)):
        check_base(came, 3, offset)
        with pytest.raises(PrivacyError, match="of which a part was sent in other rounds"):
            check_base(came[1:], 3, offset)
        with pytest.raises(PrivacyError, match="of which a part was sent in other rounds"):
            check_base(came, 3, False)
    check_base([], 0, True)


def test_all_members_of_a_kind_are_sent_the_same_whatever_each_has(settings: Settings) -> None:
    seen: dict[int, Any] = {}

    def app(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "train.secagg_collect":
            content = message.content
            seen[context.node_id] = {k: content[k] for k in content if k not in ("job", "secagg")}
        return lossy(message, context)

    lossy = Lossy("setup", (1,), rounds=(1,))
    play(settings(**five("frlora", **{"run.rounds": 2})), app=app)
    one, *others = seen.values()
    assert len(others) == 4  # the newcomer to a moving base among them
    assert all(x == one for x in others)
