"""Secure aggregation: the sum is right, one client is never seen, and who breaks the rules is."""

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from scipy import stats

from client_app.app import app as client_app
from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, PrivacyError, RoundError, StrategyError, UpdateError
from fedlora.federation.client.secure_client import SecureClient
from fedlora.federation.secure import masking
from fedlora.federation.secure.rules import unsummable
from fedlora.federation.secure.terms import Terms, neighbours
from fedlora.federation.secure.vector import Kind, Layout, decode, encode, folded, kinds_of
from fedlora.federation.server.admission import only_of_their_ranks
from fedlora.federation.server.exchange import Schemas
from fedlora.federation.server.loop import FederatedLora
from fedlora.launch.doctor.the_run import experiment as examined
from fedlora.launch.lab.inversion import embeddings, invert, pairs
from fedlora.lora.adapter import Factors
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Client, Layer, Round
from fedlora.training.data.batches import collate
from tests.support.doc_tables import DOCS, table
from tests.support.long import few
from tests.support.private_setting import Setting
from tests.support.secure_members import NAME, agreement_of, begun, shared, terms_of, trio
from tests.support.strategy_federation import EQUAL, EVEN, make_clients, make_start
from tests.support.tiny_federation import Ran, federate, quick

Settings = Callable[..., dict[str, object]]
ON = {"secure.aggregation": True, "secure.colluding": 0}
STAGES = ("setup", "share", "collect", "agree", "unmask")

# What the documentation says can be summed; the tests hold the code to it.
SAID = [
    (row["ranks"], re.findall("`(.+?)`", row["strategies"]))
    for row in table(DOCS / "privacy" / "index.md", "ranks")
]
ANY_RANKS = {name for ranks, names in SAID for name in names if ranks == "any"}
EQUAL_RANKS_ONLY = {name for ranks, names in SAID for name in names if ranks.startswith("one")}


def five(name: str = "ffa", **changes: object) -> dict[str, object]:
    """One round of five clients of one rank, of which two may be lost."""
    few = {"clients.count": 5, "clients.ranks": "3", "run.rounds": 1}
    return quick(name, **{**few, **ON, **changes})


# -- the sum -----------------------------------------------------------------------------------


