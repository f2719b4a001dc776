"""A server that tells members of a sum different stories gets noise, or no reply."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from scipy import stats

from client_app.app import app as client_app
from fedlora.config.reader import Config
from fedlora.errors import PrivacyError, RoundError, StrategyError
from fedlora.federation.client.secure_client import SecureClient
from fedlora.federation.secure import masking, signing
from fedlora.federation.secure.agreement import Agreement, MemberTable, same_shapes, table_of
from fedlora.federation.secure.signing import PROTOCOL, RoundKeys, keys_text, survivors_text
from fedlora.federation.secure.terms import Terms
from fedlora.federation.secure.vector import encode, folded
from fedlora.lora.adapter import Factors
from fedlora.strategies.ffa import FFA
from fedlora.training import cache
from fedlora.training.certificate import public_scales
from tests.conftest import tiny_settings
from tests.federation.test_secure_aggregation import five, play
from tests.support.lying_server import LyingServer, Recorded, Refused
from tests.support.secure_members import ALIKE, NAME, agreement_of, begun, terms_of

Settings = Callable[..., dict[str, object]]
Change = Callable[[int, list[Any]], list[Any]]


def unmasked_sum(root: Path, tables: list[MemberTable], sent: list[Factors]) -> masking.Words:
    """What a server has after all stages, each member having been told its own table.

    Each is shown its neighbours' keys as if they had signed what it was told itself.
    """
    n = len(tables)
    told = [agreement_of(n, table) for table in tables]
    members, keys = begun(root, told)
    total, shares, boxes = None, dict[int, list[bytes]](), dict[int, Any]()
    for m, agreement in zip(members, told, strict=True):
        boxes[m.me] = m.share(
            {i: k if i == m.me else signed(root, i, k, agreement) for i, k in keys.items()},
            terms_of,
        )
    for m, x in zip(members, sent, strict=True):
        masker = m.open({j: boxes[j][m.me] for j in boxes if j != m.me}, terms_of)
        kind = masker.kind(same_shapes(folded(x)), ["A"])
        layout, terms = masker.agreement.table.layout, masker.agreement.terms
        masked = masker.masked(encode(x, 10, 0.0, kind, layout, terms))
        total = masked if total is None else total + masked
    assert total is not None
    for m, agreement in zip(members, told, strict=True):
        m.agree(range(n), terms_of)
        text = survivors_text("run", "start", 1, agreement.digest(), range(n))
        others = {i: signing.sign(identity(root, i), text) for i in range(n)}
        for i, share in m.unmask(others, terms_of).items():
            shares.setdefault(i, []).append(share)
    for pieces in shares.values():
        total = total - masking.mask(masking.joined(pieces), len(total), 32)
    return np.asarray(total)


def identity(root: Path, i: int) -> bytes:
    return (root / str(i) / "identity.key").read_bytes()


def signed(root: Path, i: int, keys: RoundKeys, agreement: Agreement) -> RoundKeys:
    """Another member's keys, signed as if it had been told this."""
    text = keys_text("run", "start", 1, i, keys.masks, keys.boxes, agreement.digest())
    return keys._replace(signature=signing.sign(identity(root, i), text))


SENT = [Factors({"m": 1.0}, {"m": torch.full((2, 40), 0.1 * (i + 1))}) for i in range(3)]
OWN = {("A", "m"): (2, 40)}


def placed(i: int) -> MemberTable:
    """A table in which client i's tensor lies i places on, among tensors that nobody has."""
    pads = {("A", f"a{n}"): (2, 40) for n in range(i)} | {
        ("A", f"z{n}"): (2, 40) for n in range(2 - i)
    }
    return table_of([OWN, pads], [["A"], ["A"]], {0: 0, 1: 0, 2: 0})


def test_a_place_of_its_own_for_each_client_gives_the_server_noise(tmp_path: Path) -> None:
    """Even of clients whose keys all sign what each is told: the masks are of the table's digest.

    Each update would lie alone in the sum; with one table for all the sum comes out."""
    same = unmasked_sum(tmp_path / "same", [placed(0)] * 3, SENT)
    (place,) = (p for key, _, p in placed(0).layout.places() if key == ("A", "m"))
    mean = same[place].view("<i4") / terms_of(3).unit / 30
    assert np.allclose(mean, 0.2, atol=1e-5)
    told = unmasked_sum(tmp_path / "told", [placed(i) for i in range(3)], SENT)
    assert len(told) == len(same)
    assert stats.kstest(told / 2.0**32, "uniform").pvalue > 1e-6


