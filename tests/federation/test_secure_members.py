"""A node believes the keys that its operator listed, and no server's word on whose a key is."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.config.members import Members, key_text, private_key, public_key
from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, PolicyError, PrivacyError
from fedlora.federation.client.admit import check_terms
from fedlora.federation.secure import masking, signing
from fedlora.federation.secure.signing import RoundKeys, keys_text, survivors_text
from fedlora.federation.secure.terms import Terms
from fedlora.launch.deploy import keys
from tests.conftest import tiny_settings
from tests.federation.test_secure_aggregation import five
from tests.support.lying_server import LyingServer, Recorded, Refused
from tests.support.under_policy import named, written

CLIENTS = range(4)
FOUR = {"clients.count": 4, "secure.colluding": 1}


def node(i: int, root: Path) -> Path:
    return root / f"node-{i}"


def public(i: int, root: Path) -> bytes:
    return public_key((node(i, root) / "member.pub").read_text())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, str]) -> Recorded:
    """An honest round of four nodes, each with a key of its own and a list of all four."""
    root = tmp_path_factory.mktemp("members")
    for i in CLIENTS:
        secure = {"require": True, "members": "members.toml"}
        kinds = ["query", "train", "evaluate", "secagg"]
        written(node(i, root), tiny["bert"], tiny["rows"], secure=secure, limits={"kinds": kinds})
        keys.own_keys(node(i, root))
    for i in CLIENTS:
        Members({j: public(j, root) for j in CLIENTS}).save(node(i, root) / "members.toml")
    given = tiny_settings(tiny, root, "float32", **five("fedavg", **FOUR))
    nodes: Mapping[int, Any] = {i: named(node(i, root) / "node.toml") for i in CLIENTS}
    return Recorded.of(given, nodes=nodes)


@pytest.fixture
def lists(told: Recorded) -> Any:
    """The lists as they were, after a test that changes some."""
    whole = {i: Members.load(node(i, told.root) / "members.toml") for i in CLIENTS}
    yield whole
    for i, members in whole.items():
        members.save(node(i, told.root) / "members.toml")


def shown(server: LyingServer) -> dict[str, Any]:
    flat = [key for i in server.ids for key in server.keys[i]]
    return {"clients": server.ids, "keys": flat}


def test_nodes_sign_with_the_keys_that_were_made_on_them_and_the_round_is_summed(
    told: Recorded,
) -> None:
    (line,) = (told.root / "run").rglob("rounds.jsonl")
    assert '"signed": 4' in line.read_text()
    server = LyingServer(told)
    server.setup()
    assert {i: k.identity for i, k in server.keys.items()} == {
        i: public(i, told.root) for i in CLIENTS
    }


def forged(server: LyingServer, i: int, identity: bytes) -> RoundKeys:
    """Keys of the server's own making in a client's place, well signed by this identity."""
    (_, masks), (_, boxes) = masking.key_pair(), masking.key_pair()
    n = server.agreement.name
    text = keys_text(n.run, n.incarnation, n.round, i, masks, boxes, server.agreement.digest())
    return RoundKeys(masks, boxes, signing.public_half(identity), signing.sign(identity, text))


def test_a_server_that_puts_keys_of_its_own_in_anothers_place_is_refused(told: Recorded) -> None:
    """Signed by itself; in another's name; and an honest member's signature of another round."""
    old = LyingServer(told)
    old.setup()

    def in_the_name_of_another(server: LyingServer) -> RoundKeys:
        return forged(server, 1, signing.new_identity())._replace(identity=server.keys[1].identity)

    server = LyingServer(told)
    server.setup()
    honest = server.keys[1]
    for asked, keys_, says in (
        (0, forged(server, 1, signing.new_identity()), "client 1 shows another key than this"),
        (2, in_the_name_of_another(server), "client 1 did not sign these keys"),
        (3, old.keys[1], "client 1 did not sign these keys, or was told of another"),
    ):
        server.keys[1] = keys_
        with pytest.raises(Refused, match=says):
            server.answers("share", asked, **shown(server))
    server.keys[1] = honest
    assert server.answers("share", 1, **shown(server))["boxes"]


def test_without_a_list_the_same_server_is_believed(
    told: Recorded, lists: dict[int, Members]
) -> None:
    """The test has teeth: a node that lists nobody gives shares to keys of the server's making."""
    path = node(0, told.root) / "node.toml"
    whole = path.read_text()
    path.write_text(whole.replace('members = "members.toml"\n', ""))
    try:
        server = LyingServer(told)
        server.setup()
        server.keys[1] = forged(server, 1, signing.new_identity())
        assert server.answers("share", 0, **shown(server))["boxes"]
    finally:
        path.write_text(whole)


