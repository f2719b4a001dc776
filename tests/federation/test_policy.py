"""A node's policy: the file, what it admits, its limits while a node works, and its record."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.config.policy import HoursPolicy, LimitsPolicy, Policy, keys
from fedlora.config.reader import Config
from fedlora.errors import BudgetSpent, ConfigError, PolicyError
from fedlora.federation.client import audit, limits, oversight
from fedlora.federation.client.admit import admit, check_message, check_terms
from fedlora.federation.client.node_config import check_node_config
from fedlora.federation.secure.terms import Terms
from fedlora.federation.wire.codes import Code
from fedlora.federation.wire.job import Job
from fedlora.federation.wire.same_machine import OWN_MACHINE
from fedlora.privacy.accounting import Spend
from fedlora.privacy.charges import Charge
from fedlora.privacy.ledger import Ledger
from fedlora.strategies import STRATEGIES
from tests.conftest import tiny_settings
from tests.support.tiny_federation import federate, quick
from tests.support.under_policy import Recorded, asked, named, recorded, written

DOCS = Path(__file__).parents[2] / "docs"
MODEL = "tiny/model"
RUN = {"model.path": MODEL, "data.path": "their.jsonl"}


def job(**fields: Any) -> Job:
    given: dict[str, Any] = {
        "round": 1, "token": "t", "incarnation": "i", "client": 0, "ranks": {"q": 4},
        "memory_round": 0, "base_number": 0, "fingerprint": "", "labels": ("a",), **fields,
    }  # fmt: skip
    return Job(**given)


def policy(tmp_path: Path, **sections: Mapping[str, Any]) -> Policy:
    return Policy.load(written(tmp_path, MODEL, "rows.jsonl", **sections))


# -- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[privacy]\nmax_epsilon = 1.0", 'privacy.max_epsilon: no such key; did you mean "priv'),
        ("[privacy]\nmax-epsilo = 1.0", 'privacy.max-epsilo: no such key; did you mean "privacy.m'),
        ("[limit]\nsteps = 3", "limit: no such key"),
        ("[limits]\nsteps = 0", "limits.steps = 0: must be greater than 0"),
        ("[limits]\nsteps = true", "limits.steps = True: must be a whole number"),
        ("[limits]\nseconds = nan", "limits.seconds = nan: must be a finite number"),
        ('[limits]\nkinds = ["trian"]', "'trian' is none of query, train"),
        ('[privacy]\nlevel = "exmaple"', "privacy.level = 'exmaple': must be 'none'"),
        ('[model.allowed.x]\npth = "y"', "model.allowed.x.pth: no such key"),
        ("[secure]\nrequire = true\nrefuse = true", "secure: require and refuse exclude"),
        ('[hours]\nbegin = "25:00"', "hours.begin = '25:00'"),
        ('[hours]\nbegin = "22:00"', "hours: begin and end: name both"),
        ('[hours]\ndays = ["Mon"]', "hours: 'Mon' is none of mon"),
        ("trust = 5", "trust = 5: must be"),
    ],
)
def test_what_is_no_policy_is_an_error_and_no_missing_limit(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "node.toml"
    path.write_text(f'{text}\n[data]\npath = "x"\n')
    with pytest.raises(ConfigError) as caught:
        Policy.load(path)
    assert says in str(caught.value)
    assert f"Fix {path}" in str(caught.value)


def test_a_policy_says_where_the_rows_are_and_in_one_way(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    for text in ("", "[data]\n", '[data]\npath = "a"\nshared = ["b"]\n'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="data: "):
            Policy.load(path)
    with pytest.raises(ConfigError, match="no such file"):
        Policy.load(tmp_path / "none.toml")


def test_paths_are_relative_to_the_file_whatever_the_working_directory(tmp_path: Path) -> None:
    made = policy(tmp_path, privacy={"ledger": "book"}, model={"allowed": {"m": {"path": "./w"}}})
    assert made.data.path == str(tmp_path / "rows.jsonl")
    assert made.memory == tmp_path / "memory"
    assert made.audit == tmp_path / "audit.jsonl"
    assert made.ledger == tmp_path / "book"
    assert made.model.allowed["m"].path == str(tmp_path / "w")


@pytest.mark.parametrize("key", ["rank", "data-path", "memory", "max-epsilon", "label", "devices"])
def test_what_a_policy_says_is_said_there_alone(key: str) -> None:
    value = {"rank": 4, "max-epsilon": 1.0}.get(key, "x")
    check_node_config({"partition-id": 0, "worker-socket": "s", "policy": "p"})
    with pytest.raises(ConfigError, match=f"node config, {key}: say it in the policy, p"):
        check_node_config({key: value, "policy": "p"})
    with pytest.raises(ConfigError, match="no run's user's machine"):
        check_node_config({OWN_MACHINE: True, "policy": "p"})


def test_every_key_is_on_the_page() -> None:
    text = (DOCS / "deploy" / "node-policy.md").read_text()
    assert not [key for key in keys() if f"`{key.rpartition('.')[2]}`" not in text]


# -- what it admits -------------------------------------------------------------------------------


def refused(made: Policy, given: Mapping[str, Any], **fields: Any) -> tuple[str, str]:
    """What the server hears, and what the node's own record says."""
    with pytest.raises(PolicyError) as caught:
        admit(made, {**RUN, **given}, job(**fields))
    return str(caught.value), "; ".join(caught.value.reasons)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model.path": "other/model"}, "model.path"),
        ({"model.revision": "main"}, "model.revision"),
        ({"model.trust-remote-code": True}, "model.trust-remote-code"),
        ({"model.tokenizer": "py:a:b"}, "model.tokenizer"),
        ({"train.loss": "py:a:b"}, "train.loss"),
        ({"evaluate.metrics": "mcc,py:a:b"}, "evaluate.metrics"),
        ({"train.steps": 51}, "train.steps"),
        (
            {"train.steps": 20, "train.gradient-accumulation-steps": 3},
            "train.gradient-accumulation-steps",
        ),
        ({"train.batch-size": 65}, "train.batch-size"),
        ({"train.threads": 3}, "train.threads"),
        ({"train.epochs": 1001.0}, "train.epochs"),
        ({"lora.modules-to-save": "embed"}, "lora.modules-to-save"),
        ({"lora.rank-pattern": "(a+)+$=2"}, "lora.rank-pattern"),
        ({"lora.rank-pattern": "a*b*c*d*=2"}, "lora.rank-pattern"),
        ({"lora.target-modules": ".*(a|b)"}, "lora.target-modules"),
        ({"lora.options": "x={'a': 1}"}, "lora.options"),
        ({"privacy.insecure-reproducible-noise": True}, "privacy.insecure-reproducible-noise"),
        ({"privacy.release-metrics": True}, "privacy.release-metrics"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_key(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    said, reasons = refused(policy(tmp_path), changes)
    assert said == f"this node's policy does not allow {key}; ask its operator"
    assert key in reasons


def test_the_server_hears_a_fixed_text_and_no_value_of_the_policy(tmp_path: Path) -> None:
    made = policy(tmp_path, model={"allowed": {"secret/model": {"path": "/secret"}}})
    said, _ = refused(made, {"train.steps": 51, "model.path": "x"})
    assert said == "this node's policy does not allow model.path, train.steps; ask its operator"
    assert "secret" not in said
    assert "50" not in said


def test_what_is_the_nodes_own_is_the_policys_whatever_the_run_says(tmp_path: Path) -> None:
    made = policy(tmp_path, data={"label": "diagnosis", "map": ["a=b"]}, limits={"devices": "cpu"})
    theirs = {
        "data.node-path": "/etc/passwd", "data.label": "text", "data.map": "x=y", "data.limit": 7,
        "data.test-path": "/etc/passwd", "privacy.ledger": "/tmp/fresh", "run.out": "/tmp",
        "privacy.max-epsilon": 200.0, "output.client-memory": "/tmp/m", "data.partition": "natural",
        "data.natural-column": "text", "simulate.devices": "cuda:0", "run.name": "x",
        "data.client-test-fraction": 0.9, "data.line-pattern": "(a+)+", "data.dedupe": True,
        "lora.calibration": "/etc/passwd", "lora.init": "eva",
    }  # fmt: skip
    flat = admit(made, {**RUN, **theirs}, job()).flat()
    away = {k: str(v).replace(str(tmp_path), "here") for k, v in flat.items()}
    assert not [k for k, v in away.items() if "/etc/passwd" in v or "/tmp/" in v]
    assert flat["data.node-path"] == flat["data.path"] == str(tmp_path / "rows.jsonl")
    assert (flat["data.label"], flat["data.map"]) == ("diagnosis", "a=b")
    assert (flat["data.limit"], flat["data.client-test-fraction"]) == (0, 0.1)
    assert flat["privacy.ledger"] == str(tmp_path / "memory")
    assert flat["privacy.max-epsilon"] == 0.0
    assert (flat["simulate.devices"], flat["lora.calibration"]) == ("cpu", "the server's")
    assert (flat["run.name"], flat["data.partition"]) == ("quickstart", "dirichlet")


def test_what_a_run_may_set_is_taken_from_it_as_it_is(tmp_path: Path) -> None:
    theirs = {"train.lr": 0.01, "run.seed": 7, "lora.layers": "-2,-1", "strategy.name": "flora",
              "train.steps": 50, "lora.rank-pattern": "value=8,layer.0.*=2"}  # fmt: skip
    run = Config.read({**RUN, **theirs})
    flat = admit(policy(tmp_path), run.flat(), job()).flat()
    from fedlora.federation.client.allowed import ALLOWED, OF_A_SHARED_CORPUS

    taken = ALLOWED.keys() - OF_A_SHARED_CORPUS.keys()
    assert {k: flat[k] for k in taken} == {k: run.flat()[k] for k in taken}


def test_a_model_comes_from_the_place_and_the_revision_that_the_policy_says(tmp_path: Path) -> None:
    made = policy(tmp_path, model={"allowed": {MODEL: {"path": "/models/a", "revision": "abc"}}})
    config = admit(made, {**RUN, "model.revision": "abc"}, job())
    assert (config.model.path, config.model.revision) == ("/models/a", "abc")
    assert admit(made, RUN, job()).model.revision == "abc"
    assert "model.revision" in refused(made, {"model.revision": "def"})[0]


def test_a_shared_corpus_is_one_that_the_policy_names(tmp_path: Path) -> None:
    made = policy(tmp_path, data={"path": "", "shared": ["their.jsonl"]})
    config = admit(made, {**RUN, "data.partition": "iid"}, job())
    assert (config.data.path, config.data.partition) == ("their.jsonl", "iid")
    assert "data.test-path" in refused(made, {"data.test-path": "/etc/passwd"})[0]
    assert "data.clients" in refused(made, {"data.clients": '["a.csv"]', "data.path": ""})[0]


def test_a_jobs_ranks_modules_and_labels_are_limited(tmp_path: Path) -> None:
    made = policy(tmp_path, limits={"modules": 2})
    assert "the ranks" in refused(made, {}, ranks={"q": 17})[0]
    assert "the ranks" in refused(made, {}, ranks={"q": True})[0]
    assert "so many modules" in refused(made, {}, ranks=dict.fromkeys("abc", 2))[0]
    assert "the labels" in refused(made, {}, labels=("x" * 1001,))[0]


def test_the_jobs_changes_are_the_servers_word_too(tmp_path: Path) -> None:
    assert "train.steps" in refused(policy(tmp_path), {}, changes={"train.steps": 51})[0]


PRIVATE = {"privacy.epsilon": 4.0, "privacy.delta": 1e-4}


@pytest.mark.parametrize(
    ("privacy", "run", "key"),
    [
        ({"level": "example"}, {}, "privacy.level"),
        ({"level": "example"}, {**PRIVATE, "privacy.level": "client"}, "privacy.level"),
        ({"level": "client"}, PRIVATE, "privacy.level"),
        ({"max-delta": 1e-5}, PRIVATE, "privacy.delta"),
        ({"max-delta": 1e-6}, {"privacy.epsilon": 4.0}, "privacy.delta"),  # the run's default
        ({"max-epsilon": 1.0}, {}, "privacy.epsilon"),
        ({"max-epsilon": 1.0}, {**PRIVATE, "privacy.level": "client"}, "privacy.epsilon"),
    ],
)
def test_privacy_that_a_policy_demands_is_not_left_out(
    tmp_path: Path, privacy: dict[str, Any], run: dict[str, Any], key: str
) -> None:
    assert key in refused(policy(tmp_path, privacy=privacy), run)[0]


def test_privacy_that_is_enough_is_admitted_with_the_nodes_own_limit(tmp_path: Path) -> None:
    made = policy(tmp_path, privacy={"level": "example", "max-epsilon": 1.0, "max-delta": 1e-4})
    config = admit(made, {**RUN, **PRIVATE, "privacy.max-epsilon": 100.0}, job())
    assert (config.privacy.epsilon, config.privacy.max_epsilon) == (4.0, 1.0)


def test_a_level_alone_does_not_say_how_much_noise(tmp_path: Path) -> None:
    """So a policy that means it has a limit, too, which the ledger holds against each charge."""
    hollow = {**RUN, "privacy.noise-multiplier": 1e-9}
    for limit in (0.0, 1.0):
        made = policy(tmp_path, privacy={"level": "example", "max-epsilon": limit})
        config = admit(made, hollow, job())
        assert (config.privacy.noise_multiplier, config.privacy.max_epsilon) == (1e-9, limit)
    charge = Charge(Spend(0.1, 1e-9, 1), 0.3, 1e-5)
    ledger = Ledger(tmp_path / "book")
    with pytest.raises(BudgetSpent):
        ledger.reserve(charge, 1.0)
    assert not ledger.read().charges


def test_an_operator_demands_secure_aggregation_or_refuses_it(tmp_path: Path) -> None:
    secure = {"secure.aggregation": True}
    assert "secure.aggregation" in refused(policy(tmp_path, secure={"require": True}), {})[0]
    assert "secure.aggregation" in refused(policy(tmp_path, secure={"refuse": True}), secure)[0]
    assert admit(policy(tmp_path, secure={"require": True}), {**RUN, **secure}, job())


@pytest.mark.parametrize(
    ("secure", "cohort", "run", "fine"),
    [
        ({}, 3, {}, False),  # one that helps takes four
        ({}, 4, {}, True),
        ({"colluding": 0}, 3, {"secure.colluding": 0}, True),
        ({"colluding": 0}, 3, {}, False),  # the run's own is larger
        ({"colluding": 2}, 6, {}, False),  # the node's own is
        ({"colluding": 2}, 8, {}, False),  # t = 5 by the run's 1, and 2 t > 8 + 2
        ({"colluding": 2}, 8, {"secure.colluding": 2}, True),
        ({"colluding": 2}, 7, {"secure.colluding": 2}, True),
        ({"fewest": 10}, 9, {}, False),
        ({"fewest": 10}, 10, {}, True),
        ({"threshold": 7}, 10, {}, False),  # 6 of 10, more than half
        ({"threshold": 7}, 10, {"secure.reconstruction-threshold": 7}, True),
        # two stories of 10 neighbours, of which 3 tell both: 2 t > 10 + 3
        ({"colluding": 3}, 10, {"secure.reconstruction-threshold": 6}, False),
        ({"colluding": 3}, 10, {"secure.reconstruction-threshold": 7}, True),
        ({"colluding": 2}, 3, {"secure.reconstruction-threshold": 3}, False),  # a sum of one
    ],
)
def test_the_terms_of_a_sum_are_what_the_policy_demands(
    tmp_path: Path, secure: dict[str, Any], cohort: int, run: dict[str, Any], fine: bool
) -> None:
    made, terms = policy(tmp_path, secure=secure), Terms.of(Config.read({**RUN, **run}), cohort)
    if fine:
        assert check_terms(made, terms) is terms
    else:
        with pytest.raises(PolicyError):
            check_terms(made, terms)


def test_a_strategy_is_one_that_the_policy_lists_or_one_of_fedloras(tmp_path: Path) -> None:
    assert admit(policy(tmp_path), {**RUN, "strategy.name": "flora"}, job())
    made = policy(tmp_path, limits={"strategies": ["fedavg"]})
    assert "strategy.name" in refused(made, {})[0]  # the default, fedex
    assert admit(made, {**RUN, "strategy.name": "fedavg"}, job())


# -- kinds and hours ------------------------------------------------------------------------------


def test_kinds_and_hours_are_the_policys(tmp_path: Path) -> None:
    made = policy(tmp_path, hours={"begin": "22:00", "end": "06:00"}, limits={"kinds": ["train"]})
    night, day = datetime(2026, 1, 5, 23, 0), datetime(2026, 1, 5, 12, 0)
    check_message(made, "train", night)
    with pytest.raises(PolicyError, match="work at this hour"):
        check_message(made, "train", day)
    for kind in ("query", "gradient", "secagg_setup"):
        with pytest.raises(PolicyError, match="messages of kind"):
            check_message(made, kind, night)


@pytest.mark.parametrize(
    ("hours", "at", "is_open"),
    [
        ({}, "2026-01-05 03:00", True),
        ({"begin": "09:00", "end": "17:00"}, "2026-01-05 09:00", True),
        ({"begin": "09:00", "end": "17:00"}, "2026-01-05 17:00", False),
        ({"begin": "22:00", "end": "06:00"}, "2026-01-05 05:59", True),
        ({"begin": "22:00", "end": "06:00"}, "2026-01-05 21:59", False),
        ({"days": ("mon",)}, "2026-01-05 12:00", True),  # a Monday
        ({"days": ("mon",)}, "2026-01-06 12:00", False),
        ({"days": ("mon",), "begin": "22:00", "end": "06:00"}, "2026-01-06 05:00", True),
        ({"days": ("mon",), "begin": "22:00", "end": "06:00"}, "2026-01-05 05:00", False),
    ],
)
def test_hours(hours: dict[str, Any], at: str, is_open: bool) -> None:
    assert HoursPolicy(**hours).open_at(datetime.fromisoformat(at)) == is_open


# -- a node at work -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    root = tmp_path_factory.mktemp("honest")
    changes = {"run.rounds": 1, "train.steps": 3, "evaluate.clients": True}
    given = tiny_settings(tiny, root, "float32", "bert", **quick("fedavg", **changes))
    nodes = {i: written(root / f"node-{i}", tiny["bert"], tiny["rows"]) for i in range(3)}
    return recorded(given, nodes)


@pytest.mark.parametrize(
    "name",
    ["lora-a2", *(pytest.param(x, marks=pytest.mark.slow) for x in STRATEGIES if x != "lora-a2")],
)
def test_a_node_under_a_policy_answers_what_every_strategy_asks(
    tiny: dict[str, str], tmp_path: Path, name: str
) -> None:
    """With lora-a2 a client also says which ranks it sends."""
    given = tiny_settings(tiny, tmp_path, "float32", "bert", **quick(name, **{"run.rounds": 1}))
    limits = {"kinds": ["query", "train", "evaluate", "gradient", "collect"]}
    nodes = {
        i: written(tmp_path / f"node-{i}", tiny["bert"], tiny["rows"], limits=limits)
        for i in range(3)
    }
    assert "train" in recorded(given, nodes).messages


@pytest.fixture
def own(tiny: dict[str, str], tmp_path: Path) -> Callable[..., Path]:
    def make(**sections: Mapping[str, Any]) -> Path:
        return written(tmp_path / "node", tiny["bert"], tiny["rows"], **sections)

    return make


def lines(path: Path) -> list[dict[str, Any]]:
    return [dict(x) for x in audit.read(Policy.load(path).audit)]


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"steps": 2}, "train.steps"),
        ({"seconds": 1e-6}, "limits.seconds is reached"),
        ({"upload-mb": 1e-4}, "limits.upload-mb is reached"),
        ({"memory-mb": 1.0}, "limits.memory-mb is reached"),
        ({"rank": 1}, "the ranks"),
        ({"kinds": ["query"]}, "messages of kind train"),
    ],
)
def test_a_limit_ends_as_an_error_reply_of_its_own_code_and_on_record(
    honest: Recorded, own: Callable[..., Path], limit: dict[str, Any], reason: str
) -> None:
    path = own(limits=limit)
    reply = asked(honest, path)
    assert reply.error.code == Code.NOT_ALLOWED
    assert reason in reply.error.reason
    last = lines(path)[-1]
    assert (last["what"], last["kind"], last["round"]) == ("refused", "train", 1)
    assert not [x for x in lines(path) if x["what"] == "left"]
    if "upload-mb" not in limit:
        assert not list((path.parent / "memory").rglob("round-*"))