def made_up(ranks: tuple[int, ...], seed: int) -> list[tuple[Client, Factors, int]]:
    """Clients of these ranks, of different alpha, with an update and a number of examples each."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    found = []
    for i, r in enumerate(ranks):
        scale = {"x": (5 + r) / r, "y": 2.0 / r}
        sent = Factors(
            scale,
            {"x": draw(r, 7)},
            {"x": draw(11, r), "y": draw(5, r)},
            {"y": draw(r, r)},
            {"head": draw(3, 4), "bias": draw(1)[0]},
        )
        client = Client(i, {m: Layer(11, 7, r, s) for m, s in scale.items()})
        found.append((client, sent, 1 + 37 * i % 90))
    return found


def shapes_of(sent: Factors) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(column, name): tuple(x.shape) for column, name, x in sent.items()}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 5, 2, 5, 4, 4, 4), (1,) * 40])
def test_the_sum_is_the_weighted_mean_over_the_holders_of_each_entry_within_the_stated_bound(
    ranks: tuple[int, ...], bits: int
) -> None:
    members = made_up(ranks, seed=len(ranks) + bits)
    kinds = kinds_of((c, shapes_of(x), x.scale) for c, x, _ in members)
    layout, terms = Layout.over([k.shapes for k in kinds]), Terms(len(ranks), 3, 2, bits, 64.0, 90)
    of = {c.id: n for n, kind in enumerate(kinds) for c in kind.clients}
    words = [encode(x, n, 0.1 * c.id, of[c.id], layout, terms) for c, x, n in members]
    total = np.sum(words, axis=0, dtype=words[0].dtype)
    uploads, loss, error = decode(total, len(ranks), layout, kinds, terms)
    N = sum(n for *_, n in members)
    assert error < (1e-3 if bits == 32 else 1e-9)
    assert abs(loss - sum(n * 0.1 * c.id for c, _, n in members) / N) <= 8 * error
    assert sum(u.num_examples for u in uploads) == N
    for upload, kind in zip(uploads, kinds, strict=True):
        assert upload.num_examples == sum(n for c, _, n in members if c in kind.clients)
        for key, got in folded(upload.sent).items():
            for at in np.ndindex(*got.shape):
                held = [
                    (float(folded(x)[key][at]), n)
                    for _, x, n in members
                    if all(i < size for i, size in zip(at, folded(x)[key].shape, strict=True))
                ]
                weight = sum(n for _, n in held)
                want = sum(n * x for x, n in held) / weight
                bound = error * N / weight + 1e-6 * abs(want)  # float32, as it is handed on
                assert abs(float(got[at]) - want) <= bound, (key, at)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_of_the_largest_values_of_the_largest_clients_does_not_wrap(
    bits: int, sign: float
) -> None:
    K, weight = 100, 10_000
    terms = Terms(K, 3, 2, bits, 8.0, weight)
    sent = Factors(other={"x": torch.full((4,), sign * 8.0)})
    kind = Kind(tuple(Client(i, {}) for i in range(K)), shapes_of(sent), {})
    layout = Layout.over([kind.shapes])
    word = encode(sent, weight, 64.0, 0, layout, terms)
    total = np.zeros_like(word)
    for _ in range(K):
        total += word
    (upload,), loss, error = decode(total, K, layout, [kind], terms)
    assert upload.num_examples == K * weight
    assert abs(loss - 64.0) <= 8 * error
    assert (upload.sent.other["x"] - sign * 8.0).abs().max() <= error + 1e-6


@pytest.mark.parametrize(
    ("x", "n", "loss"),
    [
        (8.001, 5, 0.0), (-8.001, 5, 0.0), (float("nan"), 5, 0.0), (float("inf"), 5, 0.0),
        (1.0, 101, 0.0), (1.0, 0, 0.0), (1.0, 5, 64.1), (1.0, 5, float("nan")),
    ],
)  # fmt: skip
def test_what_the_sum_has_no_room_for_is_an_error_that_does_not_say_the_value(
    x: float, n: int, loss: float
) -> None:
    terms = Terms(3, 3, 2, 32, 8.0, 100)
    sent = Factors(other={"x": torch.tensor([0.5, x], dtype=torch.float64)})
    layout = Layout.over([shapes_of(sent)])
    with pytest.raises(UpdateError, match=r"nothing was sent; (raise|lower) ") as e:
        encode(sent, n, loss, 0, layout, terms)
    assert "8.001" not in str(e.value)
    assert "101" not in str(e.value)
    assert encode(Factors(other={"x": torch.tensor([0.5, 1.0])}), 100, 64.0, 0, layout, terms)[0]


# -- masks -------------------------------------------------------------------------------------


def test_flowers_generator_forgets_most_of_a_key_and_the_masks_here_do_not() -> None:
    """Why it is not used: two keys whose 4-byte words have one sum modulo 2 give one mask."""
    one = bytes(range(32))
    other = bytes(4) + bytes(a ^ b for a, b in zip(one[:4], one[4:8], strict=True)) + one[8:]
    assert one != other
    same = (pseudo_rand_gen(key, 2**32, [(50,)])[0].tolist() for key in (one, other))
    assert next(same) == next(same)
    ours = [masking.mask(key, 50, 32).tolist() for key in (one, other)]
    assert ours[0] != ours[1]
    assert ours[0] == masking.mask(one, 50, 32).tolist()


@pytest.mark.parametrize("bits", [32, 64])
def test_a_mask_is_uniform(bits: int) -> None:
    x = masking.mask(masking.fresh_seed(), 20_000, bits).astype(np.float64) / 2.0**bits
    assert stats.kstest(x, "uniform").pvalue > 1e-6


def test_a_pair_computes_one_mask_which_cancels_in_the_sum() -> None:
    (a, pa), (b, pb) = masking.key_pair(), masking.key_pair()
    shared = masking.pair_mask(a, pb, b"told", 9, 32)
    assert shared.tolist() == masking.pair_mask(b, pa, b"told", 9, 32).tolist()
    total = np.zeros(9, dtype=np.uint32)
    masking.cancel(total, 1, 2, shared)
    assert total.any()
    masking.cancel(total, 2, 1, shared)
    assert not total.any()


@pytest.mark.parametrize(("n", "shares"), [(5, 5), (9, 3), (9, 7), (20, 5)])
def test_neighbours_are_mutual_and_as_many_as_there_are_shares(n: int, shares: int) -> None:
    near = neighbours(list(range(10, 10 + n)), shares, Round(3, 1))
    assert all(i in near[i] and len(near[i]) == shares for i in near)
    assert all(i in near[j] for i in near for j in near[i])


# -- one client's stages -----------------------------------------------------------------------


def test_what_one_client_sends_is_uniform_and_says_nothing_of_its_update(tmp_path: Path) -> None:
    """Of all-zero updates and of large ones, the same: independent of what was masked."""
    small, large = np.zeros(20_000, dtype=np.uint32), np.full(20_000, 2**27, dtype=np.uint32)
    for name, vector in (("small", small), ("large", large)):
        _, masked = trio(tmp_path / name, vector)
        for x in masked:
            assert stats.kstest(x / 2.0**32, "uniform").pvalue > 1e-6
        total = masked[0] + masked[1]
        assert stats.kstest(total / 2.0**32, "uniform").pvalue > 1e-6  # nor of two of three


@pytest.mark.parametrize(
    ("survivors", "reason"),
    [
        ([1, 2], "not those of this client's sum"),  # it is in it itself
        ([0, 1, 2, 3], "not those of this client's sum"),
        ([0, 1, 2, 2], "not those of this client's sum"),
        ([0, 1], "a sum over 2 of this client's neighbours: must be 3"),
        ([0], "a sum over 1 of this client's neighbours"),
    ],
)
def test_survivors_that_would_unmask_a_client_are_not_signed_then_or_later(
    tmp_path: Path, survivors: list[int], reason: str
) -> None:
    members, _ = trio(tmp_path, np.zeros(5, dtype=np.uint32))
    with pytest.raises(PrivacyError, match=re.escape(reason)):
        members[0].agree(survivors, terms_of)
    with pytest.raises(PrivacyError, match="not at stage 'agree'"):
        members[0].agree([0, 1, 2], terms_of)
    with pytest.raises(PrivacyError, match="not at stage 'unmask'"):
        members[0].unmask({}, terms_of)
    assert members[1].agree([0, 1, 2], terms_of)


def test_survivors_whose_shares_did_not_come_are_not_signed(tmp_path: Path) -> None:
    """Of one that is in the sum a member holds a share, or it says nothing of that sum."""
    members, keys = begun(tmp_path, [agreement_of(4)] * 4)
    came = shared(members, keys)
    members[0].open({1: came[0][1], 2: came[0][2]}, terms_of).masked(np.zeros(5, dtype=np.uint32))
    with pytest.raises(PrivacyError, match="not those of this client's shares"):
        members[0].agree([0, 1, 2, 3], terms_of)


def test_a_client_whose_kind_is_said_to_be_gone_signs_nothing(tmp_path: Path) -> None:
    """What it alone sends would stand in the sum as it is: even where the sum is of many."""
    members, _ = trio(tmp_path, np.zeros(5, dtype=np.uint32), 5, {0: 0, 1: 0, 2: 1, 3: 1, 4: 1})
    for m in members[0], members[2]:  # the victim, and one of the others
        with pytest.raises(PrivacyError, match="all but fewer than 2 clients of one kind are gone"):
            m.agree([0, 2, 3, 4], terms_of)
    assert members[1].agree([0, 1, 2, 3], terms_of)
    assert members[3].agree([2, 3, 4], terms_of)


def test_a_member_gives_one_kind_of_share_of_each_and_only_where_enough_signed_the_same(
    tmp_path: Path,
) -> None:
    """Those of another story do not count, nor one that is not a signature at all."""
    members, _ = trio(tmp_path, np.zeros(5, dtype=np.uint32), 5)
    four, all_ = [0, 1, 2, 3], [0, 1, 2, 3, 4]
    signed = {m.me: m.agree(four if m.me < 3 else all_, terms_of) for m in members[:4]}
    with pytest.raises(PrivacyError, match=r"1 members signed .* must be 3"):
        members[3].unmask(signed, terms_of)
    with pytest.raises(PrivacyError, match="not at stage 'unmask'"):
        members[3].unmask(signed, terms_of)
    with pytest.raises(PrivacyError, match="2 members signed"):
        members[0].unmask({0: signed[0], 1: signed[1], 2: bytes(64), 3: signed[3]}, terms_of)
    assert members[1].unmask(signed, terms_of).keys() == {0, 1, 2, 3, 4}
    assert 2 * terms_of(5).threshold > 5  # so one kind alone can be put together


def test_keys_that_are_not_ones_own_or_are_twice_there_are_refused(tmp_path: Path) -> None:
    def fresh(name: str) -> tuple[SecureClient, dict[int, Any]]:
        members, keys = begun(tmp_path / name, [agreement_of(3)] * 3)
        return members[0], keys

    me, keys = fresh("own")
    other = keys[0]._replace(boxes=masking.key_pair()[1])
    with pytest.raises(PrivacyError, match="other keys than its own"):
        me.share({**keys, 0: other}, terms_of)
    me, keys = fresh("twice")
    with pytest.raises(PrivacyError, match="two public keys are the same"):
        me.share({**keys, 2: keys[1]}, terms_of)
    me, keys = fresh("few")
    with pytest.raises(PrivacyError, match="1 neighbours: must be 2 to 3"):
        me.share({0: keys[0]}, terms_of)
    me, keys = fresh("stranger")
    with pytest.raises(PrivacyError, match="not in the table"):
        me.share({0: keys[0], 1: keys[1], 7: keys[2]}, terms_of)
    for which in ("masks", "boxes"):  # who can read the shares can take off the masks
        me, keys = fresh(which)
        with pytest.raises(PrivacyError, match="client 1 did not sign these keys"):
            me.share({**keys, 1: keys[1]._replace(**{which: masking.key_pair()[1]})}, terms_of)
    me, keys = fresh("renamed")
    with pytest.raises(PrivacyError, match="client 1 did not sign these keys"):
        me.share({0: keys[0], 1: keys[2], 2: keys[1]}, terms_of)


def test_fewer_shares_than_the_threshold_are_no_secret(tmp_path: Path) -> None:
    members, keys = begun(tmp_path, [agreement_of(5)] * 5)
    came = shared(members, keys)
    kept = json.loads((tmp_path / "0" / "round-00001.collect.json").read_text())
    pieces = [m.open(came[m.me], terms_of).state["shares"][0] for m in members]
    assert terms_of(5).threshold == 3
    for secret, mine in zip(("seed", "sk1"), zip(*pieces, strict=True), strict=True):
        assert masking.joined(mine[2:]).hex() == kept[secret]
        with suppress(PrivacyError):
            assert masking.joined(mine[3:]).hex() != kept[secret]


def test_a_member_may_demand_more_of_its_kind_than_the_run_does(tmp_path: Path) -> None:
    """The larger secure.colluding, its own, holds when it begins and when it signs."""
    kinds = {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}
    strict = SecureClient(tmp_path / "strict", 0, NAME, together=3)
    with pytest.raises(PrivacyError, match="fewer than 3 clients of one kind"):
        strict.setup(agreement_of(5, kinds=kinds), terms_of)
    members, _ = trio(tmp_path, np.zeros(5, dtype=np.uint32), 6, dict.fromkeys(range(6), 0) | {
        3: 1, 4: 1, 5: 1})  # fmt: skip
    members[3].together = 3
    with pytest.raises(PrivacyError, match="all but fewer than 3 clients of one kind are gone"):
        members[3].agree([0, 1, 2, 3, 4], terms_of)


def test_shares_that_were_changed_on_the_way_are_found(tmp_path: Path) -> None:
    members, keys = begun(tmp_path, [agreement_of(3)] * 3)
    came = shared(members, keys)
    with pytest.raises(PrivacyError, match="do not decrypt"):
        members[0].open({1: came[0][1], 2: came[0][1]}, terms_of)  # 1's in place of 2's
    assert not list((tmp_path / "0").glob("round-*"))


def test_secrets_are_readable_by_their_owner_alone_and_gone_after_the_round(
    tmp_path: Path,
) -> None:
    members, _ = trio(tmp_path, np.zeros(5, dtype=np.uint32))
    signed = {m.me: m.agree([0, 1, 2], terms_of) for m in members}
    (left,) = (tmp_path / "0").glob("round-*")
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "0" / "identity.key").stat().st_mode) == 0o600
    members[0].unmask(signed, terms_of)
    assert {p.name for p in (tmp_path / "0").iterdir()} == {"begun.json", "identity.key"}


# -- gradient inversion ------------------------------------------------------------------------

QUERY = "bert.encoder.layer.0.attention.self.query"


def test_a_sentence_can_be_read_from_an_update_but_not_from_what_is_sent(
    settings: Settings, tmp_path: Path
) -> None:
    s = Setting(settings("bert", **{"strategy.name": "fedavg"}), rank=12)
    s.model.peft.eval()
    s.losses([0]).sum().backward()
    gradient = s.live["A"][QUERY].grad
    assert gradient is not None
    ids = collate(s.rows, torch.tensor([0]))["input_ids"][0]
    ids = ids[ids != 0]

    def recall(A: torch.Tensor) -> float:
        encoder = s.model.peft.base_model.model.bert.embeddings
        return invert(A, embeddings(encoder, 32, len(ids) + 2), pairs(ids, 32), drop=1e-6).recall

    sent = Factors({QUERY: 1.0}, A={QUERY: 7 * gradient / gradient.abs().max()})
    kind = Kind((Client(0, {}),), shapes_of(sent), sent.scale)
    layout, terms = Layout.over([kind.shapes]), Terms(3, 3, 2, 32, 8.0, 1)
    vector = encode(sent, 1, 0.0, 0, layout, terms)
    _, masked = trio(tmp_path, vector)

    def read(words: masking.Words) -> torch.Tensor:
        words = words.copy()
        words[0] = 1  # the number of examples, which the server would have to guess
        (upload,), *_ = decode(words, 1, layout, [kind], terms)
        return upload.sent.A[QUERY].double()

    assert recall(read(vector)) == 1.0
    assert [recall(read(x)) for x in masked] == [0.0, 0.0, 0.0]


# -- which strategies --------------------------------------------------------------------------


def reason(name: str, clients: list[Client]) -> str:
    """Of rounds 1 and 2, since some take turns."""
    strategy = STRATEGIES[name]()
    state = strategy.init(make_start(clients, torch.float32))
    schemas = Schemas(strategy)
    found = ""
    for number in (1, 2):
        round = Round(number, 0)
        kinds = kinds_of((c, *schemas.of(state, c, 0, round)) for c in clients)
        found = found or unsummable(strategy, state, kinds, round)
    return found


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_goes_on_sums_exactly_where_the_documentation_says_so(name: str) -> None:
    strategy = STRATEGIES[name]()
    equal = EVEN if list(strategy.problems(EQUAL)) else EQUAL
    mixed = make_clients([4, 8, 4, 8], [6.0, 4.0, 6.0, 4.0], step=4)
    summable = EQUAL_RANKS_ONLY | ANY_RANKS
    assert bool(reason(name, equal)) == (name not in summable)
    if not list(strategy.problems(mixed)):
        said = reason(name, mixed)
        assert bool(said) == (name not in ANY_RANKS)
        assert not said or "use ffa, fedsb" in said
    assert sum(name in names for _, names in SAID) == 1, "one row of docs/privacy/index.md has it"


def test_a_strategy_that_needs_single_updates_is_refused_before_anything_is_sent(
    settings: Settings,
) -> None:
    sent: list[str] = []

    def app(message: Message, context: Context) -> Message:
        sent.append(message.metadata.message_type)
        return client_app(message, context)

    with pytest.raises(StrategyError, match=r"FedEx needs each client's own update.*use ffa"):
        federate(settings(**five("fedex")), app=app, unasked=True)
    assert set(sent) == {"query"}


def test_a_client_alone_of_its_rank_is_refused_before_round_1(settings: Settings) -> None:
    with pytest.raises(StrategyError, match=r"client 4 is the only one of rank 5.*would be no sum"):
        federate(settings(**five(**{"clients.ranks": "2,2,2,2,5"})), unasked=True)
    two = make_clients([2, 5, 5, 2])
    assert not list(only_of_their_ranks(two, 2))
    (one, *_) = said = list(only_of_their_ranks(two, 3))  # with one that helps the server
    assert "client 0 is one of 2 of rank 2" in one
    assert len(said) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"clients.count": 2}, "must be 3 at least"),
        ({"secure.num-shares": 9}, "must be 3 to 5"),
        ({"secure.num-shares": 4}, "must be odd"),
        ({"secure.reconstruction-threshold": 6}, "must be 3 to 5 of 5 clients"),
        ({"secure.reconstruction-threshold": 2}, "more than half of both"),
        ({"secure.colluding": 1, "clients.count": 3}, "takes 4 clients at least"),
        ({"secure.colluding": 2}, "set it to 1; 0 is for clients that never help the server"),
        ({"secure.max-weight": 10**9}, "does not fit"),
        ({"robust.method": "median"}, "judges single updates"),
        ({"round.max-norm": 1.0}, "the norm of one"),
        ({"output.keep-updates": True}, "no update reaches the server"),
        ({"ranks.policy": "legend", "strategy.name": "fedex"}, "steps and times"),
        ({"strategy.name": "fedsa"}, "in the clear"),
        ({"strategy.name": "fedsb", "strategy.fedsb.init-from": "update-approx"}, "first gradient"),
        ({"privacy.level": "client", "privacy.epsilon": 3.0}, "the server clips"),
        ({"privacy.epsilon": 3.0, "privacy.release-metrics": True}, "keeps those on the clients"),
    ],
)
def test_what_does_not_go_with_it_is_said_with_the_rest_of_the_config(
    settings: Settings, change: Mapping[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        preflight.read(settings(**five(**change)))
    without = {**five(**change), "secure.aggregation": False}
    preflight.read(settings(**without))  # and it is this that it does not go with


# -- whole federations -------------------------------------------------------------------------


@dataclass
class Lossy:
    """The real ClientApp, but chosen clients are lost at a stage, before or after its work."""

    stage: str
    clients: tuple[int, ...] = ()
    after: bool = False
    rounds: tuple[int, ...] = (1,)
    seen: list[tuple[str, int, Message, Message]] = field(default_factory=list)

    def __call__(self, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type.removeprefix("train.secagg_")
        client = int(context.node_config["partition-id"])
        hit = kind == self.stage and client in self.clients
        if hit:
            hit = int(message.content.config_records["job"]["round"]) in self.rounds  # type: ignore[arg-type]
        if not hit or self.after:
            reply = client_app(message, context)
            self.seen.append((kind, client, message, reply))
        return Message(Error(3, "the node went away"), reply_to=message) if hit else reply


@dataclass
class Outcome:
    ran: Ran
    factors: Factors

    @property
    def last(self) -> dict[str, Any]:
        return self.ran.rounds[-1]


def play(given: Mapping[str, object], **more: Any) -> Outcome:
    found: list[FederatedLora] = []
    ran = federate(given, before=found.append, **more)
    return Outcome(ran, found[0].setting.strategy.effective(found[0].run.state).factors)


CLEAR: dict[str, Outcome] = {}


def in_the_clear(given: Mapping[str, object], lost: tuple[int, ...] = ()) -> Outcome:
    """The same round without secure aggregation, and without the lost; each kind is run once."""
    named = {key: value for key, value in given.items() if not key.startswith(("run.out", "sec"))}
    if (key := repr((sorted(named.items()), lost))) not in CLEAR:
        clear = {**given, "secure.aggregation": False, "run.name": "clear"}
        CLEAR[key] = play(clear, app=Lossy("train", lost))
    return CLEAR[key]


def check_close(got: Outcome, want: Outcome) -> None:
    """Within the quantisation's stated bound, and the float32 rounding of both means."""
    a, b, error = folded(got.factors), folded(want.factors), got.last["secure"]["error"]
    assert 0 < error < 1e-4
    assert a.keys() == b.keys()
    for key, x in a.items():
        most = error + 1e-6 * float(b[key].abs().max())
        assert float((x - b[key]).abs().max()) <= most, key
    if want.last["train_loss"] is not None:
        want_loss = pytest.approx(want.last["train_loss"], abs=8 * error + 1e-6)
        assert got.last["train_loss"] == want_loss


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fedavg", {}),
        ("ffa", {"clients.ranks": "2,3", "secure.num-shares": 3}),
        ("fedsb", {"clients.ranks": "2,4"}),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                ("fedavg", {"secure.modulus-bits": 64, "secure.clipping-range": 1000.0}),
                ("ravan", {"clients.ranks": "4,8", "strategy.ravan.choice": "leading"}),
                ("fedsa", {"clients.ranks": "5,2", "strategy.fedsa.average-at-end": False}),
            )
        ),
    ],
)
def test_a_round_ends_where_it_would_have_ended_in_the_clear(
    settings: Settings, name: str, change: Mapping[str, object]
) -> None:
    given = settings(**five(name, **change))
    got = play(given)
    check_close(got, in_the_clear(given))
    assert got.last["accepted"] == [0, 1, 2, 3, 4]
    assert got.last["secure"]["summed"] == 5


