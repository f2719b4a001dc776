"""A server that tells members of a sum different stories gets noise, or no reply."""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from scipy import stats

from client_app.app import app as client_app
from fedlora.errors import PrivacyError, ProofError, RoundError
from fedlora.federation.client.secure_client import SecureClient
from fedlora.federation.secure import masking
from fedlora.federation.secure.agreement import MemberTable, same_shapes, table_of
from fedlora.federation.secure.terms import Terms
from fedlora.federation.secure.vector import encode, folded
from fedlora.lora.adapter import Factors
from tests.federation.test_secure_aggregation import five, play

Settings = Callable[..., dict[str, object]]
Change = Callable[[int, list[Any]], list[Any]]


def terms_of(cohort: int) -> Terms:
    return Terms(cohort, cohort, cohort // 2 + 1, 32, 8.0, 100)


def unmasked_sum(root: Path, tables: list[MemberTable], sent: list[Factors]) -> masking.Words:
    """What a server has after all four stages, each member having been told its own table."""
    n = len(tables)
    members = [SecureClient(root / str(i), i, 1, "start") for i in range(n)]
    keys = {m.me: m.setup(terms_of(n)) for m in members}
    boxes = {m.me: m.share(keys, terms_of) for m in members}
    total, shares = None, dict[int, list[bytes]]()
    for m, table, x in zip(members, tables, sent, strict=True):
        masker = m.open({j: boxes[j][m.me] for j in boxes if j != m.me}, terms_of)
        kind = masker.kind(table, same_shapes(folded(x)), ["A"])
        masked = masker.masked(encode(x, 10, 0.0, kind, table.layout, masker.terms), table)
        total = masked if total is None else total + masked
    assert total is not None
    for m in members:
        for i, share in m.unmask(range(n), [], terms_of).items():
            shares.setdefault(i, []).append(share)
    for pieces in shares.values():
        total = total - masking.mask(masking.joined(pieces), len(total), 32)
    return np.asarray(total)


SENT = [Factors({"m": 1.0}, {"m": torch.full((2, 40), 0.1 * (i + 1))}) for i in range(3)]
OWN = {("A", "m"): (2, 40)}


def placed(i: int) -> MemberTable:
    """A table in which client i's tensor lies i places on, among tensors that nobody has."""
    pads = {("A", f"a{n}"): (2, 40) for n in range(i)} | {
        ("A", f"z{n}"): (2, 40) for n in range(2 - i)
    }
    return table_of([OWN, pads], [["A"], ["A"]], {0: 0, 1: 0, 2: 0})


def test_a_place_of_its_own_for_each_client_gives_the_server_noise(tmp_path: Path) -> None:
    """Each update would lie alone in the sum; with one table for all the sum comes out."""
    same = unmasked_sum(tmp_path / "same", [placed(0)] * 3, SENT)
    (place,) = (p for key, _, p in placed(0).layout.places() if key == ("A", "m"))
    mean = same[place].view("<i4") / terms_of(3).unit / 30
    assert np.allclose(mean, 0.2, atol=1e-5)
    told = unmasked_sum(tmp_path / "told", [placed(i) for i in range(3)], SENT)
    assert len(told) == len(same)
    assert stats.kstest(told / 2.0**32, "uniform").pvalue > 1e-6


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (table_of([OWN], [["A"]], {0: 0, 1: 0}), "not of the clients that this one was shown"),
        (table_of([OWN], [["A"]], {0: 0, 1: 0, 5: 0}), "not of the clients that this one was"),
        (table_of([OWN, {}], [["A"], ["A"]], {0: 1, 1: 0, 2: 0}), "sends or trains something"),
        (table_of([{("A", "m"): (3, 40)}], [["A"]], {0: 0, 1: 0, 2: 0}), "sends or trains"),
        (table_of([OWN], [["A", "B"]], {0: 0, 1: 0, 2: 0}), "sends or trains something else"),
        (table_of([OWN, {}], [["A"], []], {0: 0, 1: 1, 2: 1}), "would send alone"),
        (table_of([OWN, {}], [["A"], []], {0: 0, 1: 0, 2: 1}), "would send alone"),
        (table_of([OWN], [["A"]], {0: 4, 1: 4, 2: 4}), "no such kind"),
        (table_of([OWN], [], {0: 0, 1: 0, 2: 0}), "no such kind"),
    ],
)
def test_a_table_that_a_member_can_see_is_wrong_is_refused(table: MemberTable, says: str) -> None:
    with pytest.raises(PrivacyError, match=says):
        table.check(0, OWN, {"A"}, [0, 1, 2], 3)