def test_no_word_of_another_base_names_the_nodes_own_place_of_it(
    honest: Recorded, own: Callable[..., Path], tiny: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "secret-place"
    shutil.copytree(tiny["bert"], place)
    path = own(model={"allowed": {tiny["bert"]: {"path": str(place)}}})
    reply = asked(honest, path, records={"job": {"fingerprint": "another"}})
    assert "base model (model.path) is not the server's" in reply.error.reason
    assert "secret-place" not in reply.error.reason


def test_steps_that_epochs_make_are_counted_too(honest: Recorded, own: Callable[..., Path]) -> None:
    many = {"train.steps": 0, "train.epochs": 2.0, "train.batch-size": 8}  # 135 rows: 34 steps
    assert not asked(honest, own(), config=many).has_error()
    reply = asked(honest, own(limits={"steps": 33}), config=many)
    assert "limits.steps is reached" in reply.error.reason


def test_the_seconds_are_looked_at_between_steps_and_in_an_evaluation(
    honest: Recorded, own: Callable[..., Path]
) -> None:
    reply = asked(honest, own(limits={"seconds": 1e-6}), "evaluate")
    assert "limits.seconds is reached" in reply.error.reason


def test_no_hook_is_left_behind() -> None:
    import torch

    with limits.watched(LimitsPolicy(steps=1)):
        w = torch.nn.Parameter(torch.ones(1))
        step = torch.optim.SGD([w], 0.1).step
        step()
        with pytest.raises(PolicyError, match=r"limits\.steps"):
            step()
        limits.counted_anew()
        step()
    for _ in range(3):
        step()


def test_too_few_rows_are_trained_on_scored_on_and_sent_by_nobody(
    honest: Recorded, own: Callable[..., Path]
) -> None:
    path = own(data={"smallest": 1000})
    for kind in ("train", "evaluate"):
        assert "so few rows" in asked(honest, path, kind).error.reason
    assert "135" not in asked(honest, path).error.reason
    assert lines(path)[-1]["reasons"] == ["so few rows: 135, data.smallest = 1000"]


def test_a_policy_is_read_for_every_message_and_the_record_says_which(
    honest: Recorded, own: Callable[..., Path]
) -> None:
    path = own()
    assert not asked(honest, path).has_error()
    own(limits={"kinds": ["query"]})
    assert asked(honest, path).error.code == Code.NOT_ALLOWED
    path.write_text("[data]\n")
    broken = asked(honest, path).error
    assert broken.reason.startswith("NodeFileError: this node's own settings cannot be used")
    path.unlink()
    assert asked(honest, path).has_error(), "a policy that is gone is no policy that allows all"
    own()
    assert not asked(honest, path).has_error()
    found = lines(path)
    assert [x["what"] for x in found] == ["asked", "left", "asked", "refused", "asked", "left"]
    first, second, third = (x["policy"] for x in found if x["what"] == "asked")
    assert first == third != second


def test_another_clients_number_is_not_this_nodes(
    honest: Recorded, own: Callable[..., Path]
) -> None:
    reply = asked(honest, own(), records={"job": {"client": 1}})
    assert "another client's number" in reply.error.reason


def test_metrics_that_a_policy_keeps_do_not_leave(
    honest: Recorded, own: Callable[..., Path]
) -> None:
    told = dict(asked(honest, own()).content["metrics"])
    kept = dict(asked(honest, own(privacy={"metrics": "never"})).content["metrics"])
    assert told["num-examples"] == 135
    assert "loss" in told
    assert kept == {"num-examples": 1, "steps": 3}


def test_what_cannot_be_put_on_record_does_not_leave(
    honest: Recorded, own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = audit.append

    def full(path: Path, what: str, **more: Any) -> None:
        if what == "left":
            raise OSError(28, "No space left on device")
        append(path, what, **more)

    monkeypatch.setattr(oversight.audit, "append", full)
    reply = asked(honest, own())
    assert reply.has_error()
    assert "No space left" in reply.error.reason


def test_without_its_keeper_a_node_does_nothing_and_says_so(
    honest: Recorded, own: Callable[..., Path]
) -> None:
    reply = asked(honest, own(privacy={"keeper": "none.sock"}))
    assert "fedlora node keeper node.toml" in reply.error.reason
    assert "none.sock" not in reply.error.reason
    assert not list((own().parent / "memory").rglob("checked.json")), "before anything was read"


def test_the_record_is_only_ever_added_to(tmp_path: Path) -> None:
    book = tmp_path / "a" / "audit.jsonl"
    audit.append(book, "asked", kind="train")
    before = book.read_bytes()
    audit.append(book, "left", bytes=3, error="x\ny")
    assert book.read_bytes().startswith(before)
    assert [x["what"] for x in audit.read(book)] == ["asked", "left"]
    with book.open("a") as f:
        f.write('{"what": "le')  # a crash in the middle
    assert len([*audit.read(book)]) == 2
    audit.append(book, "asked", kind="query")
    assert [x["what"] for x in audit.read(book)] == ["asked", "left", "asked"], "and swallows none"
    book.write_bytes(book.read_bytes() + b"\xff\xfe" + b"[" * 100_000 + b"\n")
    assert len([*audit.read(book)]) == 3
    assert not [*audit.read(tmp_path / "none")]


def test_half_a_line_on_a_full_disk_is_not_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system writes what there is room for, and says how much that was."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:20]))
    with pytest.raises(OSError, match="No space left"):
        audit.append(tmp_path / "audit.jsonl", "left", kind="train")
    assert not [*audit.read(tmp_path / "audit.jsonl")]


@pytest.mark.slow
def test_a_run_of_nodes_under_policies_ends_in_the_bytes_of_one_without(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    """So a policy changes nothing of what it allows; the digest of both configs is compared."""
    changes = {"evaluate.clients": True, "data.dedupe": False}
    given = tiny_settings(tiny, tmp_path, "float32", "bert", **quick("fedex", **changes))
    flat = {OWN_MACHINE: False, "data-path": tiny["rows"]}
    plain = {i: {**flat, "memory": str(tmp_path / f"m{i}")} for i in range(3)}
    before = federate({**given, "run.name": "plain"}, nodes=plain)
    under = {
        i: named(written(tmp_path / f"node-{i}", tiny["bert"], tiny["rows"])) for i in range(3)
    }
    after = federate({**given, "run.name": "under"}, nodes=under)
    assert before.adapter == after.adapter
    assert before.metrics == after.metrics


def test_a_refusal_is_a_failure_of_kind_policy_at_the_server(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    given = tiny_settings(tiny, tmp_path, "float32", "bert", **quick("fedavg"))
    nodes = {
        i: named(written(tmp_path / f"node-{i}", tiny["bert"], tiny["rows"],
                         limits={"kinds": ["query", "train"] if i else ["query"]}))
        for i in range(3)
    }  # fmt: skip
    ran = federate(given, nodes=nodes)
    assert ran.rounds[1]["accepted"] == [1, 2]
    assert ran.rounds[1]["failures"][0]["kind"] == "policy"


# -- a node without one ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("privacy.ledger", "/tmp/fresh"), ("data.node-path", "/etc/passwd"),
     ("output.client-memory", "/tmp/m")],
)  # fmt: skip
def test_without_a_policy_a_run_still_names_no_ledger_rows_or_memory_of_a_node(
    honest: Recorded, own: Callable[..., Path], key: str, value: str
) -> None:
    reply = asked(honest, own(), config={key: value}, node={"policy": ""})
    assert reply.error.code == Code.FAILED
    assert key in reply.error.reason


def test_the_ledger_is_one_whatever_a_run_does_to_the_rows(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    """Fault of old: a renamed label opened an empty ledger, and the limit was passed anew; and
    a server's own delta made any number of rounds cheap."""
    privacy = {"level": "example", "max-epsilon": 3.0, "delta": 1e-3}
    given = tiny_settings(tiny, tmp_path, "float32", "bert", **quick("fedavg", **{
        "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3, "run.rounds": 1,
        "train.optimizer": "sgd", "lora.layers": "-1"}))  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(Path(tiny["rows"]).read_text().splitlines(True)[:30]))
    nodes = {
        i: written(tmp_path / f"node-{i}", tiny["bert"], str(rows), privacy=privacy)
        for i in range(3)
    }
    kept, spent, ended = recorded(given, nodes), [0.0], ""
    for n in range(12):
        more = {
            "data.map": f"animal=creature{n}", "data.limit": 20 + n, "data.label": "text",
            "privacy.ledger": f"{tmp_path}/fresh-{n}", "data.client-test-fraction": 0.1 + n / 100,
            "run.name": f"fresh-{n}", "privacy.delta": 0.03,
            "data.unit-column": "label" if n % 2 else "",
        }  # fmt: skip
        reply = asked(kept, nodes[0], config=more, records={"job": {"token": f"run-{n}"}})
        if reply.has_error():
            ended = reply.error.reason
            break
        told = dict(reply.content["metrics"])
        assert told["privacy.delta"] == 1e-3, "the node's, not the server's"
        spent.append(told["privacy.epsilon"])
    assert "budget" in ended, spent
    assert spent == sorted(spent)
    assert 0 < spent[-1] <= 3.0
    (one,) = (nodes[0].parent / "memory").rglob("charges.jsonl")
    assert len(Ledger(one.parents[2]).read().charges) >= len(spent) - 1


def test_a_node_with_a_new_disk_trains_nothing_under_dp_until_its_operator_speaks(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    privacy = {"level": "example"}
    given = tiny_settings(tiny, tmp_path, "float32", "bert", **quick("fedavg", **{
        "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3, "run.rounds": 1,
        "train.optimizer": "sgd", "lora.layers": "-1"}))  # fmt: skip
    nodes = {
        i: written(tmp_path / f"node-{i}", tiny["bert"], tiny["rows"], privacy=privacy)
        for i in range(3)
    }
    kept = recorded(given, nodes)
    memory = nodes[0].parent / "memory"
    again = {"job": {"token": "another-run"}}
    shutil.rmtree(memory)
    reply = asked(kept, nodes[0], records=again)
    assert "no privacy ledger" in reply.error.reason
    assert "fedlora node recover" in reply.error.reason
    assert not memory.exists() or not [*memory.rglob("round-*")]
    line = ["node", "recover", str(nodes[0]), "--spent", "2.5"]
    assert CliRunner().invoke(app, line).exit_code == 0
    told = dict(asked(kept, nodes[0], records=again).content["metrics"])
    assert told["privacy.epsilon"] > 2.5
    known = {"job": {"ledger": int(told["privacy.ledger"]), "charges": 2, "token": "another-run"}}
    reply = asked(kept, nodes[0], records=known)
    assert reply.has_error(), "the server knows of two charges, and there is one"


def test_time_is_not_lost_by_the_watch() -> None:
    """A look at the clock for every pass: microseconds, next to milliseconds."""
    import torch

    layer, x = torch.nn.Linear(8, 8), torch.ones(1, 8)

    def seconds() -> float:
        begun = time.perf_counter()
        for _ in range(2000):
            layer(x)
        return (time.perf_counter() - begun) / 2000

    seconds()
    plain = min(seconds() for _ in range(3))
    with limits.watched(LimitsPolicy()):
        seen = min(seconds() for _ in range(3))
    assert seen - plain < 50e-6
    assert json.dumps({"plain": plain, "watched": seen})
