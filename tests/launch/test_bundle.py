"""What a node does with the app that a server sends: it compares digests, and runs its own."""

import hashlib
import json
import re
import sys
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import flwr
import pytest

from fedlora.config.policy import Policy
from fedlora.errors import BundleError, DeployError
from fedlora.federation.wire.codes import LONGEST, Code
from fedlora.federation.wire.same_machine import OWN_MACHINE
from fedlora.launch.deploy import bundle, message_process, node
from fedlora.launch.deploy.layout import Wanted, init
from fedlora.launch.deploy.plan import Plan
from fedlora.version import __version__
from tests.launch.test_deploy_worker import a_message
from tests.support.bundles import built, changed, zipped
from tests.support.tiny_federation import ROOT

LINE = b"\nimport os; os.environ['FEDLORA_ATTACKED'] = '1'\n"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return init(Wanted(tmp_path_factory.mktemp("bundle") / "dep", 1, own_data=False))


@pytest.fixture(scope="module")
def honest(plan: Plan) -> bytes:
    """The bundle that `fedlora deploy run` sends."""
    return built(plan.app)


@pytest.fixture(scope="module")
def whole() -> bytes:
    """The bundle of `flwr run .` in a checkout: it carries fedlora's code."""
    return built(ROOT)


def refused(fab: bytes) -> str:
    with pytest.raises(BundleError) as raised:
        bundle.check(fab)
    assert len(str(raised.value)) < LONGEST
    return str(raised.value)


@pytest.mark.slow
def test_the_bundles_that_fedlora_makes_are_taken(honest: bytes, whole: bytes) -> None:
    bundle.check(honest)
    bundle.check(whole)
    assert "fedlora/launch/client_app.py" in zipfile.ZipFile(BytesIO(whole)).namelist()
    bundle.check(changed(honest, **{"client_app/__init__.py": b""}))  # as init wrote it before
    bundle.check(changed(honest, **{bundle.MANIFEST: None}))


def test_the_app_that_a_node_expects_is_the_checkouts() -> None:
    for name in ("client_app/__init__.py", "client_app/app.py"):
        bundle.check(zipped({name: (ROOT / name).read_bytes(), "pyproject.toml": project()}))


def project(clientapp: object = bundle.OURS) -> bytes:
    components = f"[tool.flwr.app.components]\nserverapp = 'x:y'\nclientapp = {clientapp!r}\n"
    return components.encode()


@pytest.mark.parametrize("name", ["fedlora/launch/client_app.py", "fedlora/errors.py"])
def test_one_more_line_names_the_file_and_both_versions_and_digests(
    whole: bytes, name: str
) -> None:
    mine = (ROOT / name).read_bytes()
    said = refused(changed(whole, **{name: mine + LINE}))
    for data in (mine, mine + LINE):
        assert hashlib.sha256(data).hexdigest()[:12] in said
    assert name in said
    assert said.count(f"fedlora {__version__} (digest") == 2
    assert len(set(re.findall(r"digest (\w{12})", said))) == 2
    other = changed(whole, **{"fedlora/version.py": b'__version__ = "0.0.7"\n'})
    assert f"fedlora {__version__} (digest" in refused(other)
    assert "fedlora 0.0.7 (digest" in refused(other)


def test_a_file_more_or_less_is_a_difference(whole: bytes) -> None:
    assert "fedlora/extra.py is absent here" in refused(changed(whole, **{"fedlora/extra.py": b""}))
    assert re.search(r"errors.py is \w+ here and absent there", refused(
        changed(whole, **{"fedlora/errors.py": None})))  # fmt: skip


def test_a_server_of_another_fedlora_is_told_by_its_digests(honest: bytes) -> None:
    tree = json.loads(bundle.manifest())
    tree["files"]["fedlora/errors.py"] = "0" * 64
    said = refused(
        changed(honest, **{bundle.MANIFEST: json.dumps(tree | {"version": "9"}).encode()})
    )
    assert "fedlora 9 (digest" in said
    assert "fedlora/errors.py is " in said
    for text in (b"", b"[]", b'{"version": 1, "files": []}', b"[" * 100_000):
        assert "is no list of digests" in refused(changed(honest, **{bundle.MANIFEST: text}))


def test_a_client_app_of_its_own_is_refused(honest: bytes) -> None:
    mine = (ROOT / "client_app" / "app.py").read_bytes()
    said = refused(changed(honest, **{"client_app/app.py": mine + LINE}))
    assert "client_app/app.py is " in said
    assert hashlib.sha256(mine).hexdigest()[:12] in said
    assert "client_app/more.py" in refused(changed(honest, **{"client_app/more.py": b""}))
    assert "client_app/__init__.py" in refused(changed(honest, **{"client_app/__init__.py": LINE}))