CHANGES: list[tuple[Callable[[Members], Members], str]] = [
    (lambda m: Members({i: k for i, k in m.listed.items() if i != 2}), "client 2 is no member"),
    (lambda m: m.revoking(2), "client 2's key is revoked"),
    (lambda m: Members(m.listed, frozenset([m.listed[0]])), "client 0's key is revoked"),
    (
        lambda m: Members({**m.listed, 2: signing.public_half(signing.new_identity())}),
        "client 2 shows another key",
    ),
]


def test_unknown_and_revoked_members_are_refused_before_any_share(
    told: Recorded, lists: dict[int, Members]
) -> None:
    """Each of four nodes after another change of its list; the third revoked client 0."""
    server = LyingServer(told)
    server.setup()
    for i, (change, says) in zip((0, 1, 2, 3), CHANGES, strict=True):
        change(lists[i]).save(node(i, told.root) / "members.toml")
        with pytest.raises(Refused, match=says):
            server.answers("share", i, **shown(server))


def test_a_member_that_is_revoked_within_the_round_opens_no_sum(
    told: Recorded, lists: dict[int, Members]
) -> None:
    server = LyingServer(told)
    server.setup()
    server.collect(server.share(server.ids))
    signed = server.agree(server.ids, server.ids)
    lists[0].revoking(3).save(node(0, told.root) / "members.toml")
    with pytest.raises(Refused, match="client 3's key is revoked"):
        server.unmask([0], signed)


def test_a_node_without_its_key_or_its_list_takes_part_in_no_sum(
    told: Recorded, lists: dict[int, Members]
) -> None:
    for name, says in (("member.key", "no key to sign with"), ("members.toml", "ConfigError")):
        path = node(0, told.root) / name
        kept = path.read_bytes()
        path.unlink()
        try:
            with pytest.raises(Refused, match=says):
                LyingServer(told).setup()
        finally:
            path.write_bytes(kept)


def test_the_nodes_own_colluding_is_more_than_the_runs(told: Recorded) -> None:
    path = node(0, told.root) / "node.toml"
    whole = path.read_text()
    path.write_text(whole.replace("[secure]\n", "[secure]\ncolluding = 2\n"))
    try:
        with pytest.raises(Refused, match="policy does not allow a sum with secure"):
            LyingServer(told).setup()
    finally:
        path.write_text(whole)


def test_a_node_that_lists_members_takes_part_in_no_ring() -> None:
    """A server that lies would name one, and choose each client's neighbours."""
    config = Config.read({"data.path": "x", "secure.num-shares": 5})
    policy = Policy.model_validate({"data": {"path": "x"}, "secure": {"members": "members.toml"}})
    check_terms(policy, Terms.of(config, 5))
    with pytest.raises(PolicyError, match=r"does not allow secure\.num-shares"):
        check_terms(policy, Terms.of(config, 9))
    check_terms(Policy.model_validate({"data": {"path": "x"}}), Terms.of(config, 9))


# -- the list and the keys ------------------------------------------------------------------------


