"""A node that lists an authority believes its certificates, and no server on whose a key is."""

import random
import shutil
import subprocess
import time
from binascii import a2b_base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.config import member_certificates
from fedlora.config.member_certificates import certify, check_certificate
from fedlora.config.members import Members, private_key, public_key
from fedlora.errors import PrivacyError
from fedlora.federation.secure import signing
from fedlora.federation.secure.signing import RoundKeys, keys_text
from fedlora.launch.deploy import keys
from tests.conftest import tiny_settings
from tests.federation import test_secure_stories as stories
from tests.federation.test_secure_aggregation import five
from tests.federation.test_secure_members import forged, node, public, shown
from tests.support.lying_server import LyingServer, Recorded, Refused
from tests.support.under_policy import named, written

CLIENTS = range(6)
SIX = {"clients.count": 6, "secure.colluding": 1}
OURS, THEIRS = signing.new_identity(), signing.new_identity()
"""Private keys of the members' authority, and of one that the server made."""
AUTHORITY = signing.public_half(OURS)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, str]) -> Recorded:
    """An honest round of six nodes that list an authority and no member."""
    root = tmp_path_factory.mktemp("certificates")
    kinds = ["query", "train", "evaluate", "secagg"]
    for i in CLIENTS:
        secure = {"require": True, "members": "members.toml"}
        written(node(i, root), tiny["bert"], tiny["rows"], secure=secure, limits={"kinds": kinds})
        keys.own_keys(node(i, root))
        Members({}, authority=AUTHORITY).save(node(i, root) / "members.toml")
        (node(i, root) / "member.cert").write_bytes(certify(OURS, i, public(i, root), 1.0))
    given = tiny_settings(tiny, root, "float32", **five("fedavg", **SIX))
    nodes: Mapping[int, Any] = {i: named(node(i, root) / "node.toml") for i in CLIENTS}
    return Recorded.of(given, nodes=nodes)


@pytest.fixture
def server(told: Recorded) -> LyingServer:
    found = LyingServer(told)
    found.setup()
    return found


def refusal(server: LyingServer, asked: int = 0) -> str:
    with pytest.raises(Refused) as caught:
        server.answers("share", asked, **shown(server))
    return str(caught.value)


def sybil(server: LyingServer, i: int, certificate: bytes, identity: bytes) -> RoundKeys:
    """Keys of the server's in a client's place, well signed, with this certificate."""
    return forged(server, i, identity)._replace(certificate=certificate)


def test_the_round_is_summed_and_no_node_lists_a_member(told: Recorded) -> None:
    (line,) = (told.root / "run").rglob("rounds.jsonl")
    assert '"signed": 6' in line.read_text()
    assert Members.load(node(0, told.root) / "members.toml").listed == {}


def test_a_sybil_that_another_authority_certified_is_refused(server: LyingServer) -> None:
    mine = signing.new_identity()
    certificate = certify(THEIRS, 1, signing.public_half(mine), 1.0)
    server.keys[1] = sybil(server, 1, certificate, mine)
    assert "client 1's certificate is of another authority than this node's list" in refusal(server)


def test_a_sybil_without_a_certificate_or_with_another_members_is_refused(
    server: LyingServer,
) -> None:
    mine, honest = signing.new_identity(), server.keys[1].certificate
    for asked, certificate, says in (
        (0, b"", "client 1 shows no certificate"),
        (2, b"ssh-ed25519 rubbish", "client 1's certificate is none"),
        (3, b"\xff" * 4000, "client 1's certificate is none"),
        (4, honest, "client 1's certificate is of another key than it shows"),
    ):
        server.keys[1] = sybil(server, 1, certificate, mine)
        assert says in refusal(server, asked)


