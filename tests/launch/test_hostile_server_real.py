"""A server that sets keys and fields to hostile values, against the real processes of two nodes.

Every process of a node notes what it opens and executes (support/audited). The same for every key
and field, within one process, is tests/federation/test_policy_hostile.py. Minutes, so marked slow.
"""

import json
import sys
from pathlib import Path

import pytest

from fedlora.config.policy import Policy
from fedlora.federation.client import audit
from fedlora.federation.wire.codes import Code
from fedlora.launch.deploy import host
from tests.support.deployment import bring_up, prepared, ran, rounds, supported, watched
from tests.support.tiny_federation import ROOT

pytestmark = pytest.mark.slow

SUPPORT = ROOT / "tests" / "support"


def lies(secret: Path, elsewhere: Path) -> list[dict]:
    """Of each kind one that once owned a node."""
    climbing = "../" * 12 + str(elsewhere).lstrip("/")
    return [
        {"changes": {"data.path": str(secret)}},
        {"changes": {"data.node-path": str(secret)}},
        {"changes": {"model.path": str(secret.parent)}},
        {"changes": {"model.path": "pkg:evil_package/x"}},
        {"changes": {"train.loss": "py:evil_module:run"}},
        {"changes": {"model.trust-remote-code": True}},
        {"changes": {"privacy.ledger": str(elsewhere)}},
        {"changes": {"output.client-memory": str(elsewhere)}},
        {"changes": {"run.out": str(elsewhere), "run.name": "mine"}},
        {"changes": {"run.name": climbing}},
        {"changes": {"lora.calibration": str(secret)}},
        {"changes": {"train.steps": 10**9}},
        {"fields": {"job": {"token": climbing}}},
        {"fields": {"job": {"client": 2**62}}},
        {"fields": {"job": {"changes": "[" * 3000}}},
        {"fields": {"download": {"trainable": [climbing]}}},
    ]


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """On the path of every process of a node: what a name in a message must not import."""
    place = tmp_path / "evil"
    (place / "evil_package").mkdir(parents=True)
    ran = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for name in ("evil_module.py", "evil_package/__init__.py"):
        (place / name).write_text(f"{ran}def run(*_): ...\n")
    return place


NODES_OWN = {"data.path", "data.node-path", "privacy.ledger", "output.client-memory", "run.out"}
"""What a node under a policy takes from itself, whatever the server says."""


def test_hostile_settings_touch_nothing_in_a_nodes_own_processes(
    tiny, tmp_path: Path, evil: Path
) -> None:
    from tests.conftest import tiny_settings

    root = tmp_path / "dep"
    secret, elsewhere = tmp_path / "secret" / "rows.jsonl", tmp_path / "elsewhere"
    secret.parent.mkdir()
    secret.write_text('{"text": "red cat", "label": "animal"}\n' * 50)
    more = {"run.rounds": 1, "round.deadline": 1800.0}
    plan = prepared(root, tiny_settings(tiny, tmp_path, "float32", "bert", **more), 2)
    watched(plan, evil)
    supported(plan)
    (plan.app / "server_app" / "app.py").write_text(
        "from hostile_settings import app\n\n__all__ = ['app']\n"
    )
    orders = lies(secret, elsewhere)
    (plan.server / "orders.json").write_text(json.dumps(orders))
    bring_up(plan)
    try:
        status, results = ran(plan)
    finally:
        host.down(plan, print)
    answers = json.loads((plan.server / "answers.json").read_text())
    for n, code, reason in answers:
        print(orders[n], code, reason[:200])
    assert sorted(n for n, *_ in answers) == [*range(len(orders))]
    assert status == "finished:completed", "an honest round afterwards"
    assert rounds(results)[-1]["accepted"] == [0, 1]
    for n, code, reason in answers:
        taken = NODES_OWN & orders[n].get("changes", {}).keys()
        assert code or taken, f"{orders[n]} was answered"
        assert str(secret) not in reason
    assert not elsewhere.exists()
    assert not (tmp_path / "ran").exists()
    inside = (str(root), str(Path(tiny["bert"])), str(Path(tiny["rows"])))
    installed = (sys.base_prefix, sys.prefix, str(ROOT / "fedlora"), str(SUPPORT / "audited"), "<")
    refused = 0
    for i in range(2):
        seen = [p.read_text().splitlines() for p in (plan.node(i) / "audit").iterdir()]
        for event, _, what in (line.partition(" ") for lines in seen for line in lines):
            if what.startswith((str(tmp_path), str(Path(tiny["bert"]).parent))):
                listed = what == str(evil) or what == str(tmp_path)
                assert listed or what.startswith(inside), f"{event} {what}"
            if event == "exec" and what:  # what a library compiles has no file
                assert what.startswith(installed), f"{event} {what}"
        book = [*audit.read(Policy.load(plan.node(i) / "node.toml").audit)]
        refused += sum(x["what"] == "refused" for x in book)
    assert refused >= sum(code == Code.NOT_ALLOWED for _, code, _ in answers) > 3
