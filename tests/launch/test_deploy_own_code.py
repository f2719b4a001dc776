"""Code of a user's own in a deployment: the same file at the server and at each node. Slow."""

import shutil
from pathlib import Path

import pytest

from fedlora.launch.deploy import host
from tests.support.deployment import bring_up, prepared, ran, rounds

pytestmark = pytest.mark.slow

LOSS = """
from torch.nn.functional import cross_entropy


def loss(logits, labels):
    return cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
"""


def test_a_loss_of_ones_own_runs_where_the_nodes_config_names_it(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a warm worker, and in a process of one message."""
    from tests.conftest import tiny_settings

    (tmp_path / "mine.py").write_text(LOSS)
    monkeypatch.chdir(tmp_path)
    more = {"run.rounds": 1, "train.loss": "py:mine:loss", "round.wait-for-clients": 200.0}
    plan = prepared(tmp_path / "dep", tiny_settings(tiny, tmp_path, "float32", "bert", **more), 2)
    for directory in (plan.app, plan.node(0), plan.node(1)):
        shutil.copy(tmp_path / "mine.py", directory)
    cold = plan.node(1) / "node.sh"
    cold.write_text(cold.read_text().replace(' worker-socket=\\"worker.sock\\"', ""))
    bring_up(plan)
    try:
        status, results = ran(plan)
        assert status == "finished:completed"
        assert rounds(results)[-1]["accepted"] == [0, 1]
    finally:
        host.down(plan, print)