@pytest.mark.parametrize(
    ("stage", "after"),
    few(
        [*((stage, False) for stage in STAGES), ("collect", True)],
        ("collect", False),
        ("collect", True),
    ),
)
def test_the_sum_without_those_that_were_lost_is_right_at_every_stage(
    settings: Settings, stage: str, after: bool
) -> None:
    given = settings(**five())
    got = play(given, app=Lossy(stage, (1, 3), after))
    in_the_sum = stage in ("agree", "unmask")  # its update was there already
    want = in_the_clear(given, () if in_the_sum else (1, 3))
    check_close(got, want)
    assert got.last["accepted"] == want.last["accepted"]
    assert [f["client"] for f in got.last["failures"]] == [1, 3]
    assert got.last["secure"]["summed"] == (5 if in_the_sum else 3)


TOO_FEW = r"2 clients .*it takes 3 .*the node went away.*resume"


@pytest.mark.parametrize("stage", few(["setup", "share", "agree", "unmask"], "share", "unmask"))
def test_too_few_at_any_stage_are_an_error(settings: Settings, stage: str) -> None:
    with pytest.raises(RoundError, match=TOO_FEW):
        federate(settings(**five()), app=Lossy(stage, (0, 1, 3)))


def test_too_few_leave_the_checkpoint_and_the_run_goes_on_from_it(settings: Settings) -> None:
    given = settings(**five(**{"run.rounds": 2}))
    with pytest.raises(RoundError, match=TOO_FEW):
        federate(given, app=Lossy("collect", (0, 1, 3), rounds=(2,)))
    whole = federate({**given, "run.name": "whole"})
    resumed = federate({**given, "run.resume": True})
    assert [r["round"] for r in resumed.rounds] == [0, 1, 2]
    assert resumed.adapter == whole.adapter


