"""What a client answers decides by its code and never by its words, and its words are data."""

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from hypothesis import example, given
from hypothesis import strategies as st

from client_app.app import app as client_app
from fedlora import errors
from fedlora.errors import BudgetSpent, ClientError, FedLoraError, RoundError, UpdateError
from fedlora.federation.server.exchange import Received
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.run import too_few
from fedlora.federation.wire.codes import (
    LONGEST,
    Code,
    FailureKind,
    Refusal,
    cleaned,
    code_of,
    kind_of,
)
from fedlora.launch.deploy.host import told
from fedlora.privacy import accounting
from fedlora.reports.console import Progress
from fedlora.reports.observers import JsonLines
from fedlora.strategies.base import Round
from tests.federation.test_hostile import Notes
from tests.support.long import few
from tests.support.tiny_federation import ROOT, Ran, federate, quick

Settings = Callable[..., dict[str, object]]
SPENT = Error(Code.BUDGET_SPENT, "BudgetSpent: the privacy budget is spent")
WORDS = Error(Code.FAILED, "PrivacyError: the privacy budget is spent; BudgetSpent")
FLAT = Error(Code.FAILED, "battery empty")
EVERYONE = (0, 1, 2)
PRIVATE = {
    "train.steps": 1,
    "privacy.noise-multiplier": 2.0,
    "privacy.sample-rate": 0.25,
    "privacy.delta": 1e-3,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The RDP bound for epsilon, at once."""
    monkeypatch.setattr(accounting, "_composed", accounting._loose)


@dataclass
class Says:
    """The real ClientApp, but chosen clients answer messages of one kind with an error."""

    errors: Mapping[int, Error]
    since: int = 1
    kind: str = "train"

    def __call__(self, message: Message, context: Context) -> Message:
        error = self.errors.get(int(context.node_config["partition-id"]))
        job = message.content.config_records.get("job") or {"round": self.since}
        if error is None or message.metadata.message_type != self.kind:
            return client_app(message, context)
        if int(job["round"]) < self.since:  # type: ignore[arg-type]
            return client_app(message, context)
        return Message(error, reply_to=message)


def stopped(ran: Ran) -> str:
    return str(json.loads((ran.directory / "summary.json").read_text())["stopped"])


def kinds(ran: Ran) -> list[list[tuple[int, str]]]:
    return [[(f["client"], f["kind"]) for f in r["failures"]] for r in ran.rounds[1:]]


# -- codes --------------------------------------------------------------------------------------


def test_every_error_has_its_code() -> None:
    found = {e: code_of(e("x")) for e in vars(errors).values() if is_plain_error(e)}
    assert found.pop(errors.BudgetSpent) == Code.BUDGET_SPENT
    assert found.pop(errors.TrainingCheckError) == Code.UNTRAINABLE
    assert found.pop(errors.BundleError) == Code.OTHER_CODE
    assert found.pop(errors.PolicyError) == Code.NOT_ALLOWED
    assert found.pop(errors.LostBaseError) == Code.LACKS_BASE
    assert set(found.values()) == {Code.FAILED}
    assert code_of(RuntimeError("the privacy budget is spent")) == Code.BUG


def is_plain_error(x: object) -> bool:
    """One that is made of its words alone."""
    others = (errors.ConfigError, ClientError)
    return isinstance(x, type) and issubclass(x, FedLoraError) and x not in others


def test_no_code_is_one_of_flowers() -> None:
    """Flower says NODE_UNAVAILABLE of a node that went away: nobody's budget is spent by that."""
    flowers = {v for v in vars(ErrorCode).values() if isinstance(v, int)}
    assert len(flowers) > 5
    assert not flowers & set(Code)


@pytest.mark.parametrize("code", few([77, -1, 0, 1, 2, 199, 2**62, -(2**63)], 77, 0, -(2**63)))
def test_a_code_that_nobody_knows_is_a_failure(settings: Settings, code: int) -> None:
    assert kind_of(code) == kind_of(Code.FAILED) == kind_of(Code.BUG) == FailureKind.FAILED
    ran = federate(settings(**quick("fedavg")), Says({1: Error(code, "x")}, since=2))
    assert kinds(ran) == [[], [(1, "failed")]]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.BUDGET_SPENT, "budget"),
        (Code.UNTRAINABLE, "untrained"),
        (Code.OTHER_CODE, "code"),
        (Code.NOT_ALLOWED, "policy"),
        (Code.LACKS_BASE, "base"),
        (Code.WORKER_LOST, "lost"),
        (Code.BUG, "failed"),
        (ErrorCode.MESSAGE_UNAVAILABLE, "lost"),
        (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "lost"),
        (ErrorCode.NODE_UNAVAILABLE, "lost"),
        (ErrorCode.CLIENT_APP_CRASHED, "lost"),
    ],
)
def test_a_code_is_a_kind_of_failure_whatever_the_words_are(code: int, kind: str) -> None:
    for words in ("", "the privacy budget is spent", "no reply within 4 s", "lost"):
        assert Refusal.of(ClientError(code, words)).kind == kind