@pytest.mark.parametrize("named", ["evil:app", "client_app.app:other", "server_app.app:app", 3, ""])
def test_another_component_is_refused(honest: bytes, named: object) -> None:
    said = refused(changed(honest, **{"pyproject.toml": project(named)}))
    assert f"names the ClientApp {named!r}, must be 'client_app.app:app'" in said


@pytest.mark.parametrize("text", [b"", b"a = ", b"\xff", b"tool.flwr.app.components = 1"])
def test_a_pyproject_without_the_component_is_refused(honest: bytes, text: bytes) -> None:
    assert "names the ClientApp None" in refused(changed(honest, **{"pyproject.toml": text}))


STRANGE = [
    "evil.so", "fedlora/evil.cpython-311-x86_64-linux-gnu.so", "evil.pth", "evil.pyc", "evil.pyd",
    "client_app/__pycache__/app.cpython-311.pyc", "bin/run", "server_app/x.so", "sitecustomize",
    "../evil.py", "/tmp/evil.py", "fedlora/../../evil.py", "a//b.py", "./x.py", "C:/x.py",
    "a\\..\\b.py", "evil.py.\x1b[31m",
]  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_neither_fedloras_python_nor_a_text_is_refused(honest: bytes, name: str) -> None:
    said = refused(changed(honest, **{name: LINE}))
    assert "a node takes Python files of fedlora and texts alone" in said
    assert said.isprintable()


def test_a_link_a_doubled_name_a_bomb_and_no_archive_are_refused(honest: bytes) -> None:
    out = BytesIO(honest)
    with zipfile.ZipFile(out, "a") as archive:
        link = zipfile.ZipInfo("notes.md")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert "notes.md" in refused(out.getvalue())
    out = BytesIO(honest)
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("pyproject.toml", project("evil:app"))
    assert "'pyproject.toml' more than once" in refused(out.getvalue())
    bomb = changed(honest, **{"fedlora/a.py": bytes(bundle.MOST + 1)})
    assert "unpacks to" in refused(bomb)
    for data in (b"", b"PK\x03\x04", honest[:-30], honest[: len(honest) // 2]):
        assert "no archive that can be read" in refused(data)


def test_the_servers_half_and_texts_are_its_own_affair(honest: bytes) -> None:
    more = {
        "server_app/strategy.py": LINE,
        "notes.md": b"x",
        "data/rows.jsonl": b"x",
        "LICENSE": b"x",
    }
    bundle.check(changed(honest, **more))


def test_code_of_ones_own_is_taken_where_the_node_has_the_same_file(
    honest: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sent = changed(honest, **{"mine.py": LINE})
    assert "mine.py is not in this node's directory" in refused(sent)
    (tmp_path / "mine.py").write_bytes(LINE)
    bundle.check(sent)
    (tmp_path / "mine.py").write_bytes(LINE + b"#")
    assert "or is another file there" in refused(sent)


def test_a_refusal_is_a_typed_reply_and_a_line_of_the_nodes_log(
    honest: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    message, context = a_message()
    del context.node_config[OWN_MACHINE]  # a node of somebody else's
    bad = changed(honest, **{"client_app/app.py": LINE, "\x1b[31m.md": b""})
    answer = message_process.reply(message, context, bad)
    assert answer.error.code == Code.OTHER_CODE
    assert "client_app/app.py is " in answer.error.reason
    (line,) = capfd.readouterr().err.splitlines()
    assert f"refused the app of run {context.run_id}: this node runs its own fedlora" in line
    assert message_process.reply(message, context, honest).content["facts"]


def test_a_node_of_an_unknown_flower_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    node.check_flower()
    monkeypatch.setattr(flwr, "__version__", "1.43.0")
    with pytest.raises(DeployError, match=r"flwr 1.43.0 is installed; .* knows 1.41 and 1.42"):
        node.check_flower()
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "fedlora.launch.deploy.flower_runtime", raising=False)
    monkeypatch.setitem(sys.modules, "flwr.supercore.runtime", None)
    with pytest.raises(DeployError, match=r"another interface .*flwr.supercore.runtime"):
        node.check_flower()


def test_a_nodes_policy_names_the_code_that_it_may_run(settings, tmp_path: Path) -> None:
    own = {"train.loss": "py:tests.support.own_code:smoothed", "evaluate.metrics": ""}
    given = {k: v for k, v in settings(**own).items() if k != "clients.count"}
    plan = init(Wanted(tmp_path / "dep", 1, overrides=given))
    policy = Policy.load(plan.node(0) / "node.toml")
    assert policy.trust.code == ("py:tests.support.own_code:smoothed",)
    bundle.check(built(plan.app))
    assert Plan.load(plan.directory).code == ("py:tests.support.own_code:smoothed",)
    tree = tomllib.loads((plan.app / "pyproject.toml").read_text())
    assert tree["tool"]["flwr"]["app"]["components"]["clientapp"] == bundle.OURS
