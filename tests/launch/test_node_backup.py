"""A node's keys and ledger come back from its backup, and a backup that is too old is found."""

import re
import shutil
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.config.policy import Policy
from fedlora.errors import PrivacyError
from fedlora.federation.client.secure_book import SecureBook
from fedlora.launch.deploy import keys
from fedlora.privacy.ledger import Ledger
from tests.conftest import tiny_settings
from tests.support.tiny_federation import ROOT, quick
from tests.support.under_policy import Recorded, asked, recorded, written

DOCS = (ROOT / "docs" / "deploy" / "node-policy.md").read_text()
COMMANDS = dict(re.findall(r"^ {4,8}fedlora (node (backup|restore) .+?)(?: +#.*)?$", DOCS, re.M))
DELTA = 1e-3


def typed(where: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command of the documentation says, typed there."""
    (line,) = [line for line, name in COMMANDS.items() if name == verb]
    return run(where, line.split(), monkeypatch)


def run(where: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(where)
    done = CliRunner().invoke(app, words)
    return done.output if done.exit_code == 0 else str(done.exception)


@pytest.fixture(scope="module")
def told(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    root = tmp_path_factory.mktemp("backup")
    given = tiny_settings(tiny, root, "float32", "bert", **quick("fedavg", **{
        "privacy.noise-multiplier": 1.0, "privacy.delta": DELTA, "run.rounds": 1,
        "train.optimizer": "sgd", "lora.layers": "-1"}))  # fmt: skip
    nodes = {i: written(root / f"{i}", tiny["bert"], tiny["rows"]) for i in range(3)}
    return recorded(given, nodes)


@pytest.fixture
def node(tiny: dict[str, str], tmp_path: Path) -> Path:
    path = written(tmp_path / "node", tiny["bert"], tiny["rows"])
    keys.own_keys(path.parent)
    return path


def round_of(told: Recorded, node: Path, known: dict[str, int] | None = None) -> dict[str, int]:
    """One round of one run; what the server knows of the ledger from then on."""
    reply = asked(told, node, records={"job": {"token": "a-run", **(known or {})}})
    if reply.has_error():
        raise AssertionError(reply.error.reason)
    said = dict(reply.content["metrics"])
    return {"ledger": int(said["privacy.ledger"]), "charges": int(said["privacy.charges"])}


def lose(node: Path) -> None:
    """The disk is gone, but for the backup, which lay elsewhere."""
    kept = node.parent / "backup.tar"
    kept.rename(node.parent.parent / "backup.tar")
    shutil.rmtree(node.parent)
    node.parent.mkdir()
    (node.parent.parent / "backup.tar").rename(kept)


def test_a_node_on_a_new_disk_goes_on_from_its_backup_by_the_documented_commands(
    told: Recorded, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = round_of(told, node)
    assert "a ledger of 1 charges" in typed(node.parent, "backup", monkeypatch)
    assert (node.parent / "backup.tar").stat().st_mode & 0o777 == 0o600
    before = {p.name: p.read_bytes() for p in node.parent.glob("*.*") if p.suffix != ".tar"}
    ledger = Ledger(Policy.load(node).ledger)
    spent, key = ledger.epsilon(DELTA), (ledger.directory / "key").read_bytes()
    lose(node)
    assert "a ledger of 1 charges, as the backup has it" in typed(
        node.parent, "restore", monkeypatch
    )
    for name in ("node.toml", "node.key", "node.pub", "member.key", "member.pub"):
        assert (node.parent / name).read_bytes() == before[name]
    for secret in (node.parent / "node.key", node.parent / "member.key", ledger.directory / "key"):
        assert secret.stat().st_mode & 0o777 == 0o600
    assert ledger.epsilon(DELTA) == spent
    assert (ledger.directory / "key").read_bytes() == key
    book = SecureBook(Policy.load(node).ledger).read()
    assert book is not None
    assert book.recovered > 0, "no secure round of a start of the server from before"
    assert round_of(told, node, known)["charges"] == 2


def test_a_backup_older_than_what_was_spent_is_found_by_the_servers_count(
    told: Recorded, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = round_of(told, node)
    typed(node.parent, "backup", monkeypatch)
    known = round_of(told, node, known)
    spent = Ledger(Policy.load(node).ledger).epsilon(DELTA)
    lose(node)
    typed(node.parent, "restore", monkeypatch)
    reply = asked(told, node, records={"job": {"token": "a-run", **known}})
    assert "PrivacyError" in reply.error.reason
    assert round_of(told, node)["charges"] == 2, "a server that knows no count does not find it"
    lose_again = ["node", "recover", "node.toml", "--spent", "3.5"]
    assert "epsilon 3.5 is charged" in run(node.parent, lose_again, monkeypatch)
    assert round_of(told, node, known)["charges"] == 3, "its operator has said what was lost"
    assert Ledger(Policy.load(node).ledger).epsilon(DELTA) > spent + 3.5


def test_nothing_is_restored_over_a_ledger_or_another_key(
    told: Recorded, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(node.parent, "backup", monkeypatch)
    round_of(told, node)
    said = typed(node.parent, "restore", monkeypatch)
    assert "is there, and may be newer than" in said
    assert len(Ledger(Policy.load(node).ledger).read().charges) == 1
    shutil.rmtree(Policy.load(node).ledger / "ledgers")
    (node.parent / "member.key").write_bytes(b"another")
    assert "member.key is there, and is another" in typed(node.parent, "restore", monkeypatch)
    assert not (Policy.load(node).ledger / "ledgers").exists()


def test_a_damaged_ledger_is_no_backup_and_the_one_before_stays(
    told: Recorded, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(node.parent, "backup", monkeypatch)
    kept = (node.parent / "backup.tar").read_bytes()
    ledger = Ledger(Policy.load(node).ledger)
    ledger.path.unlink()
    assert "is gone" in typed(node.parent, "backup", monkeypatch)
    assert (node.parent / "backup.tar").read_bytes() == kept


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def link(name: str) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return made


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"rubbish"),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: tar_of(path, (tarfile.TarInfo("own/../../x"), b"x")),
        lambda path: tar_of(path, (tarfile.TarInfo("/tmp/x"), b"x")),
        lambda path: tar_of(path, (tarfile.TarInfo("ledger/ledgers/../../../x"), b"x")),
        lambda path: tar_of(path, (tarfile.TarInfo("ledger/ledgers/.."), b"x")),
        lambda path: tar_of(path, (tarfile.TarInfo("own/node.sh"), b"x")),
        lambda path: tar_of(path, (link("own/node.key"), b"")),
    ],
)
def test_what_is_no_backup_restores_nothing(
    node: Path, make: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(node.parent, "backup", monkeypatch)
    make(node.parent / "backup.tar")
    lose(node)
    said = typed(node.parent, "restore", monkeypatch)
    assert "no backup of a node" in said or "no backup of a node" in said.replace("as ", "")
    assert [p.name for p in node.parent.iterdir()] == ["backup.tar"]


def test_a_backup_that_was_changed_is_no_ledger(
    told: Recorded, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the file has its key; who changes a byte of it without, is found."""
    round_of(told, node)
    typed(node.parent, "backup", monkeypatch)
    path = node.parent / "backup.tar"
    with tarfile.open(path) as tar:
        found = [(x, tar.extractfile(x).read()) for x in tar]  # type: ignore[union-attr]
    tar_of(path, *((x, d.replace(b'"sigma": 1.0', b'"sigma": 9.0')) for x, d in found))
    lose(node)
    typed(node.parent, "restore", monkeypatch)
    with pytest.raises(PrivacyError):
        Ledger(Policy.load(node).ledger).read()
