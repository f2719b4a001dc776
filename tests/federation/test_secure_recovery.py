"""A node that was recovered masks no round twice, and one with a limit has so many rounds at most.

All through real messages to nodes with a policy; a restored disk is played by removing what the
node kept, as the loss of it does.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.config.policy import Policy
from fedlora.errors import PolicyError, PrivacyError
from fedlora.federation.client import handlers, secure_book
from fedlora.federation.client.secure_book import AHEAD, NAME, SecureBook
from fedlora.federation.wire.job import Job
from fedlora.privacy.keeper_socket import ask
from tests.conftest import tiny_settings
from tests.federation.test_secure_aggregation import five
from tests.support.lying_server import LyingServer, Recorded, Refused
from tests.support.under_policy import named, written

CLIENTS = range(4)
FOUR = {"clients.count": 4, "secure.colluding": 1}
FROM_BEFORE = "start of the server from before this node was recovered"
AHEAD_OF = "a server that dates its start ahead"


def node(i: int, root: Path) -> Path:
    return root / f"node-{i}" / "node.toml"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, str]) -> Recorded:
    """An honest round of four nodes with policies."""
    root = tmp_path_factory.mktemp("recovery")
    limits = {"kinds": ["query", "train", "evaluate", "secagg"]}
    for i in CLIENTS:
        secure = {"require": True, "max-rounds": 1000}
        written(node(i, root).parent, tiny["bert"], tiny["rows"], secure=secure, limits=limits)
    given = tiny_settings(tiny, root, "float32", **five("fedavg", **FOUR))
    nodes: Mapping[int, Any] = {i: named(node(i, root)) for i in CLIENTS}
    return Recorded.of(given, nodes=nodes)


@pytest.fixture
def clock(told: Recorded, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The nodes' clock; after the test the nodes are as they were."""
    now = [time.time()]

    class Clock:
        time = staticmethod(lambda: now[0])

    monkeypatch.setattr(secure_book, "time", Clock)
    kept = {i: book(i, told).path.read_bytes() for i in CLIENTS}
    yield now
    for i, data in kept.items():
        book(i, told).path.write_bytes(data)


def book(i: int, told: Recorded) -> SecureBook:
    return SecureBook(Policy.load(node(i, told.root)).ledger)


def recovered(i: int, told: Recorded, *more: str) -> str:
    line = ["node", "recover", str(node(i, told.root)), "--spent", "0", *more]
    done = CliRunner().invoke(app, line)
    return done.output if done.exit_code == 0 else str(done.exception)


def setup(server: LyingServer, i: int) -> None:
    assert server.answers("setup", i, agreement=server.agreement.record())["keys"]


def test_the_start_of_a_server_is_dated_and_the_date_is_agreed_on(told: Recorded) -> None:
    job = Job.read(told.first["setup", 0].config_records["job"])
    assert abs(job.since - time.time()) < 3600
    server = LyingServer(told)
    assert server.agreement.name.since == job.since
    server.since += 1  # in the job, and not in what all agree on
    with pytest.raises(Refused, match="another run, round or config"):
        setup(server, 0)


def test_a_node_that_lost_its_disk_would_mask_a_round_twice_but_for_its_recovery(
    told: Recorded, clock: list[float]
) -> None:
    """The disk alone is not enough: without its operator's word the node answers again."""
    server = LyingServer(told, since=int(clock[0]) - 100)
    server.setup()
    with pytest.raises(Refused, match="was begun before"):
        setup(server, 2)
    (secrets,) = told.root.rglob("node-2/**/client-2/secure")
    shutil.rmtree(secrets)
    setup(server, 2)  # the test has teeth: here is the second mask
    shutil.rmtree(secrets)
    assert "goes on here once its server has been started again" in recovered(2, told)
    with pytest.raises(Refused, match=FROM_BEFORE):
        setup(server, 2)
    setup(LyingServer(told, since=server.since), 1)  # another node goes on


@pytest.mark.parametrize("stage", ["share", "collect", "agree", "unmask"])
def test_a_round_that_was_under_way_ends_at_whatever_stage_the_node_is_recovered(
    told: Recorded, clock: list[float], stage: str
) -> None:
    server = LyingServer(told, since=int(clock[0]) - 100)
    server.setup()
    came = server.share(server.ids) if stage != "share" else {}
    if stage in ("agree", "unmask"):
        server.collect(came)
    signed = server.agree(server.ids, server.ids) if stage == "unmask" else {}
    recovered(0, told)
    with pytest.raises(Refused, match=FROM_BEFORE):
        {
            "share": lambda: server.share([0]),
            "collect": lambda: server.collect({0: came[0]}),
            "agree": lambda: server.agree([0], server.ids),
            "unmask": lambda: server.unmask([0], signed),
        }[stage]()