def test_two_workers_give_the_bytes_of_one_and_a_second_run_those_of_the_first(
    settings: Settings,
) -> None:
    given = five("rolora", **{"clients.ranks": "2,3", "run.rounds": 2})
    one = federate(settings(**given))
    two = federate(settings(**given, **{"run.name": "two", "simulate.workers": 2}))
    assert one.adapter == two.adapter
    assert one.metrics == two.metrics


def test_a_rank_that_loses_all_but_one_client_leaves_that_one_out(settings: Settings) -> None:
    given = settings(**five(**{"clients.count": 8, "clients.ranks": "2,2,2,3"}))
    got = play(given, app=Lossy("collect", (7,)))
    assert got.last["accepted"] == [0, 1, 2, 4, 5, 6]
    assert got.last["failures"][1]["client"] == 3
    assert "the only one left of its ranks" in got.last["failures"][1]["reason"]
    check_close(got, in_the_clear(given, (3, 7)))


@pytest.mark.slow
def test_a_rank_that_loses_all_but_as_many_as_may_help_the_server_and_one_is_left_out(
    settings: Settings,
) -> None:
    """With one that helps, a sum over two clients of a rank would be the other's."""
    eight = {"clients.count": 8, "clients.ranks": "2,2,2,2,2,3,3,3", "secure.colluding": 1}
    got = play(settings(**five(**eight)), app=Lossy("collect", (7,)))
    assert got.last["accepted"] == [0, 1, 2, 3, 4]
    assert [f["client"] for f in got.last["failures"]] == [7, 5, 6]
    reason = got.last["failures"][1]["reason"]
    assert "it is one of 2 left of its ranks" in reason
    assert "and it takes 3" in reason