def test_members_who_were_told_other_tables_refuse_each_others_keys(tmp_path: Path) -> None:
    members, keys = begun(tmp_path, [agreement_of(3, placed(i)) for i in range(3)])
    with pytest.raises(PrivacyError, match="client 1 did not sign these keys, or was told of an"):
        members[0].share(keys, terms_of)


FINE = table_of([OWN], [["A"]], {0: 0, 1: 0, 2: 0})


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (table_of([OWN], [["A"]], {3: 0, 1: 0, 2: 0}), "not of the clients that this one is among"),
        (table_of([OWN, {}], [["A"], []], {0: 0, 1: 1, 2: 1}), "fewer than 2 clients of"),
        (table_of([OWN, {}], [["A"], []], {0: 0, 1: 0, 2: 1}), "fewer than 2 clients of"),
        (table_of([OWN], [["A"]], {0: 4, 1: 4, 2: 4}), "no such kind"),
        (table_of([OWN], [["A"]], {0: 0, 1: 0, 2: -1}), "no such kind"),
        (table_of([OWN], [], {0: 0, 1: 0, 2: 0}), "no such kind"),
        (table_of([OWN], [["A"]], {0: 0, 1: 0, 2: 0, 3: 0}), "terms of the sum are not those"),
    ],
)
def test_a_table_that_a_member_can_see_is_wrong_is_refused(table: MemberTable, says: str) -> None:
    told = replace(agreement_of(3, FINE), table=table)
    with pytest.raises(PrivacyError, match=says):
        told.check(0, NAME, terms_of(3))


@pytest.mark.parametrize(
    "table",
    [
        table_of([OWN, {}], [["A"], ["A"]], {0: 1, 1: 0, 2: 0}),
        table_of([{("A", "m"): (3, 40)}], [["A"]], {0: 0, 1: 0, 2: 0}),
        table_of([OWN], [["A", "B"]], {0: 0, 1: 0, 2: 0}),
    ],
)
def test_a_table_that_is_not_so_of_oneself_is_refused(table: MemberTable) -> None:
    with pytest.raises(PrivacyError, match="says that this client sends or trains something else"):
        table.check_own(0, OWN, {"A"}, False)


OTHER = ("form", "another")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": replace(NAME, run="other")}, "of another run, round or config"),
        ({"name": replace(NAME, config="other")}, "of another run, round or config"),
        ({"name": replace(NAME, round=2)}, "of another run, round or config"),
        ({"name": replace(NAME, incarnation="other")}, "of another run, round or config"),
        ({"terms": replace(terms_of(3), threshold=3)}, "terms of the sum are not those"),
        ({"terms": replace(terms_of(3), weight=7)}, "terms of the sum are not those"),
        ({"terms": replace(terms_of(3), range=1e6)}, "terms of the sum are not those"),
        ({"sent": (ALIKE, ALIKE)}, "does not say what each kind is sent"),
        ({"sent": ()}, "does not say what each kind is sent"),
    ],
)
def test_what_a_member_can_derive_itself_is_not_taken_from_the_server(
    change: dict[str, Any], says: str
) -> None:
    told = replace(agreement_of(3, FINE), **change)
    with pytest.raises(PrivacyError, match=says):
        told.check(0, NAME, terms_of(3))
    agreement_of(3, FINE).check(0, NAME, terms_of(3))


