"""A server that sets every key of the config, and every field of a message, to hostile values.

Under a policy a node opens, imports, connects to, starts and writes nothing but what the policy
names and an honest message also has it touch: an audit hook sees all of it.
"""

import copy
import json
import math
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.federation.client.allowed import ALLOWED, IGNORED, OWN
from fedlora.federation.wire.codes import Code
from fedlora.federation.wire.replies import REPLIES
from fedlora.privacy.ledger import Ledger
from tests.conftest import tiny_settings
from tests.support.tiny_federation import ROOT, quick
from tests.support.under_policy import Deeds, Recorded, asked, recorded, sent, watched, written

DELTA = 1e-3
PRIVATE = {"privacy.noise-multiplier": 1.0, "privacy.delta": DELTA, "privacy.clip-norm": 1.0,
           "evaluate.clients": True, "train.optimizer": "sgd", "lora.layers": "-1",
           "train.steps": 1, "run.rounds": 1}  # fmt: skip
KEYS = sorted(Config().flat())


@dataclass
class Stage:
    """A node, what an honest server sends it, and what is secret or evil beside it."""

    kept: Recorded
    policy: Path
    allowed: list[Path]
    secret: Path
    honest: dict[str, Deeds]

    @property
    def ledger(self) -> Ledger:
        return Ledger(Policy.load(self.policy).ledger)

    def epsilon(self) -> float:
        return self.ledger.epsilon(DELTA)


