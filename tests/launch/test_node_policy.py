"""`fedlora node`, and the node.toml that `fedlora deploy init` writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.config.members import Members
from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.errors import NodeFileError
from fedlora.federation.client import audit
from fedlora.launch.deploy import message_process
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.policy_file import policy_text
from fedlora.launch.node_cli import refusals
from fedlora.strategies import STRATEGIES
from tests.support.tiny_federation import quick
from tests.support.under_policy import written


def policy_of(directory: Path, config: Config, **plan: Any) -> Policy:
    made = Plan(directory, 2, config.clients.ranks, own_data=plan.pop("own_data", True), **plan)
    path = directory / "node.toml"
    path.write_text(policy_text(made, 1, config))
    return Policy.load(path)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_what_init_writes_allows_its_experiment(settings, tmp_path: Path, name: str, own) -> None:
    config = Config.read(settings(**quick(name)))
    assert refusals(policy_of(tmp_path, config, own_data=own), config) == []


@pytest.mark.parametrize(
    "more",
    [
        {"privacy.epsilon": 8.0, "privacy.delta": 1e-4, "privacy.release-metrics": True},
        {"privacy.epsilon": 8.0, "privacy.level": "client", "privacy.delta": 1e-3},
        {"secure.aggregation": True, "secure.colluding": 0, "wire.dtype": "float32"},
        {"lora.rank-pattern": "query=300", "clients.ranks": "300"},
        {"lora.modules-to-save": "pooler"},
        {"model.revision": "abc"},
        {"data.map": "animal=creature", "data.label": "label", "data.limit": 100},
    ],
)
def test_and_what_the_experiment_asks_for(settings, tmp_path: Path, more: dict[str, Any]) -> None:
    config = Config.read(settings(**{**quick("fedavg"), **more}))
    assert refusals(policy_of(tmp_path, config), config) == []


def test_a_private_experiments_nodes_take_no_run_without_privacy(settings, tmp_path: Path) -> None:
    private = {"privacy.epsilon": 8.0, "privacy.delta": 1e-4}
    made = policy_of(tmp_path, Config.read(settings(**{**quick("fedavg"), **private})))
    found = refusals(made, Config.read(settings(**quick("fedavg"))))
    assert found == ["privacy.level: the policy's level is example"]


def test_kinds_that_a_strategy_needs_and_a_policy_lacks_are_said(settings, tmp_path: Path) -> None:
    made = policy_of(tmp_path, Config.read(settings(**quick("fedavg"))))
    fedsa = Config.read(settings(**quick("fedsa")))
    assert refusals(made, fedsa) == ["messages of kind collect: not in limits.kinds"]
    given = {**quick("fedavg"), "secure.aggregation": True, "secure.colluding": 0}
    secure = Config.read(settings(**given))
    assert refusals(made, secure) == ["messages of kind secagg: not in limits.kinds"]


def test_check_says_beforehand_what_would_be_refused(settings, tmp_path: Path, tiny) -> None:
    path = written(tmp_path / "node", tiny["bert"], tiny["rows"])
    run = tmp_path / "run.toml"
    run.write_text(Config.read(settings(**quick("fedavg"))).toml())
    done = CliRunner().invoke(app, ["node", "check", str(path), str(run)])
    assert (done.exit_code, done.output.split()[1:2]) == (0, ["allows"])
    run.write_text(Config.read(settings(**quick("fedavg", **{"train.steps": 99}))).toml())
    done = CliRunner().invoke(app, ["node", "check", str(path), str(run)])
    assert done.exit_code == 1
    assert "refused: train.steps: must be at most limits.steps = 50" in done.output


@pytest.mark.parametrize(
    "more",
    [{"ranks.policy": "adaptive", "clients.ranks": "9"}, {"lora.rank-pattern": "query=17"}],
)
def test_check_asks_for_the_highest_rank_that_the_run_may(
    settings, tmp_path: Path, tiny, more: dict[str, Any]
) -> None:
    """Of any module, in any round: under "adaptive" twice the client's own."""
    policy = Policy.load(written(tmp_path / "node", tiny["bert"], tiny["rows"]))
    found = refusals(policy, Config.read(settings(**{**quick("fedex"), **more})))
    assert found == ["the ranks: limits.rank = 16"]
    less = {key: str(value).replace("9", "8").replace("17", "16") for key, value in more.items()}
    assert not refusals(policy, Config.read(settings(**{**quick("fedex"), **less})))


def test_an_error_of_a_nodes_own_files_names_them_and_no_run(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text("[limits]\nranks = 3\n")
    with pytest.raises(NodeFileError) as said:
        Policy.load(tmp_path / "node.toml")
    assert "problems in this node's own settings:" in str(said.value)
    with pytest.raises(NodeFileError) as said:
        Members({3: b"k" * 32}).adding(4, b"k" * 32)
    for not_so in ("the run config", "--set"):
        assert not_so not in str(said.value)
    assert not str(said.value).endswith("\n")


def test_audit_shows_what_it_can_of_lines_that_are_none(tmp_path: Path) -> None:
    """As a process of the node could have a keeper write them, or damage leaves them."""
    path = written(tmp_path, "m", "rows.jsonl")
    book = Policy.load(path).audit
    for odd in ({"bytes": "many", "records": 5}, {"bytes": 1e400, "reasons": {"a": 1}},
                {"kind": ["\x1b[2J"], "records": [{"x": "\u202e"}]}):  # fmt: skip
        audit.append(book, "left", **odd)
    shown = CliRunner().invoke(app, ["node", "audit", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "3 replies left, 0 bytes" in shown.output
    assert all(line.isprintable() for line in shown.output.splitlines())


def test_audit_shows_the_record_and_its_sums(tmp_path: Path) -> None:
    path = written(tmp_path, "m", "rows")
    book = Policy.load(path).audit
    for round in (1, 2):
        audit.append(book, "asked", kind="train", run="7", round=round, policy="abc")
    audit.append(book, "left", kind="train", run="7", round=1, bytes=100, records=["sent"],
                 epsilon=0.5)  # fmt: skip
    audit.append(book, "refused", kind="train", error="PolicyError", reasons=["a\x1b[2K\nb"])
    shown = CliRunner().invoke(app, ["node", "audit", str(path)]).output
    assert "left  train  run 7  round 1  bytes 100  epsilon 0.5  sent" in shown
    assert "1 replies left, 100 bytes; 1 refused or failed; 1 without an end" in shown
    assert "\x1b" not in shown
    last = CliRunner().invoke(app, ["node", "audit", str(path), "-n", "1", "--json"]).output
    assert json.loads(last)["what"] == "refused"


def test_an_app_that_is_other_code_is_on_record(tmp_path: Path) -> None:
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    path = written(tmp_path, "m", "rows")
    message = Message(RecordDict(), 1, "train")
    message.metadata.__dict__["_message_id"] = "0" * 32
    context = Context(7, 1, {"policy": str(path)}, RecordDict(), {})
    reply = message_process.reply(message, context, b"no archive")
    assert reply.has_error()
    (line,) = audit.read(Policy.load(path).audit)
    assert (line["what"], line["error"], line["run"]) == ("refused", "BundleError", "7")