def test_a_client_out_of_range_drops_out_with_the_reason_and_the_sum_is_right(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.federation.client.job import ClientJob, LocalRound

    local_round = ClientJob.local_round

    @contextmanager
    def large(job: ClientJob) -> Iterator[LocalRound]:
        with local_round(job) as local:
            yield local
        if job.job.client == 2:
            B = {m: x + 9 for m, x in local.done.sent.B.items()}
            local.done = replace(local.done, sent=replace(local.done.sent, B=B))

    given = settings(**five())
    with monkeypatch.context() as patch:
        patch.setattr(ClientJob, "local_round", large)
        got = play(given)
    assert [f["client"] for f in got.last["failures"]] == [2]
    assert "secure.clipping-range = 8" in got.last["failures"][0]["reason"]
    check_close(got, in_the_clear(given, (2,)))


def spoiled(stage: str, content: RecordDict) -> None:
    """A reply that says something else than it must."""
    said = content.config_records.get("secagg")
    match stage:
        case "setup":
            said["keys"] = [b"no key", said["keys"][1]]
        case "share":
            said["boxes"] = said["boxes"][1:]
        case "collect":
            array = content.array_records["masked"]["vector"]
            short = replace(array, data=array.data[4:])
            content.array_records["masked"]["vector"] = short
        case "agree":
            said["signature"] = bytes(64)
        case "unmask":
            said["clients"] = [*said["clients"][1:], 99]


@pytest.mark.parametrize("stage", few(STAGES, "share", "collect", "unmask"))
def test_a_reply_that_is_not_as_it_must_be_costs_its_client_alone(
    settings: Settings, stage: str
) -> None:
    given = settings(**five())

    def app(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if (
            message.metadata.message_type.endswith(stage)
            and context.node_config["partition-id"] == 2
        ):
            spoiled(stage, reply.content)
        return reply

    got = play(given, app=app)
    (failure,) = got.last["failures"]
    assert (failure["client"], failure["reason"].split(":")[0]) == (2, stage)
    check_close(got, in_the_clear(given, () if stage in ("agree", "unmask") else (2,)))


def test_a_client_that_lost_its_secrets_between_two_stages_is_a_drop_out(
    settings: Settings,
) -> None:
    given = settings(**five())

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type.endswith("collect"):
            for file in Path(str(given["run.out"])).rglob("client-4/secure/round-*"):
                file.unlink()
        return client_app(message, context)

    got = play(given, app=app)
    assert got.last["accepted"] == [0, 1, 2, 3]
    assert "not at stage 'collect' of round 1" in got.last["failures"][0]["reason"]


def test_a_message_that_comes_again_or_of_another_round_is_refused_at_every_stage(
    settings: Settings,
) -> None:
    asked: list[str] = []

    def app(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if "secagg" not in kind:
            return client_app(message, context)
        other = {**message.content.config_records["job"], "round": 7}
        elsewhere = RecordDict({**message.content, "job": ConfigRecord(other)})
        wrong = Message(elsewhere, message.metadata.dst_node_id, kind, ttl=9.0)
        if not kind.endswith("setup"):
            assert "not at stage" in client_app(wrong, context).error.reason
        reply = client_app(message, context)
        again = client_app(message, context)
        asked.append(kind)
        assert again.has_error()
        assert "was begun before" in again.error.reason or "not at stage" in again.error.reason
        return reply

    got = play(settings(**five()), app=app)
    assert not got.last["failures"]
    assert len(asked) == 5 * 5


def test_nothing_of_one_client_leaves_in_the_clear(settings: Settings) -> None:
    """No metrics, no count, no factor: keys, shares, one masked vector, and what a model of the
    server's own sending measures; in the log, neither."""
    spy = Lossy("none")
    got = play(settings(**five(**{"evaluate.clients": True})), app=spy)
    for kind, _, _, reply in spy.seen:
        names = {"query": {"facts"}, "collect": {"reply", "masked", "start"}, "evaluate": {"reply"}}
        content = reply.content
        assert set(content) - {"metrics"} == names.get(kind, {"reply", "secagg"})
        if "metrics" in content:
            assert dict(content.metric_records["metrics"]) == {"num-examples": 1}
        for what, record in content.array_records.items():
            if what != "start":
                assert [a.stype for a in record.values()] == ["fedlora.masked"]
    for facts in got.last["clients"].values():
        told = {"round", "rank", "keeps", "examples", "bytes_up", "bytes_down"}
        assert all(value is None for key, value in facts.items() if key not in told)
        assert facts["examples"] == 1


@pytest.mark.parametrize("kind", ["train", "train.gradient", "query.collect"])
def test_a_client_sends_nothing_in_the_clear_even_where_only_its_node_wants_that(
    settings: Settings, kind: str
) -> None:
    """A node that says `secure-aggregation = true` answers no server that runs without."""
    clear = settings(**five(**{"secure.aggregation": False}))
    refused: list[str] = []

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            asked = Message(message.content, message.metadata.dst_node_id, kind, ttl=9.0)
            refused.append(str(client_app(asked, context).error.reason))
        return client_app(message, context)

    with pytest.raises(RoundError, match="does not send an update in the clear"):
        federate(clear, app=app, nodes={i: {"secure-aggregation": True} for i in range(5)})
    assert len(refused) == 5
    assert all("secure.aggregation is on" in text for text in refused)


def test_it_composes_with_noise_on_the_clients(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither a count nor a loss is in such a sum."""
    beside: list[tuple[int, float]] = []

    def encoded(sent: Factors, n: int, loss: float, *args: Any) -> Any:
        if args[-1].weight == 1:  # no made-up updates
            beside.append((n, loss))
        return encode(sent, n, loss, *args)

    monkeypatch.setattr("fedlora.federation.secure.vector.encode", encoded)
    noise = {"privacy.noise-multiplier": 0.5, "privacy.insecure-reproducible-noise": True}
    given = settings(**five(**noise, **{"privacy.delta": 1e-3}))
    got = play(given)
    want = in_the_clear(given)
    assert got.last["train_loss"] is want.last["train_loss"] is None
    check_close(got, want)
    assert got.last["secure"]["error"] < 1e-6  # all weigh 1
    assert set(beside) == {(1, 0.0)}
    assert not any(facts["privacy"] for facts in got.last["clients"].values())


def test_doctor_says_that_it_is_on_and_what_it_costs(settings: Settings) -> None:
    found, _ = examined(Config.read(settings(**five())))
    said = [f.what for f in found if "secure aggregation" in f.what]
    assert "sums over 3 to 5 clients; up to 2 of 5 may drop out" in said[0]
    numbers = int(re.search(r"up (\d+) numbers of 4 bytes", said[1])[1])  # type: ignore[index]
    got = play(settings(**five()))
    up = {facts["bytes_up"] for facts in got.last["clients"].values()}
    assert all(4 * numbers < n < 4 * numbers + 8000 for n in up)
    assert not any("a ring" in f.what for f in found)
    assert any("the server may have 0 clients that help it" in f.what for f in found)
    ring, _ = examined(Config.read(settings(**five(**{"secure.num-shares": 3}))))
    assert any("a ring (secure.num-shares) holds against an honest" in f.what for f in ring)
    refused, _ = examined(Config.read(settings(**five("fedex"))))
    assert any(f.level == "problem" and "sums only" in f.what for f in refused)


# -- real engines ------------------------------------------------------------------------------


@pytest.mark.slow
def test_flowers_engine_ends_in_the_bytes_of_local_grid(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tomli_w

    from fedlora.launch.simulate.run import flower

    pytest.importorskip("ray")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    given = settings(**five(**{"run.rounds": 2, "clients.count": 3, "run.name": "local"}))
    local = federate(given)
    (file := tmp_path / "experiment.toml").write_text(
        tomli_w.dumps(dict(Config.read(given).flat()))
    )
    flower(file, {"run.name": "ray"}, quiet=True)
    far = Ran(tmp_path / "ray")
    assert far.adapter == local.adapter
    assert far.rounds[-1]["secure"] == local.rounds[-1]["secure"]


@pytest.mark.slow
def test_a_deployment_ends_in_the_bytes_of_local_grid(settings: Settings, tmp_path: Path) -> None:
    from fedlora.launch.deploy import host
    from tests.support.deployment import adapter, brought_up, ran, rounds, simulated

    plan = brought_up(tmp_path / "dep", settings(**five(**{"run.rounds": 2})), 3)
    try:
        status, results = ran(plan)
        assert status == "finished:completed"
        assert all(r["secure"]["summed"] == 3 for r in rounds(results)[1:])
        assert adapter(results) == adapter(simulated(plan, tmp_path))
        left = list((tmp_path / "dep").rglob("secure/round-*"))
        assert not left
    finally:
        host.down(plan, print)