@pytest.fixture(scope="module")
def stage(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("stage")
    given = tiny_settings(tiny, root, "float32", "bert", **quick("fedavg", **PRIVATE))
    privacy = {"privacy": {"level": "example", "max-delta": 0.01}}
    rows = root / "rows.jsonl"
    rows.write_text("".join(Path(tiny["rows"]).read_text().splitlines(True)[:30]))
    nodes = {i: written(root / f"node-{i}", tiny["bert"], str(rows), **privacy) for i in range(3)}
    kept = recorded(given, nodes)
    evil = root / "evil"
    (evil / "evil_package").mkdir(parents=True)
    (evil / "evil_module.py").write_text("def run(*_): ...\n")
    (evil / "evil_package" / "__init__.py").write_text("")
    secret = root / "secret.jsonl"
    secret.write_text('{"text": "red cat", "label": "animal"}\n' * 50)
    sys.path.append(str(evil))
    honest = {}
    for kind in ("train", "evaluate"):
        with watched() as deeds:
            reply = asked(kept, nodes[0], kind)
        assert not reply.has_error(), reply.error
        honest[kind] = deeds
    allowed = [nodes[0].parent, Path(tiny["bert"]), rows]
    yield Stage(kept, nodes[0], allowed, secret, honest)
    sys.path.remove(str(evil))


CODE = [Path(p) for p in (sys.prefix, sys.base_prefix, ROOT / "fedlora", ROOT / "client_app")]
SYSTEM = [Path(p) for p in ("/proc", "/sys", "/dev", "/usr", "/etc/localtime")]


SCRATCH = re.compile(re.escape(tempfile.gettempdir()) + r"/fedlora-\w{8}(/.*)?")
"""A temporary file of chance's name, which an honest message has it make and remove as well."""


def below(path: str, places: list[Path]) -> bool:
    if "\0" in path or ".." in Path(path).parts:
        return False
    here = Path(os.path.abspath(path))
    if SCRATCH.fullmatch(path):
        return True
    return any(here == p or p in here.parents for p in places)


def outside(stage: Stage, kind: str, deeds: Deeds) -> list[str]:
    """What is neither the policy's, nor installed code, nor done for an honest message too."""
    own, honest = Path(stage.policy).parent, stage.honest[kind]
    places = [*stage.allowed, *CODE, *SYSTEM]
    strange = [p for p in deeds.read - honest.read if not below(p, places)]
    found = [f"read {p}" for p in strange if not _parent(p, stage)]
    found += [f"wrote {p}" for p in deeds.wrote - honest.wrote if not below(p, [own])]
    installed = {name.split(".")[0] for name in sys.modules if not name.startswith("evil")}
    found += [f"imported {m}" for m in deeds.imported if m.split(".")[0] not in installed]
    return found + [f"did {x}" for x in deeds.other - honest.other]


def _parent(path: str, stage: Stage) -> bool:
    """A directory above what is allowed, as libraries look at on their way; no file."""
    here = Path(os.path.abspath(path))
    return here.is_dir() and any(here in p.parents for p in stage.allowed)


def held(stage: Stage, kind: str, what: str, ask: Any) -> Message:
    """The node's answer, which kept to what is promised."""
    before = stage.epsilon()
    with watched() as deeds:
        reply = ask()
    assert not (found := outside(stage, kind, deeds)), f"{what}: {found}"
    assert stage.epsilon() >= before, what
    ledgers = {p.name for p in stage.ledger.directory.parent.iterdir()}
    assert ledgers == {"node", "node.lock"}, what
    if reply.has_error():
        if reply.error.code == Code.NOT_ALLOWED:
            rows = [p for p in deeds.read if p == str(stage.allowed[2])]
            assert not rows, f"{what}: refused, and rows were read"
        assert str(stage.secret.parent) not in reply.error.reason, what
    else:
        assert {*reply.content} <= REPLIES[kind.rpartition(".")[2]], what
    return reply


def hostile(key: str, secret: str) -> list[Any]:
    """Values of every type, and for the key's own those that do harm somewhere."""
    texts = [
        "../../elsewhere", "/etc/passwd", secret, "py:evil_module:run", "pkg:evil_package/x",
        "evil_module", "http://127.0.0.1:9/x", "$(touch x)", "a\0b", "x" * 5000, "(a+)+$=9",
        '["' + secret + '"]', "[" * 3000, "{secret}", "client", "none", "-1", "text=label",
    ]  # fmt: skip
    numbers = [-1, 0, 1, 10**9, 2**31, 2**62, 2**63, 10**30]
    reals = [math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 1e308, 1e-308]
    others = [[secret], {"x": secret}, b"x", True, False]
    match Config().flat()[key]:
        case bool():
            own: list[Any] = [True, False, 1, "true", secret]
        case int():
            own = [*numbers, 0.5, secret]
        case float():
            own = [*reals, 10**9, secret]
        case _:
            own = [*texts, 1]
    return [*own, *others]


def tried(stage: Stage, key: str, n: int) -> None:
    """A message with the key's n-th hostile value: a training's and an evaluation's in turn."""
    value, kind = hostile(key, str(stage.secret))[n], ("train", "evaluate")[n % 2]
    what = f"{kind} with {key} = {str(value)[:60]!r}"
    held(stage, kind, what, lambda: asked(stage.kept, stage.policy, kind, {key: value}))


WORST = ["data.path", "data.node-path", "data.map", "data.label", "data.limit", "privacy.ledger",
         "privacy.max-epsilon", "output.client-memory", "model.path", "model.tokenizer",
         "train.loss", "run.name", "run.seed", "lora.calibration", "data.clients"]  # fmt: skip


@pytest.mark.parametrize("key", WORST)
def test_the_keys_that_owned_a_node_do_no_more(stage: Stage, key: str) -> None:
    """With a path that is there, or the key's third value; and one of chance."""
    for n in (2, random.Random(key).randrange(len(hostile(key, "")))):
        tried(stage, key, n)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_no_value_of_any_key_has_a_node_touch_what_its_policy_does_not_name(
    stage: Stage, key: str
) -> None:
    for n in range(len(hostile(key, ""))):
        tried(stage, key, n)


FIELDS = {
    "job": ["round", "token", "incarnation", "client", "modules", "ranks", "memory-round",
            "base-number", "fingerprint", "labels", "last-round", "cuts", "config", "code",
            "microbatch", "ledger", "charges", "since", "changes"],
    "download": ["scale-names", "scale-values", "trainable", "snapshots", "base", "block",
                 "penalty", "penalty-weight", "penalty-names", "penalty-keep"],
}  # fmt: skip
VALUES: list[Any] = [
    "../../x", "/etc/passwd", -1, 0, 2**31, 2**62, 0.5, math.nan, True, b"../x", "", "a\0b",
    ["/etc/passwd"], [2**62], [-1], [math.nan], [True], [b"x"], [], "x" * 5000,
    '{"model.path": "/etc/passwd"}', '{"data": {"node-path": "/etc/passwd"}}', "{", "[" * 3000,
    '{"privacy.ledger": "/tmp/elsewhere"}', '{"privacy.noise-multiplier": 0.0}',
]  # fmt: skip


def test_every_field_of_a_job_and_a_download_is_tried(stage: Stage) -> None:
    content = stage.kept.messages["train"].config_records
    for name in ("job", "download"):
        assert {*content[name]} <= {*FIELDS[name]}


def field_tried(stage: Stage, record: str, name: str, values: list[Any]) -> None:
    for n, value in enumerate(values):
        kind, fields = ("train", "evaluate")[n % 2], {record: {name: value}}
        what = f"{kind} with {record}.{name} = {str(value)[:60]!r}"
        held(stage, kind, what, lambda k=kind, f=fields: asked(
            stage.kept, stage.policy, k, records=f))  # fmt: skip


@pytest.mark.parametrize("name", ["token", "client", "changes", "ranks"])
def test_the_fields_of_a_job_that_owned_a_node_do_no_more(stage: Stage, name: str) -> None:
    field_tried(stage, "job", name, VALUES[::8])


@pytest.mark.slow
@pytest.mark.parametrize(("record", "name"), [(r, n) for r, names in FIELDS.items() for n in names])
def test_no_field_of_a_message_does(stage: Stage, record: str, name: str) -> None:
    field_tried(stage, record, name, VALUES)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 3), (2**31, 2**31), (-1, 4), (10**6,)])
