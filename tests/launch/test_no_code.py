"""A server that sends code to its nodes, over TLS on loopback: nothing of it runs there.

Whoever operates a server can add a line to the app, or have its SuperLink hand out any bytes. Every
process of a node notes what it executes and opens (support/audited). Minutes, so marked slow.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.config.policy import Policy
from fedlora.federation.client import audit
from fedlora.federation.wire.codes import Code
from fedlora.launch.deploy import host, node
from fedlora.launch.deploy.operator import Operator
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.supervise import read_state
from fedlora.version import __version__
from tests.support.bundles import built, changed
from tests.support.deployment import bring_up, prepared, ran, rounds, supported, watched
from tests.support.tiny_federation import ROOT

pytestmark = pytest.mark.slow

SUPPORT = ROOT / "tests" / "support"
AGENT = "flwr-agentapp"


@pytest.fixture(scope="module")
def deployed(tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    """Two nodes that are watched: one with a warm worker, one without."""
    from tests.conftest import tiny_settings

    root = tmp_path_factory.mktemp("nocode")
    more = {"run.rounds": 1, "round.wait-for-clients": 15.0}
    plan = prepared(root / "dep", tiny_settings(tiny, root, "float32", "bert", **more), 2)
    watched(plan)
    supported(plan)
    cold = plan.node(1) / "node.sh"
    cold.write_text(cold.read_text().replace(' worker-socket=\\"worker.sock\\"', ""))
    bring_up(plan)
    yield plan
    host.down(plan, print)


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marked") / "marker"


def planted(marker: Path) -> str:
    """A line that would show itself wherever it runs, but at the server."""
    write = f"open({str(marker)!r}, 'a').write(sys.argv[0])"
    return f"\nimport sys; 'serverapp' in sys.argv[0] or {write}\n"


def attacks(marker: Path, plan: Plan) -> dict[str, bytes]:
    """Bundles that are honest but for one thing."""
    honest, whole, line = built(plan.app), built(ROOT), planted(marker)
    app = (ROOT / "client_app" / "app.py").read_text() + line
    project = (plan.app / "pyproject.toml").read_text()
    other = project.replace('"client_app.app:app"', '"evil:app"')
    deep = "../" * 12 + str(marker.with_name("climbed.py")).lstrip("/")
    own = (ROOT / "fedlora" / "__init__.py").read_text() + line
    return {
        "a line in client_app.py": changed(honest, **{"client_app/app.py": app.encode()}),
        "a line in fedlora": changed(whole, **{"fedlora/__init__.py": own.encode()}),
        "another component": changed(
            honest, **{"pyproject.toml": other.encode(), "evil.py": line.encode()}
        ),
        "more modules": changed(
            honest, **{"torch.py": line.encode(), "usercustomize.py": line.encode()}
        ),
        "native code and a .pth": changed(
            honest, **{"evil.pth": f"import os;{line.strip()}".encode(), "_ssl.so": b"\x7fELF"}
        ),
        "a path that climbs": changed(honest, **{deep: line.encode()}),
        "an agent": changed(
            honest,
            **{
                "pyproject.toml": project.replace(
                    "clientapp = ", 'agentapp = "evil:app"\nclientapp = '
                ).encode(),
                "evil.py": line.encode(),
            },
        ),
        "no archive": b"PK\x03\x04" + bytes(99),
    }


def test_the_line_that_an_operator_adds_runs_on_no_node_and_the_run_says_why(
    deployed: Plan, marker: Path
) -> None:
    """As by hand: the app's own client_app.py, one line more, `fedlora deploy run`."""
    app = deployed.app / "client_app" / "app.py"
    before = app.read_text()
    app.write_text(before + planted(marker))
    try:
        with Operator(deployed) as operator:
            run_id, results = host.start_run(deployed, operator, {"run.name": "added"})
            status = host.follow(operator, run_id, results, print)
    finally:
        app.write_text(before)
    said = host.said(deployed, run_id, 80)
    print(said)
    assert status == "finished:failed"
    assert not marker.exists()
    assert "this node runs its own fedlora" in " ".join(said.split())
    log = (deployed.run_directory / "node-0.log").read_text()
    assert f"refused the app of run {run_id}: this node runs its own fedlora {__version__}" in log


def test_no_bundle_that_a_server_hands_out_runs_on_a_node(deployed: Plan, marker: Path) -> None:
    app = deployed.app / "server_app" / "app.py"
    before, notes = app.read_text(), deployed.app / "notes.md"
    evil = deployed.directory / "evil.fab"
    for what, bundle in attacks(marker, deployed).items():
        evil.write_bytes(bundle)
        notes.write_text(what)  # so that each run has a bundle of its own
        app.write_text("from hostile_server import app\n\n__all__ = ['app']\n")
        order = {"bundle": str(evil), "agent": AGENT if what == "an agent" else ""}
        (deployed.server / "attack.json").write_text(json.dumps(order))
        try:
            with Operator(deployed) as operator:
                run_id, results = host.start_run(deployed, operator, {"run.name": "evil"})
                host.follow(operator, run_id, results, print, 1.0)
        finally:
            app.write_text(before)
            notes.unlink()
        answer = deployed.server / "replies.json"
        assert answer.exists(), f"{what}: {host.said(deployed, run_id, 40)}"
        replies = json.loads(answer.read_text())
        answer.unlink()
        print(what, replies)
        lost = what == "no archive"  # Flower's own half of the node ends by it
        assert [code == Code.OTHER_CODE for code, _ in replies] == [not lost] * 2, what
        assert all(code for code, _ in replies), what
        assert not list(marker.parent.iterdir()), what
    for i in range(2):
        log = (deployed.run_directory / f"node-{i}.log").read_text()
        assert log.count("refused the app of run") >= len(attacks(marker, deployed)) - 1
        child = read_state(deployed)["children"][f"node-{i}"]
        assert child["last_exit"] == node.LOST, "it is started again, and is there for the next run"


def test_an_honest_run_ends_well_afterwards_and_nodes_ran_installed_code_alone(
    deployed: Plan, marker: Path
) -> None:
    status, results = ran(deployed, {"run.name": "honest", "round.wait-for-clients": 200.0})
    assert status == "finished:completed"
    assert rounds(results)[-1]["accepted"] == [0, 1]
    assert not list(marker.parent.iterdir())
    allowed = (sys.base_prefix, sys.prefix, str(ROOT / "fedlora"), str(SUPPORT / "audited"), "<")
    for i in range(2):
        assert not (deployed.node(i) / "home" / "apps").exists()
        book = [*audit.read(Policy.load(deployed.node(i) / "node.toml").audit)]
        refused = [x for x in book if x.get("error") == "BundleError"]
        assert len(refused) >= len(attacks(marker, deployed)) - 1
        left = [x for x in book if x["what"] == "left" and x["kind"] == "train"]
        assert [x["round"] for x in left] == [1], "in a warm worker, and in a process of its own"
        seen = [p.read_text().splitlines() for p in (deployed.node(i) / "audit").iterdir()]
        ran_as = {lines[0].split(" -m ")[-1].split()[0] for lines in seen if " -m " in lines[0]}
        assert {f"fedlora.launch.deploy.{m}" for m in ("node", "message_process")} <= ran_as
        for lines in seen:
            assert any(line.startswith("open ") for line in lines)
            for event, _, what in (line.partition(" ") for line in lines):
                assert "/home/apps" not in what
                if event in ("exec", "import") and what:  # what a library compiles has no file
                    assert what.startswith(allowed), f"{lines[0]}: {event} {what}"