def test_a_new_start_of_the_server_goes_on(told: Recorded, clock: list[float]) -> None:
    recovered(0, told)
    late = int(clock[0]) + AHEAD + 1
    clock[0] = late + 5
    server = LyingServer(told, since=late)
    server.setup()
    total = server.collect(server.share(server.ids))
    assert len(total) == 4
    assert server.unmask(server.ids, server.agree(server.ids, server.ids))


def test_a_start_that_is_dated_ahead_is_refused_recovered_or_not(
    told: Recorded, clock: list[float]
) -> None:
    """Else a server could date its start so that it outlives any recovery."""
    setup(LyingServer(told, since=int(clock[0]) + AHEAD - 1), 0)  # its clock may be ahead a little
    ahead = LyingServer(told, since=int(clock[0]) + AHEAD + 10)
    with pytest.raises(Refused, match=AHEAD_OF):
        setup(ahead, 1)
    recovered(1, told)
    with pytest.raises(Refused, match=AHEAD_OF):
        setup(ahead, 1)


def test_no_date_that_was_answered_before_is_answered_after(
    told: Recorded, clock: list[float]
) -> None:
    """Of a clock ahead by all that is let through, and a recovery at once."""
    server = LyingServer(told, since=int(clock[0]) + AHEAD)
    setup(server, 3)
    recovered(3, told)
    (secrets,) = told.root.rglob("node-3/**/client-3/secure")
    shutil.rmtree(secrets)
    for later in (0, 1, AHEAD, 10 * AHEAD):
        clock[0] += later
        with pytest.raises(Refused, match=FROM_BEFORE):
            setup(server, 3)


def test_a_server_that_says_no_date_is_refused_once_the_node_was_recovered(
    told: Recorded, clock: list[float]
) -> None:
    setup(LyingServer(told, since=0), 0)
    recovered(0, told)
    with pytest.raises(Refused, match=FROM_BEFORE):
        setup(LyingServer(told, since=0), 0)
    (*_, last) = (node(0, told.root).parent / "audit.jsonl").read_text().splitlines()
    assert json.loads(last)["what"] == "refused"
    assert "it does not say when it began" in json.loads(last)["reasons"][0]


def test_a_clock_that_was_put_back_makes_no_recovery_earlier(tmp_path: Path) -> None:
    made = SecureBook(tmp_path)
    made.recover(None, 1000.0)
    made.recover(None, 10.0)
    found = made.read()
    assert found is not None
    assert found.recovered == 1000


# -- a limit of rounds ----------------------------------------------------------------------------


def limited(i: int, told: Recorded, most: int) -> None:
    path = node(i, told.root)
    text = path.read_text()
    was = next(x for x in text.splitlines() if x.startswith("max-rounds"))
    path.write_text(text.replace(was, f"max-rounds = {most}"))


@contextmanager
def limit(i: int, told: Recorded, most: int) -> Iterator[None]:
    limited(i, told, most)
    try:
        yield
    finally:
        limited(i, told, 1000)


def whole_round(told: Recorded) -> None:
    server = LyingServer(told)
    server.setup()
    server.collect(server.share(server.ids))
    server.unmask(server.ids, server.agree(server.ids, server.ids))


def rounds(i: int, told: Recorded) -> int:
    found = book(i, told).read()
    assert found is not None
    return found.rounds


def test_a_node_with_a_limit_has_so_many_rounds_whatever_the_server_calls_them(
    told: Recorded, clock: list[float]
) -> None:
    """Other starts of the server, as other runs, begin no count anew."""
    so_far = rounds(0, told)
    with limit(0, told, so_far + 2):
        whole_round(told)
        whole_round(told)
        with pytest.raises(Refused, match="policy does not allow another secure round; ask its op"):
            setup(LyingServer(told), 0)
    assert rounds(0, told) == so_far + 2
    setup(LyingServer(told), 0)  # its operator allows more


def test_a_round_in_which_nothing_is_sent_but_why_is_counted(
    told: Recorded, clock: list[float]
) -> None:
    """A server that aims the range of values asks a question with each; a limit is of all."""
    server, so_far = LyingServer(told), rounds(0, told)
    server.setup()
    came = server.share(server.ids)
    honest = told.trained[0]
    B = {m: x + 1e6 for m, x in honest.sent.B.items()}
    told.trained[0] = replace(honest, sent=replace(honest.sent, B=B))
    try:
        with pytest.raises(Refused, match="outside of"):
            server.collect({0: came[0]})
    finally:
        told.trained[0] = honest
    assert rounds(0, told) == so_far + 1