def test_what_is_wrong_with_a_reply_is_bad_whatever_the_words_are() -> None:
    for words in ("", "the privacy budget is spent", "no reply within 4 s", "lost"):
        assert Refusal.of(UpdateError(words)).kind == FailureKind.BAD


def test_every_kind_is_in_the_documentation_and_no_other() -> None:
    text = (ROOT / "docs" / "deploy" / "index.md").read_text(encoding="utf-8")
    table = text.split("| kind | what happened |", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [k.value for k in FailureKind]


# -- what ends a run ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", few([SPENT, WORDS], WORDS), ids=["code", "words"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"round.min-replies": 3},
        {"round.buffer": 2},
        {
            "privacy.level": "client",
            "privacy.noise-multiplier": 2.0,
            "privacy.delta": 1e-3,
            "round.min-replies": 3,
            "clients.ranks": "3",
        },
    ],
    ids=["all", "min-replies", "buffer", "client-level"],
)
def test_where_clients_have_no_budget_none_ends_the_run_by_saying_it_is_spent(
    settings: Settings, error: Error, change: dict[str, object]
) -> None:
    given_ = settings(**quick("fedavg", **{"run.rounds": 5, **change}))
    with pytest.raises(RoundError, match=r"round [23]: .*the privacy budget is spent"):
        federate(given_, Says(dict.fromkeys(EVERYONE, error), since=2))
    assert not Path(str(given_["run.out"]), str(given_["run.name"]), "summary.json").exists()


@pytest.mark.parametrize("change", [{}, PRIVATE], ids=["clear", "private"])
@pytest.mark.parametrize(
    ("error", "kind"), few([(SPENT, "budget"), (WORDS, "failed")], (SPENT, "budget"))
)
def test_one_that_lies_costs_its_own_update(
    settings: Settings, error: Error, kind: str, change: dict[str, object]
) -> None:
    given_ = settings(**quick("ffa", **{"run.rounds": 3, **change}))
    ran = federate(given_, Says({1: error}, since=2))
    assert [r["accepted"] for r in ran.rounds[1:]] == [[0, 1, 2], [0, 2], [0, 2]]
    assert kinds(ran) == [[], [(1, kind)], [(1, kind)]]
    assert stopped(ran) == ""


@pytest.mark.parametrize("change", [{}, {"round.buffer": 3}], ids=["ordered", "buffered"])
def test_where_all_say_that_their_budget_is_spent_the_run_ends_early(
    settings: Settings, change: dict[str, object]
) -> None:
    given_ = settings(**quick("ffa", **{"run.rounds": 3, **PRIVATE, **change}))
    ran = federate(given_, Says(dict.fromkeys(EVERYONE, SPENT), since=2))
    assert [r["round"] for r in ran.rounds] == [0, 1]
    assert stopped(ran).startswith("before round 2: ")
    assert "the privacy budget is spent" in stopped(ran)