def test_a_certificate_for_another_number_gives_a_member_no_second_place(
    told: Recorded, server: LyingServer
) -> None:
    """Client 5 helps the server and plays client 1 as well, under its own good certificate."""
    identity = private_key(node(5, told.root) / "member.key")
    server.keys[1] = sybil(server, 1, server.keys[5].certificate, identity)
    assert "two public keys are the same" in refusal(server)
    helper = server.keys.pop(5)
    server.ids.remove(5)
    assert "client 1's certificate is of another client, or of another use" in refusal(server, 2)
    assert helper.certificate


def test_an_expired_certificate_that_is_replayed_is_refused(
    told: Recorded, server: LyingServer
) -> None:
    """Of a member that was let go: its key is good, and so was its certificate."""
    identity = private_key(node(5, told.root) / "member.key")
    old = certify(OURS, 5, public(5, told.root), -1 / 86400)
    server.keys[5] = sybil(server, 5, old, identity)
    assert "client 5's certificate has expired, or is not valid yet: until 20" in refusal(server)


def test_a_certificate_that_ends_within_the_round_opens_no_sum(
    told: Recorded, server: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.collect(server.share(server.ids))
    signed = server.agree(server.ids, server.ids)

    later = time.time() + 2 * 86400

    class Later:
        time = staticmethod(lambda: later)

    certificate = node(0, told.root) / "member.cert"
    kept = certificate.read_bytes()
    monkeypatch.setattr(member_certificates, "time", Later)
    certificate.write_bytes(certify(OURS, 0, public(0, told.root), 9.0))  # its own holds
    try:
        with pytest.raises(Refused, match="client 1's certificate has expired"):
            server.unmask([0], signed)
    finally:
        certificate.write_bytes(kept)


def test_a_revoked_key_is_refused_whoever_certified_it(told: Recorded, server: LyingServer) -> None:
    path = node(0, told.root) / "members.toml"
    kept = path.read_bytes()
    Members.load(path).revoking_key(public(3, told.root)).save(path)
    try:
        assert "client 3's key is revoked" in refusal(server)
    finally:
        path.write_bytes(kept)


def test_a_key_that_is_listed_goes_before_a_certificate(
    told: Recorded, server: LyingServer
) -> None:
    another = signing.public_half(signing.new_identity())
    for asked, listed, says in (
        (0, {3: another}, "client 3 shows another key than this node's list"),
        (2, {9: public(3, told.root)}, "client 3 shows a key that is another client's"),
    ):
        path = node(asked, told.root) / "members.toml"
        kept = path.read_bytes()
        Members(listed, authority=AUTHORITY).save(path)
        try:
            assert says in refusal(server, asked)
        finally:
            path.write_bytes(kept)


def test_a_node_whose_own_certificate_is_gone_or_over_takes_part_in_no_sum(
    told: Recorded,
) -> None:
    path = node(0, told.root) / "member.cert"
    kept = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(Refused, match="client 0 shows no certificate"):
            LyingServer(told).setup()
        path.write_bytes(certify(OURS, 0, public(0, told.root), -1.0))
        with pytest.raises(Refused, match="client 0's certificate has expired"):
            LyingServer(told).setup()
    finally:
        path.write_bytes(kept)


def test_whoever_has_the_authoritys_key_is_believed(server: LyingServer) -> None:
    """The test has teeth: what is refused above is refused for what the certificate says."""
    mine = signing.new_identity()
    server.keys[1] = sybil(server, 1, certify(OURS, 1, signing.public_half(mine), 1.0), mine)
    assert server.answers("share", 0, **shown(server))["boxes"]


@stories.HELPERS
def test_two_stories_end_with_certificates_as_they_do_with_lists(
    told: Recorded, helpers: tuple[int, ...]
) -> None:
    """Of who is in the sum, and of who sent keys: broken by c + 1 that help, and by no fewer."""
    stories.test_two_stories_of_who_is_in_the_sum_read_one_client_with_more_than_c_that_help_only(
        told, helpers
    )
    stories.test_two_stories_of_who_sent_keys_or_shares_make_one_sum_at_most_up_to_c(
        told, "U1", helpers
    )


# -- certificates and commands --------------------------------------------------------------------


def test_no_flipped_bit_of_a_certificate_is_believed() -> None:
    mine = signing.public_half(signing.new_identity())
    made = certify(OURS, 3, mine, 1.0)
    check_certificate(made, 3, mine, AUTHORITY)
    chance = random.Random(0)
    body = made.split(b" ")[1]
    for _ in range(400):
        at, letter = chance.randrange(len(body) - 4), chance.choice(b"ABCDwxyz0189+/")
        other = body[:at] + bytes([letter]) + body[at + 1 :]
        if a2b_base64(other) != a2b_base64(body):
            with pytest.raises(PrivacyError, match="client 3's certificate"):
                check_certificate(made.replace(body, other), 3, mine, AUTHORITY)
    for cut in range(len(made)):
        with pytest.raises(PrivacyError):
            check_certificate(made[:cut], 3, mine, AUTHORITY)


def test_what_a_signature_binds_is_the_round_and_a_certificate_the_number() -> None:
    """A certificate is of no use as a signature of a round's keys, and the other way round."""
    mine = signing.public_half(OURS)
    made = certify(OURS, 3, mine, 1.0)
    text = keys_text("run", "start", 1, 3, b"m", b"b", b"d")
    assert not signing.signed_by(mine, made.split(b" ")[1][:64], text)


def test_ssh_keygen_reads_a_certificate_as_ours(tmp_path: Path) -> None:
    if not shutil.which("ssh-keygen"):
        pytest.skip("needs ssh-keygen")
    mine = signing.public_half(signing.new_identity())
    (tmp_path / "member-cert.pub").write_bytes(certify(OURS, 3, mine, 30.0) + b"\n")
    said = subprocess.run(
        ["ssh-keygen", "-L", "-f", str(tmp_path / "member-cert.pub")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "fedlora-client-3" in said
    assert "host certificate" in said


def test_an_authority_is_made_and_signs_apart_from_nodes_and_server(tmp_path: Path) -> None:
    path = written(tmp_path / "node", "m", "r", secure={"members": "members.toml"})
    keys.own_keys(path.parent)
    own, offline = path.parent / "member.pub", tmp_path / "offline"

    def said(*words: object) -> str:
        done = CliRunner().invoke(app, ["node", "members", *map(str, words)])
        return done.output if done.exit_code == 0 else str(done.exception)

    assert "authority.pub is for every node" in said("authority", offline)
    assert (offline / "authority.key").stat().st_mode & 0o777 == 0o600
    assert "is there: what it signed would be lost" in said("authority", offline)
    assert "names no authority" in said("add", path, 4, signed(said, offline, own))
    assert "certificates of this authority are believed" in said(
        "trust", path, offline / "authority.pub"
    )
    assert "names another authority" in said("trust", path, own)
    assert "authority  ssh-ed25519" in said("list", path)
    found = Members.load(path.parent / "members.toml")
    cert = own.with_suffix(".cert").read_bytes().strip()
    key = public_key(own.read_text())
    found.check(4, key, cert)
    with pytest.raises(PrivacyError, match="of another client"):
        found.check(5, key, cert)
    assert "certificate is of another client" in said("add", path, 5, own.with_suffix(".cert"))
    assert "client 4 is a member" in said("add", path, 4, own.with_suffix(".cert"))
    assert Members.load(path.parent / "members.toml").listed == {4: key}
    assert "is revoked" in said("revoke", path, own.with_suffix(".cert"))
    with pytest.raises(PrivacyError, match="client 4's key is revoked"):
        Members.load(path.parent / "members.toml").check(4, key, cert)
    assert "no ssh-ed25519 key" in said("revoke", path, path)


def signed(said: Any, offline: Path, public: Path) -> Path:
    assert "client 4 signs with this key" in said("sign", offline / "authority.key", 4, public)
    return public.with_suffix(".cert")
