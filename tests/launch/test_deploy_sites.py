"""Nodes whose files differ in columns, separator and encoding, as real processes over loopback."""

import tomllib
from pathlib import Path

import pytest
import tomli_w

from fedlora.launch.deploy import host
from tests.conftest import tiny_settings
from tests.support.deployment import adapter, bring_up, experiment, prepared, ran, rounds
from tests.support.tiny_federation import federate, quick
from tests.training.test_sites import NOTES, hospital

pytestmark = pytest.mark.slow


def test_two_nodes_with_files_of_their_own_end_in_the_simulation_s_bytes(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    sites = hospital(tmp_path / "a b")[:2]
    sites[0] |= {"separator": ";", "rank": 3}
    test = tmp_path / "central.csv"
    test.write_text("text,label\n" + "".join(f"t{i},{x}\n" for i, x in enumerate([*NOTES] * 3)))
    changes = {"data.path": "", "data.text": "text", "data.label": "label", "clients.count": 2,
               "data.test-path": str(test)}  # fmt: skip
    given = tiny_settings(tiny, tmp_path, "float32", "bert", **quick("fedex", **changes))
    plan = prepared(tmp_path / "dep", given, 2)
    for i, site in enumerate(sites):
        path = plan.node(i) / "node.toml"
        policy = tomllib.loads(path.read_text())
        policy["model"]["rank"] = site.get("rank", policy["model"]["rank"])
        policy["data"] = {key: value for key, value in site.items() if key != "rank"}
        path.write_text(tomli_w.dumps(policy))
    bring_up(plan)
    try:
        status, results = ran(plan)
        assert status == "finished:completed"
    finally:
        host.down(plan, print)
    own_config = experiment(plan)
    near = federate(
        {**own_config, "data.clients": sites, "run.out": str(tmp_path), "run.name": "near"}
    )
    assert adapter(results) == near.adapter
    assert [r["train_loss"] for r in rounds(results)] == [r["train_loss"] for r in near.rounds]
    logs = [p.read_text(errors="replace") for p in plan.directory.rglob("*.log")]
    assert any("north.csv: 24 rows read (separator semicolon; encoding latin-1)" in x for x in logs)