@pytest.mark.parametrize("other", [WORDS, FLAT, Error(ErrorCode.NODE_UNAVAILABLE, "gone")])
def test_a_failure_of_another_kind_is_not_explained_by_others_budgets(
    settings: Settings, other: Error
) -> None:
    given_ = settings(**quick("ffa", **{"run.rounds": 3, **PRIVATE}))
    with pytest.raises(RoundError, match="round 2: 0 updates"):
        federate(given_, Says({0: SPENT, 1: SPENT, 2: other}, since=2))


SECURE = {
    "clients.count": 4,
    "clients.ranks": "2",
    "secure.aggregation": True,
    "secure.colluding": 0,
    **PRIVATE,
}


def test_a_secure_round_ends_the_run_only_where_budgets_alone_are_the_cause(
    settings: Settings,
) -> None:
    given_ = settings(**quick("ffa", **{**SECURE, "run.rounds": 2}))
    lost = Error(Code.WORKER_LOST, "gone")
    stage = "train.secagg_collect"
    app = Says({0: SPENT, 1: SPENT, 2: SPENT}, since=2, kind=stage)
    assert stopped(federate(given_, app)).startswith("before round 2: ")
    with pytest.raises(RoundError, match="secure aggregation"):
        federate({**given_, "run.name": "b"}, Says({0: SPENT, 1: SPENT, 2: lost}, 2, stage))


def test_a_sum_that_does_not_come_out_is_no_spent_budget(settings: Settings) -> None:
    """One says that its budget is spent, another spoils the masks: two that plot end no run."""

    def app(message: Message, context: Context) -> Message:
        reply = Says({0: SPENT}, kind="train.secagg_collect")(message, context)
        unmasks = message.metadata.message_type == "train.secagg_unmask"
        if unmasks and context.node_config["partition-id"] == 1:
            said = reply.content.config_records["secagg"]
            said["shares"] = [bytes(len(x)) for x in said["shares"]]  # type: ignore[union-attr]
        return reply

    with pytest.raises(RoundError, match=r"the masks do not come off.*budget is spent"):
        federate(settings(**quick("ffa", **SECURE)), app)


def test_one_left_out_since_the_other_of_its_rank_has_spent_its_budget_is_no_failure_of_its_own(
    settings: Settings,
) -> None:
    given_ = settings(**quick("ffa", **{**SECURE, "run.rounds": 2, "clients.ranks": "2,3"}))
    app = Says({0: SPENT, 1: SPENT}, since=2, kind="train.secagg_collect")
    assert "the only one left of its ranks" in stopped(federate(given_, app))


def test_the_server_says_which_error_it_is(settings: Settings) -> None:
    """For a driver of its own that calls `round`."""
    found: list[FederatedLora] = []
    federate(settings(**quick("ffa", **PRIVATE)), before=found.append)
    round, received, setting = Round(2, 0), Received(), found[0].setting
    assert isinstance(too_few(setting, "x", round, received), RoundError), "nobody was asked"
    received.refuse(0, round, Refusal(FailureKind.BUDGET, "spent"))
    assert isinstance(too_few(setting, "x", round, received), BudgetSpent)
    received.refuse(1, round, Refusal(FailureKind.LATE, "late"))
    assert isinstance(too_few(setting, "x", round, received), RoundError)


# -- what a client says is data -----------------------------------------------------------------