@pytest.mark.parametrize("what", ["send", "fold", "base-1", "base-offset", "more"])
def test_no_array_of_a_message_does(stage: Stage, what: str, shape: tuple[int, ...]) -> None:
    for dtype, data in (("float32", b""), ("float32", np.zeros(9, "float32").tobytes()),
                        ("int8", b"x"), ("object", b"cos\nsystem\n(S'x'\ntR.")):  # fmt: skip
        content = copy.deepcopy(stage.kept.messages["train"])
        array = Array(dtype, shape, f"fedlora.{dtype}", data)
        content[what] = ArrayRecord({"A/encoder.layer.1.attention.self.query": array, "s/x": array})
        held(stage, "train", f"{what} {shape} {dtype}",
             lambda c=content: sent(c, "train", stage.kept.config, stage.policy))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["job", "download", "send"])
def test_no_record_that_lacks_or_is_of_another_kind_does(stage: Stage, name: str) -> None:
    others = [None, ConfigRecord(), MetricRecord({"x": 1.0}), ArrayRecord()]
    for other in others:
        content = RecordDict(dict(stage.kept.messages["train"]))
        del content[name]
        if other is not None:
            content[name] = other
        given = stage.kept.config
        reply = held(
            stage, "train", f"{name} is {other}",
            lambda c=content, g=given: sent(c, "train", g, stage.policy),
        )  # fmt: skip
        assert reply.has_error() or name == "send"


def test_the_measure_sees_what_is_done_outside(stage: Stage, tmp_path: Path) -> None:
    """So that the tests above can fail: each kind of deed, by hand."""
    import socket
    import subprocess

    with watched() as deeds:
        stage.secret.read_text()
        (tmp_path / "x").write_text("y")
        subprocess.run(["true"], check=True)
        socket.socket().close()
        __import__("evil_module")
    sys.modules.pop("evil_module")
    found = " ".join(outside(stage, "train", deeds))
    for sign in (f"read {stage.secret}", f"wrote {tmp_path / 'x'}", "subprocess.Popen",
                 "socket.__new__", "imported evil_module"):  # fmt: skip
        assert sign in found


def test_without_a_policy_the_same_server_reads_the_secret(stage: Stage, tmp_path: Path) -> None:
    """A counterexample: a node that says nothing of its rows takes the server's word on them."""
    more = {"data.path": str(stage.secret), "data.test-size": 5, "clients.count": 1}
    with watched() as deeds:
        asked(stage.kept, stage.policy, "train", more, node={"policy": "", "memory": str(tmp_path)})
    assert str(stage.secret) in deeds.read


# -- the list -------------------------------------------------------------------------------------


def test_every_key_is_allowed_or_the_nodes_own_or_ignored_and_only_one_of_them() -> None:
    """A new key fails here until somebody decides."""
    places = {key: [key in x for x in (ALLOWED, OWN, IGNORED)].count(True) for key in KEYS}
    undecided = {key for key, n in places.items() if n != 1}
    assert not undecided
    assert {*ALLOWED, *OWN, *IGNORED} == {*KEYS}


@pytest.mark.parametrize("key", ["train.loss-scale", "run.seed"])
def test_a_key_that_nobody_decided_on_is_refused_at_run_time(
    stage: Stage, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.federation.client import admit

    left = {k: v for k, v in ALLOWED.items() if k != key}
    monkeypatch.setattr(admit, "ALLOWED", left)
    reply = asked(stage.kept, stage.policy, config={key: 7})
    assert reply.has_error()
    if key == "run.seed":
        assert reply.error.code == Code.NOT_ALLOWED
        assert "run.seed" in reply.error.reason
    else:
        assert reply.error.reason.startswith("ConfigError")


def test_the_record_says_what_left_and_what_was_refused_and_why(stage: Stage) -> None:
    asked(stage.kept, stage.policy, config={"train.steps": 51})
    lines = [json.loads(x) for x in Policy.load(stage.policy).audit.read_text().splitlines()]
    assert lines[-2]["what"] == "asked"
    assert lines[-1]["reasons"] == ["train.steps: must be at most limits.steps = 50",
                                    "train.steps: 51, the limit is 50"]  # fmt: skip
    left = next(x for x in lines if x["what"] == "left" and x["kind"] == "train")
    assert left["epsilon"] > 0
    assert left["bytes"] > 1000
    assert left["records"] == ["reply", "sent", "metrics", "certificate"]
