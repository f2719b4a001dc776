"""Clients that lie, in the real processes of their nodes, over TLS. Minutes, so marked slow."""

import json
from pathlib import Path

import pytest

from fedlora.launch.deploy import host
from tests.support.deployment import BEHIND, bring_up, prepared, ran, rounds
from tests.support.tiny_federation import ROOT, read_tensors

pytestmark = pytest.mark.slow

HOSTILE = ROOT / "tests" / "support" / "hostile_node"
HONEST = [0, 1, 2]
LIES = {
    3: ["honest", "count-2-62", "finite-1e18", "five-megabytes-of-words", "forty-megabytes-more"],
    4: ["honest", "float64-1e300", "not-a-number", "metric-names", "pickled"],
    5: ["honest", "climbing-names", "replayed", "anothers-name", "certificate-of-noise"],
}
"""Of those that support/hostile_node knows; one a round each."""


def test_no_lie_of_a_real_client_counts_or_costs_another_its_place(tiny, tmp_path: Path) -> None:
    from tests.conftest import tiny_settings

    more = {"run.rounds": 5, "round.quarantine-after": 100, "round.deadline": 900.0}
    more["clients.ranks"] = "3"
    plan = prepared(tmp_path / "dep", tiny_settings(tiny, tmp_path, "float32", "bert", **more), 6)
    for i, lies in LIES.items():
        with (plan.node(i) / "env.sh").open("a") as f:
            f.write(f'export HOSTILE="{",".join(lies)}" PYTHONPATH="{HOSTILE}{BEHIND}"\n')
    bring_up(plan)
    try:
        status, results = ran(plan)
    finally:
        host.down(plan, print)
    assert status == "finished:completed"
    for line in rounds(results)[1:]:
        told = {i: lies[line["round"] - 1] for i, lies in LIES.items()}
        print(line["round"], line["accepted"], line["failures"])
        assert [i for i in line["accepted"] if i < 3] == HONEST
        assert {told[i] for i in line["accepted"] if i > 2} <= {"honest"}, line["failures"]
        assert {f["client"] for f in line["failures"]} <= {3, 4, 5}
    weights, _ = read_tensors(results / "adapter" / "adapter_model.safetensors")
    assert all(float(x.abs().max()) < 100 for x in weights.values())
    for path in (results / "rounds.jsonl", results / "clients.jsonl", results / "report.html"):
        if path.exists():
            text = path.read_text()
            assert "\x1b" not in text
            assert len(text) < 2_000_000
    for line in (results / "rounds.jsonl").read_text().splitlines():
        json.loads(line)
    log = (plan.run_directory / "superexec.log").read_text(errors="replace")
    assert "\x1b[2J" not in log
    assert "\nround 3, accuracy 0.9999" not in log
    assert not list(plan.directory.rglob("pickled-ran"))
    assert not list(tmp_path.rglob("*climbed*"))