def test_a_round_is_counted_on_disk_before_its_client_trains(
    told: Recorded, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between count and answer costs a round."""
    server = LyingServer(told)
    server.setup()
    came = server.share(server.ids)
    so_far, seen = rounds(0, told), list[int]()

    def dies(*_: Any) -> Any:
        seen.append(rounds(0, told))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "as_trained", nullcontext)
        patch.setattr(handlers, "trained", dies)
        with pytest.raises(KeyboardInterrupt):
            server.collect({0: came[0]})
    assert seen == [so_far + 1]
    assert rounds(0, told) == so_far + 1
    with pytest.raises(Refused, match="not at stage"):
        server.collect({0: came[0]})
    assert rounds(0, told) == so_far + 1, "a round that is refused is not counted"


def test_the_last_round_is_one_of_two_that_were_begun_at_once(
    told: Recorded, clock: list[float]
) -> None:
    """What was allowed at its beginning is counted as it trains: the limit holds all the same."""
    one, other = LyingServer(told), LyingServer(told)
    one.setup()
    came = one.share(one.ids)
    with limit(0, told, rounds(0, told) + 1):
        SecureBook.enter(book(0, told), int(clock[0]), 0, "count")
        with pytest.raises(Refused, match="another secure round"):
            one.collect({0: came[0]})
        with pytest.raises(Refused, match="another secure round"):
            setup(other, 0)


def test_a_count_that_is_gone_or_damaged_is_no_count_of_zero(
    told: Recorded, clock: list[float]
) -> None:
    path = book(1, told).path
    for data in (b"", b"{", b'{"rounds": -1, "recovered": 0}', b'{"rounds": true, "recovered": 0}'):
        path.write_bytes(data)
        with pytest.raises(Refused, match=r"count of its secure rounds .* is damaged"):
            setup(LyingServer(told), 1)
    path.unlink()
    with pytest.raises(Refused, match="no count of its secure rounds, and its policy limits"):
        setup(LyingServer(told), 1)
    assert "--secure-rounds: must be said" in recovered(1, told)
    assert not path.exists()
    recovered(1, told, "--secure-rounds", "998")
    clock[0] += 2 * AHEAD
    with pytest.raises(Refused, match=FROM_BEFORE):
        setup(LyingServer(told), 1)
    setup(LyingServer(told, since=int(clock[0])), 1)
    assert rounds(1, told) == 998


def test_without_a_limit_rounds_are_counted_too(tmp_path: Path) -> None:
    made = SecureBook(tmp_path)
    assert [made.enter(10, 0, "count") for _ in range(3)] == [1, 2, 3]
    with pytest.raises(PolicyError, match="another secure round"):
        made.enter(10, 3, "begin")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="a keeper needs Unix sockets")
def test_a_keeper_counts_and_refuses_by_its_own_policy(tmp_path: Path) -> None:
    from fedlora.launch.node_keeper import Keeper

    given = {"privacy": {"keeper": "s.sock", "ledger": "book"}, "secure": {"max-rounds": 2}}
    path = written(tmp_path, "m", "rows.jsonl", **given)
    policy, now = Policy.load(path), int(time.time())
    with pytest.raises(PrivacyError, match="keeper of this node"):
        secure_book.enter(policy, now, "count")
    with Keeper(Path(policy.privacy.keeper), path, {os.getuid()}) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            for _ in range(2):
                secure_book.enter(policy, now, "count")
            with pytest.raises(PolicyError, match="does not allow another secure round") as caught:
                secure_book.enter(policy, now, "begin")
            assert "2 so far" in caught.value.reasons[0]
            for more in ({}, {"since": "x", "step": "count"}, {"since": now, "step": 1}):
                with pytest.raises(PrivacyError):
                    ask(Path(policy.privacy.keeper), "secure", more)
        finally:
            serving.shutdown()
            thread.join()
    assert json.loads((policy.ledger / NAME).read_text())["rounds"] == 2


def test_a_key_that_is_new_on_a_disk_without_a_count_is_taken_for_a_recovery(
    tmp_path: Path, told: Recorded
) -> None:
    """A node that is made by `deploy init` has a count, and takes part at once."""
    path = written(tmp_path / "new", "m", "r")
    assert CliRunner().invoke(app, ["node", "init", str(path)]).exit_code == 0
    found = SecureBook(Policy.load(path).ledger).read()
    assert found is not None
    assert found.recovered == 0
    path = written(tmp_path / "lost", "m", "r")
    SecureBook(Policy.load(path).ledger).path.unlink()
    begun = time.time()
    assert CliRunner().invoke(app, ["node", "init", str(path)]).exit_code == 0
    found = SecureBook(Policy.load(path).ledger).read()
    assert found is not None
    assert found.recovered >= int(begun)