def test_a_key_is_made_where_it_is_used_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "m", "r")
    done = CliRunner().invoke(app, ["node", "init", str(path)])
    assert done.exit_code == 0, done.output
    first = {n: (tmp_path / n).read_bytes() for n in ("node.key", "member.key", "member.pub")}
    for name in ("node.key", "member.key"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    again = CliRunner().invoke(app, ["node", "init", str(path)])
    assert "was there" in again.output
    assert first == {n: (tmp_path / n).read_bytes() for n in first}
    identity = private_key(tmp_path / "member.key")
    assert signing.public_half(identity) == public_key(first["member.pub"].decode())
    assert Policy.load(path).secure.key == str(tmp_path / "member.key")
    with pytest.raises(PrivacyError, match="no key to sign with"):
        private_key(tmp_path / "node.key")  # of another kind


def test_the_list_is_kept_by_three_commands(tmp_path: Path) -> None:
    path = written(tmp_path, "m", "r", secure={"members": "members.toml"})

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["node", "members", *words])
        return done.output if done.exit_code == 0 else str(done.exception)

    for i in (0, 1):
        (tmp_path / str(i)).mkdir()
        keys.own_keys(tmp_path / str(i))
        assert f"client {i} is a member" in said(
            "add", str(path), str(i), str(tmp_path / str(i) / "member.pub")
        )
    one = (tmp_path / "1" / "member.pub").read_text().strip()
    assert f"1  {one}" in said("list", str(path))
    assert "client 0's key" not in said("list", str(path))
    assert "this is client 1's key" in said("add", str(path), "5", str(tmp_path / "1/member.pub"))
    assert "has another key" in said("add", str(path), "0", str(tmp_path / "1" / "member.pub"))
    assert "is no ssh-ed25519 key" in said("add", str(path), "7", str(tmp_path / "0" / "node.pub"))
    assert "is no member any more" in said("revoke", str(path), "1")
    assert "client 1 is no member" in said("revoke", str(path), "1")
    assert f"revoked  {one}" in said("list", str(path))
    assert "this key is revoked" in said("add", str(path), "1", str(tmp_path / "1" / "member.pub"))
    bare = written(tmp_path / "bare", "m", "r")
    assert "secure.members: is not set" in said("list", str(bare))


KEY = key_text(signing.public_half(bytes(32)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'[members]\n0 = "{KEY}"\n1 = "{KEY}"', "two clients have one key"),
        ('[members]\n0 = "ssh-ed25519 rubbish"', "is no ssh-ed25519 key"),
        (f'[members]\nzero = "{KEY}"', "'zero' is no client's number"),
        (f'[member]\n0 = "{KEY}"', "member: no such key"),
        ("members = 5", "members: "),
    ],
)
def test_what_is_no_list_is_an_error(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "members.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Members.load(path)
    assert says in str(caught.value)
    assert f"Fix {path}" in str(caught.value)


def test_a_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = [signing.public_half(signing.new_identity()) for _ in range(3)]
    found = Members({3: made[0], 12: made[1]}, frozenset([made[2]]))
    found.save(tmp_path / "members.toml")
    assert Members.load(tmp_path / "members.toml") == found
    assert replace(found, revoked=frozenset()) != found


@pytest.mark.parametrize(
    ("text", "said", "others"),
    [
        (keys_text, ("run", "start", 3, 1, b"m", b"b", b"d"),
         ("nur", "again", 4, 2, b"n", b"c", b"e")),
        (survivors_text, ("run", "start", 3, b"d", (1, 2)), ("nur", "again", 4, b"e", (1, 3))),
    ],
)  # fmt: skip
def test_a_signature_counts_for_all_that_it_names_and_nothing_else(
    text: Callable[..., bytes], said: tuple[Any, ...], others: tuple[Any, ...]
) -> None:
    """Of another run, start, round, client, key, agreement or set of survivors it is none."""
    identity = signing.new_identity()
    mine = signing.public_half(identity)
    signature = signing.sign(identity, text(*said))
    assert signing.signed_by(mine, signature, text(*said))
    for n, other in enumerate(others):
        changed = (*said[:n], other, *said[n + 1 :])
        assert not signing.signed_by(mine, signature, text(*changed)), f"value {n}"