@pytest.mark.parametrize(("run", "own", "fine"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_a_kind_is_of_so_many_that_two_are_left_beside_those_that_help(
    run: int, own: int, fine: bool
) -> None:
    """What one kind alone sends is a sum over it: of two, one that helps gives the other away."""
    terms = replace(Terms.of(Config.read({"data.path": "x"}), 8), colluding=run)
    table = table_of([OWN, {}], [["A"], []], {i: int(i < 2) for i in range(8)})
    told = Agreement(NAME, terms, table, (ALIKE, ALIKE))
    if fine:
        return told.check(0, NAME, terms, own + 2)
    with pytest.raises(PrivacyError, match="fewer than 3 clients of one kind"):
        told.check(0, NAME, terms, own + 2)
    return None


def test_two_kinds_are_sent_one_model_where_its_form_is_one() -> None:
    kinds = table_of([OWN, {}], [["A"], []], {i: int(i < 2) for i in range(5)})
    other = ("longer", "content of it")
    told = replace(agreement_of(5, kinds), sent=(ALIKE, other))
    told.check(0, NAME, terms_of(5))
    told.check_sent(0, other)
    with pytest.raises(PrivacyError, match="was sent something else than all members were told"):
        told.check_sent(0, ALIKE)
    with pytest.raises(PrivacyError, match="kinds are sent different models of one form"):
        replace(told, sent=(ALIKE, OTHER)).check(0, NAME, terms_of(5))


@pytest.mark.parametrize("text", ["", "[]", "[[],[]]", "[1,2,3]", '{"a":1}'])
def test_an_agreement_that_does_not_read_is_an_error_of_its_own(text: str) -> None:
    with pytest.raises(PrivacyError, match="does not read"):
        Agreement.read(text)


def test_an_agreement_is_read_as_it_was_written_and_every_part_is_in_its_digest() -> None:
    table = table_of([OWN, {("B", "x/y"): (3,)}], [["A"], ["other", "B"]], {4: 0, 2: 1, 1: 0})
    told = agreement_of(3, table)
    assert Agreement.read(told.record()) == told
    with pytest.raises(PrivacyError, match="not written as it must be"):
        Agreement.read(told.record() + " ")
    with pytest.raises(PrivacyError, match="another version of secure aggregation"):
        Agreement.read(told.record().replace(f",{PROTOCOL},", f",{PROTOCOL + 1},", 1))
    others = [
        replace(told, terms=replace(told.terms, **{f.name: getattr(told.terms, f.name) + 1}))
        for f in fields(told.terms)
    ]
    others += [
        replace(told, name=replace(NAME, **{key: x}))
        for key, x in (("config", "a"), ("run", "a"), ("round", 2), ("incarnation", "a"))
    ]
    others += [replace(told, table=FINE), replace(told, sent=(OTHER, ALIKE))]
    others += [replace(told, table=replace(table, own=(True, False)))]
    digests = {x.digest() for x in [told, *others]}
    assert len(digests) == len(others) + 1
    again = [replace(told, name=replace(NAME, run="a", incarnation="b")), told]
    assert len({x.probes for x in again}) == 1
    assert len({x.probes for x in others}) == len(others) - 1  # two are told's own


def test_a_threshold_that_is_no_majority_of_the_cohort_that_is_told_is_refused(
    tmp_path: Path,
) -> None:
    """Threshold 2 of 3 is one; of a cohort of 4, which a server only says there is, it is not."""

    def two(cohort: int) -> Terms:
        return replace(terms_of(cohort), threshold=2)

    told = replace(agreement_of(4), terms=two(4))
    with pytest.raises(PrivacyError, match=r"threshold = 2: must be 3 to 4 of 4 clients"):
        SecureClient(tmp_path, 0, NAME).setup(told, two)


@pytest.mark.parametrize(
    ("n", "c", "threshold", "fewest"),
    [(3, 0, 2, 3), (4, 1, 3, 3), (5, 1, 4, 4), (6, 1, 4, 4), (7, 2, 5, 5), (10, 1, 6, 6),
     (10, 3, 7, 7), (100, 33, 67, 67), (5, 0, 3, 3)],
)  # fmt: skip
def test_the_default_threshold_keeps_every_rule_where_any_does(
    n: int, c: int, threshold: int, fewest: int
) -> None:
    config = Config.read({"secure.colluding": c, "data.path": "x"})
    terms = Terms.of(config, n)
    assert (terms.threshold, terms.fewest, terms.problem()) == (threshold, fewest, "")
    assert 2 * threshold > n + c
    assert threshold <= n - c
    assert fewest >= max(threshold, 3, c + 2)
    more = Terms.of(Config.read({"secure.colluding": (n - 1) // 3 + 1, "data.path": "x"}), n)
    assert "clients at least" in more.problem()  # and with one more, none does


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
        assert "was sent something else than all members were told" in liar.replies[i].error.reason


def test_a_strategy_that_sends_each_client_its_own_model_is_refused_before_anything_is_sent(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    download, asked = FFA.download, list[str]()

    def own(self: FFA, state: Any, client: Any, round: Any) -> Any:
        came = download(self, state, client, round)
        B = {m: x + 1e-3 * client.id for m, x in came.send.B.items()}
        return replace(came, send=replace(came.send, B=B))

    def app(message: Message, context: Context) -> Message:
        asked.append(message.metadata.message_type)
        return client_app(message, context)

    monkeypatch.setattr(FFA, "download", own)
    with pytest.raises(StrategyError, match="different models of one form"):
        play(settings(**five("ffa")), app=app)
    assert set(asked) == {"query"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, str]) -> Recorded:
    """An honest round of six, of which one may help the server: t = 4."""
    root = tmp_path_factory.mktemp("stories")
    six = five("fedavg", **{"clients.count": 6, "secure.colluding": 1})
    return Recorded.of(tiny_settings(tiny, root, "float32", **six))


def test_the_true_story_ends_in_the_sum(told: Recorded) -> None:
    server = LyingServer(told)
    server.setup()
    summed = one_story(server, server.share(server.ids), server.ids)
    assert np.array_equal(summed, truly(told, server.ids))


def test_what_is_summed_is_count_loss_values_and_changes_and_nothing_else(told: Recorded) -> None:
    """Word by word, from what each client trained: n, n loss, 1, n x and n c, in their places."""
    agreement = LyingServer(told).agreement
    layout, names = agreement.table.layout, {*told.trained[0].numbers[0]}
    job = told.first["setup", 0].config_records["job"]
    model = cache.model(Config.read(told.contexts[0].run_config), tuple(job["labels"]))  # type: ignore[arg-type]
    scales, steps = public_scales(model, names), ((2**31 - 1) // 6) / 10_000
    sent = {(column, name) for column, name, _ in told.trained[0].sent.items()}
    assert {*layout.shapes} == sent | {("other", f"certificate/{m}") for m in names}
    for i, words in told.vectors.items():
        done, n = told.trained[i], told.trained[i].examples
        start, end = done.numbers
        want = [torch.tensor([n, n * done.fit.loss / 8 * steps / 8, 1.0]).double()]
        for (column, name), *_ in layout.places():
            if (m := name.removeprefix("certificate/")) != name:
                x = (end[m] - start[m]) / scales[m]
            else:
                x = getattr(done.sent, column)[name].double()
                x = x * done.sent.scale[name] if column == "B" else x
            want.append((n * x * steps / 8).flatten())
        assert np.abs(words.view("<i4") - torch.cat(want).numpy()).max() <= 0.51


def truly(told: Recorded, clients: Collection[int]) -> masking.Words:
    found = sum(told.vectors[i] for i in clients)
    return np.asarray(found, dtype=np.uint32)


def one_story(
    server: LyingServer, came: Mapping[int, Mapping[int, bytes]], among: Collection[int]
) -> masking.Words:
    """The sum of those whose boxes came, from its collecting on."""
    masked = server.collect(came)
    shares = server.unmask(among, server.agree(among, among))
    total = np.asarray(sum(masked.values()), dtype=np.uint32)
    return server.without_masks(total, shares)


def halves(helpers: Collection[int]) -> tuple[list[int], list[int]]:
    """Six clients in two sets that share those that help, the first with the victim in it."""
    honest = [i for i in range(6) if i not in helpers]
    half = (len(honest) + 1) // 2
    return sorted([*honest[:half], *helpers]), sorted([*honest[half:], *helpers])


TOO_FEW_OF_IT = r"neighbours: must be 4|sent shares, secure.reconstruction-threshold = 4"
HELPERS = pytest.mark.parametrize("helpers", [(), (5,), (4, 5)], ids=["0", "c", "c + 1"])


@HELPERS
@pytest.mark.parametrize("stage", ["U1", "U2"])
def test_two_stories_of_who_sent_keys_or_shares_make_one_sum_at_most_up_to_c(
    told: Recorded, stage: str, helpers: tuple[int, ...]
) -> None:
    """Each half is told that the other is gone. With c + 1 that help, both sums come out."""
    server, sums, refused = LyingServer(told, helpers), [], list[str]()
    server.setup()
    boxes = server.share(server.ids) if stage == "U2" else {}
    server.keep()
    for half in halves(helpers):
        server.put_back()
        try:
            if stage == "U1":
                came = server.share(half)
            else:
                came = {i: {j: boxes[i][j] for j in half if j != i} for i in half}
            sums.append((half, one_story(server, came, half)))
        except Refused as e:
            refused.append(str(e))
    assert all(re.search(TOO_FEW_OF_IT, reason) for reason in refused)
    for half, found in sums:
        assert np.array_equal(found, truly(told, half))
    assert len(sums) == len(helpers)


@HELPERS
def test_two_stories_of_who_is_in_the_sum_read_one_client_with_more_than_c_that_help_only(
    told: Recorded, helpers: tuple[int, ...]
) -> None:
    """Half are told that client 0 is in the sum, half that it is gone: for both of its secrets."""
    server, victim = LyingServer(told, helpers), 0
    server.setup()
    masked = server.collect(server.share(server.ids))
    server.keep()
    gone = [i for i in server.ids if i != victim]
    secrets, refused, signed = list[bytes](), list[str](), dict[int, bytes]()
    for half, survivors in zip(halves(helpers), (server.ids, gone), strict=True):
        server.put_back()
        signed |= server.agree(half, survivors)  # those of the other story are shown as well
        try:
            secrets.append(masking.joined(server.unmask(half, signed)[victim]))
        except Refused as e:
            refused.append(str(e))
    assert all(re.search(r"\d members signed .*: must be 4 .*another story", x) for x in refused)
    if len(helpers) < 2:
        assert len(secrets) < 2
        return
    seed, key = secrets
    alone = server.without_pairs(masked[victim], victim, key, gone)
    alone = alone - masking.mask(seed, len(alone), 32)
    assert np.array_equal(alone, told.vectors[victim])


def test_signatures_of_another_story_or_under_anothers_name_do_not_open_this_one(
    told: Recorded,
) -> None:
    server = LyingServer(told)
    server.setup()
    server.collect(server.share(server.ids))
    here, there = server.agree([0, 1], server.ids), server.agree([2, 3], server.ids[:5])
    with pytest.raises(Refused, match="2 members signed"):
        server.unmask([0], {**here, **there, 4: here[1], 5: here[1]})


def test_clients_that_were_told_other_things_refuse_each_others_keys(told: Recorded) -> None:
    """Another model for one client, in the table that it alone is shown: nobody sends a share."""
    server = LyingServer(told)
    table = replace(server.agreement, sent=(("form", "content"),))
    server.setup({1: table})
    keys = [key for j in server.ids for key in server.keys[j]]
    for i in (0, 1):
        with pytest.raises(Refused, match="did not sign these keys, or was told of another agree"):
            server.answers("share", i, clients=server.ids, keys=keys)


@pytest.mark.parametrize("form", ["as the others'", "its own"])
def test_a_model_for_one_client_alone_is_refused_by_all(told: Recorded, form: str) -> None:
    """Others would be sent one that teaches nothing, and the sum would be this client's."""
    server = LyingServer(told)
    table, (sent,) = server.agreement.table, server.agreement.sent
    two = replace(table, shapes=table.shapes * 2, trains=table.trains * 2, own=table.own * 2,
                  kinds={**table.kinds, 1: 1})  # fmt: skip
    apart = sent, (sent[0] if form == "as the others'" else form, "another")
    says = "fewer than 3 clients of one kind"
    with pytest.raises(Refused, match=says):
        server.setup(dict.fromkeys(server.ids, replace(server.agreement, table=two, sent=apart)))


def test_a_round_that_is_told_anew_masks_with_other_keys(told: Recorded) -> None:
    """After a crash the round runs again, in another start of the server; within one it cannot."""
    one, two = LyingServer(told), LyingServer(told)
    one.setup()
    with pytest.raises(Refused, match="was begun before"):
        one.setup()
    two.setup()
    with pytest.raises(Refused, match="was begun before"):
        one.setup()  # nor after another start of the server
    with pytest.raises(Refused, match="was begun by another start"):
        one.share(one.ids)
    public = [key for server in (one, two) for k in server.keys.values() for key in k[:2]]
    assert len({*public}) == len(public)


@pytest.mark.parametrize(
    ("what", "stage"),
    [*(("config", x) for x in ("share", "collect", "agree", "unmask")), ("since", "collect")],
)
def test_a_later_stage_of_another_config_than_was_agreed_on_is_refused(
    told: Recorded, what: str, stage: str
) -> None:
    """All but one would train at no rate, under the digest that names the true one."""
    server, victim = LyingServer(told), 0
    run_config = told.contexts[victim].run_config
    other = Config.read({**run_config, "train.lr": 1e-7}).identity()
    changed = {"changes": '{"train.lr": 1e-7}', "config": other}
    server.job[stage] = changed if what == "config" else {"since": server.since - 1}
    server.setup()
    with pytest.raises(Refused, match="of another run, round, config or start than what all agr"):
        one_story(server, server.share(server.ids), server.ids)