FORGED = (
    "x\nround 3/3  train loss 0.0001  clients 3/3\r\n\x1b[2J\x1b[31m\u2028\u202e\u2066\x85\x07\x00"
)
HUGE = (FORGED * (5_000_000 // len(FORGED) + 1))[:5_000_000]


@given(st.text(st.characters(), max_size=3 * LONGEST))
@example(FORGED)
@example("\ud800")
@example("\u202e" * LONGEST)
def test_a_reason_is_one_short_line_that_prints(text: str) -> None:
    shown = cleaned(text)
    assert len(shown) <= LONGEST
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert cleaned(shown) == shown
    assert Refusal(FailureKind.BAD, text).reason == shown
    if text.isprintable() and len(text) <= LONGEST:
        assert shown == text


def test_what_was_cut_says_so_and_what_fits_is_whole() -> None:
    assert cleaned("x" * LONGEST) == "x" * LONGEST
    assert cleaned("x" * (LONGEST + 1)) == "x" * (LONGEST - 3) + "..."
    assert cleaned("a\nb\x1b\u202e") == r"a\nb\x1b\u202e"


def assert_harmless(text: str, what: str) -> None:
    """No line of it is the client's own, and nothing in it is more than text."""
    lines = text.split("\n")
    assert not [x for x in lines if x.startswith("round 3/3  train loss 0.0001")], what
    assert all(line.isprintable() for line in lines), what
    assert len(text) < 100_000, what


def test_no_reason_forges_a_line_anywhere_nor_fills_the_disk(settings: Settings) -> None:
    screen, events, notes = io.StringIO(), [], Notes()

    def listen(server: FederatedLora) -> None:
        seen = (Progress(3, screen), JsonLines(events.append), notes)
        server.observer = Together(seen)

    given_ = settings(**quick("fedavg", **{"run.rounds": 2, "output.plots": False}))
    ran = federate(given_, Says({1: Error(Code.FAILED, HUGE)}, since=2), before=listen)
    (failure,) = ran.rounds[2]["failures"]
    assert failure["reason"].startswith(r"x\nround 3/3")
    assert len(failure["reason"]) == LONGEST
    assert len(ran.rounds) == 3
    record = (ran.directory / "rounds.jsonl").read_text()
    assert len(record.splitlines()) == 3, "also to a reader that splits at U+2028"
    for text, what in (
        (record, "rounds.jsonl"),
        (screen.getvalue(), "the terminal"),
        ("\n".join(events), "the log"),
        (told(ran.rounds[2]), "deploy run"),
        (failure["reason"], "the record itself"),
    ):
        assert_harmless(text, what)


def test_no_reason_forges_a_line_of_the_error_that_ends_the_run(settings: Settings) -> None:
    given_ = settings(**quick("fedavg"))
    with pytest.raises(RoundError, match=r"x\\nround 3/3") as caught:
        federate(given_, Says(dict.fromkeys(EVERYONE, Error(Code.FAILED, HUGE)), since=2))
    assert_harmless(str(caught.value), "the error")


@pytest.mark.parametrize("kind", ["query", "evaluate", "query.collect", "train.gradient"])
def test_no_reason_forges_a_line_before_the_first_round_or_after_the_last(
    settings: Settings, kind: str
) -> None:
    heard: list[str] = []

    class Listening(Notes):
        def note(self, text: str) -> None:
            heard.append(text)

        def client_failed(self, client: int | None, reason: str) -> None:
            heard.append(reason)

    name = {"query.collect": "fedsa", "train.gradient": "fedsb"}.get(kind, "fedavg")
    change: dict[str, object] = {"evaluate.clients": kind == "evaluate"}
    if kind == "query":
        change["round.wait-for-clients"] = 0.2
    if kind == "query.collect":
        change["strategy.fedsa.average-at-end"] = True
    if kind == "train.gradient":
        change["strategy.fedsb.init-from"] = "update-approx"

    def listen(server: FederatedLora) -> None:
        server.observer = Listening()

    app = Says({1: Error(Code.BUDGET_SPENT, HUGE)}, since=0, kind=kind)
    given_ = settings(**quick(name, **change))
    if kind == "query":
        with pytest.raises(RoundError, match=r"2 of clients\.count = 3"):
            federate(given_, app, before=listen)
    else:
        federate(given_, app, before=listen)
    forged = [text for text in heard if "train loss 0.0001" in text]
    assert forged
    for text in forged:
        assert_harmless(text, kind)


class Together(Notes):
    """Several observers as one."""

    def __init__(self, seen: tuple) -> None:
        super().__init__()
        self.seen = seen

    def baseline(self, *args) -> None:
        [x.baseline(*args) for x in self.seen]

    def round_started(self, *args) -> None:
        [x.round_started(*args) for x in self.seen]

    def client_done(self, *args) -> None:
        [x.client_done(*args) for x in self.seen]

    def client_failed(self, *args) -> None:
        [x.client_failed(*args) for x in self.seen]

    def round_done(self, *args) -> None:
        [x.round_done(*args) for x in self.seen]

    def note(self, *args) -> None:
        [x.note(*args) for x in self.seen]