@pytest.mark.parametrize("text", ["", "[]", "[[],[]]", "[1,2,3]", "[[[1]],[],[]]", '{"a":1}'])
def test_a_table_that_does_not_read_is_an_error_of_its_own(text: str) -> None:
    with pytest.raises(PrivacyError, match="does not read"):
        MemberTable.read(text)


def test_a_table_is_read_as_it_was_written() -> None:
    table = table_of([OWN, {("B", "x/y"): (3,)}], [["A"], ["other", "B"]], {4: 0, 2: 1})
    assert MemberTable.read(table.record()) == table
    assert table.digest(terms_of(3), 1, "s") == MemberTable.read(table.record()).digest(
        terms_of(3), 1, "s"
    )
    others = [table.digest(terms_of(4), 1, "s"), table.digest(terms_of(3), 2, "s"),
              table.digest(terms_of(3), 1, "t"), placed(0).digest(terms_of(3), 1, "s")]  # fmt: skip
    assert len({*others, table.digest(terms_of(3), 1, "s")}) == 5


def test_a_threshold_that_is_no_majority_of_the_cohort_that_is_told_is_refused(
    tmp_path: Path,
) -> None:
    """Threshold 2 of 3 is one; of a cohort of 4, which a server only says there is, it is not."""
    with pytest.raises(PrivacyError, match=r"2 of 4 shares .*must be more than half"):
        SecureClient(tmp_path, 0, 1, "s").setup(Terms(4, 4, 2, 32, 8.0, 100))


# -- through real messages -------------------------------------------------------------------------


@dataclass
class Liar:
    """The real ClientApp, to which a server tells each client another story before it trains."""

    change: Callable[[int, Message], None]
    replies: dict[int, Message] = field(default_factory=dict)

    def __call__(self, message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type == "train.secagg_collect":
            self.change(client, message)
            self.replies[client] = client_app(message, context)
            return self.replies[client]
        return client_app(message, context)


def retold(message: Message, change: Callable[[list[Any]], None]) -> None:
    asked: Mapping[str, Any] = message.content["secagg"]  # type: ignore[assignment]
    table = json.loads(asked["table"])
    change(table)
    message.content["secagg"] = ConfigRecord({**asked, "table": json.dumps(table)})


def test_clients_that_were_told_another_table_of_others_make_no_sum(settings: Settings) -> None:
    """Each finds its own entry true; what their sum would be is noise."""

    def other(client: int, message: Message) -> None:
        def change(table: list[Any]) -> None:
            kind = dict(table[2])[client]
            table[1][1 - kind] = [f"told to {client}"]

        retold(message, change)

    given = settings(**five("ffa", **{"clients.ranks": "2,3"}))
    liar, found = Liar(other), None
    with contextlib.suppress(RoundError, ProofError):  # or noise that looks like counts
        found = play(given, app=liar)
    assert found is None or max(float(x.abs().max()) for x in folded(found.factors).values()) > 100
    assert len(liar.replies) == 5
    assert not any(r.has_error() for r in liar.replies.values())


def test_a_client_that_trains_alone_among_clients_that_train_the_head_sends_nothing(
    settings: Settings,
) -> None:
    """All but the victim are told to train the head only: the sum of B would be the victim's."""

    def only_the_head(client: int, message: Message) -> None:
        if client:
            asked: Mapping[str, Any] = message.content["download"]  # type: ignore[assignment]
            message.content["download"] = ConfigRecord({**asked, "trainable": ["other"]})

    liar = Liar(only_the_head)
    with pytest.raises(RoundError):
        play(settings(**five("fedavg")), app=liar)
    for i in range(1, 5):
        assert "sends or trains something else" in liar.replies[i].error.reason
