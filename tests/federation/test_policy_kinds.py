"""A server that sets every field of every other kind of message to hostile values.

What test_policy_hostile.py does with training and evaluation, for the rest: the query, the first
gradient with its probes, what a client kept, and the five stages of a secure sum. Each hostile
message meets the node as the honest one did, with what the stages before it left on its disk.
"""

import copy
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client_app.app import app as client_app
from fedlora.config.policy import KINDS
from fedlora.config.reader import Config
from fedlora.federation.client.dispatch import HANDLERS
from fedlora.federation.secure.agreement import Agreement, table_of
from tests.conftest import tiny_settings
from tests.federation.test_policy_hostile import FIELDS, VALUES, Stage, held
from tests.support.tiny_federation import federate, quick
from tests.support.under_policy import Deeds, Recorded, named, sent, watched, written

RUNS: dict[str, dict[str, Any]] = {
    "gradient": quick("fedsb", **{"strategy.fedsb.init-from": "update-approx"}),
    "collect": quick("fedsa"),
    "secagg": quick("ffa", **{"secure.aggregation": True, "secure.colluding": 0,
                              "clients.ranks": "3"}),
}  # fmt: skip
"""Runs of one round that between them send every kind of message."""
SHORT: dict[str, Any] = {"train.steps": 1, "run.rounds": 1, "lora.layers": "-1"}
KIND = {
    "query": "secagg", "query.collect": "collect", "train.gradient": "gradient",
    **{f"train.secagg_{s}": "secagg" for s in ("setup", "share", "collect", "agree", "unmask")},
}  # fmt: skip
"""By the kind of a message, the run that sends it."""
ELSEWHERE = {"train", "evaluate"}
"""The kinds that test_policy_hostile.py has."""


@dataclass
class Moments:
    """An honest run's messages to node 0, each with the node's directory as it met it."""

    stage: Stage
    there: Path
    before: dict[str, Path] = field(default_factory=dict)

    def held(self, kind: str, content: RecordDict, what: str) -> Message:
        """Its answer, which kept to what is promised, from where the honest message found it."""
        self.restore(kind)
        return held(self.stage, kind, f"{kind} with {what}", lambda: self.ask(kind, content))

    def restore(self, kind: str) -> None:
        shutil.rmtree(self.there)
        shutil.copytree(self.before[kind], self.there)

    def ask(self, kind: str, content: RecordDict) -> Message:
        """The node's answer."""
        config = self.stage.kept.config
        return sent(content, kind, config, self.stage.policy)


@pytest.fixture(scope="module")
def moments(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Moments]:
    """By the name of the run."""
    return {name: _moments(tiny, tmp_path_factory.mktemp(name), name) for name in RUNS}


def _moments(tiny: dict[str, str], root: Path, name: str) -> Moments:
    settings = tiny_settings(tiny, root, "float32", "bert", **{**RUNS[name], **SHORT})
    rows = root / "rows.jsonl"
    rows.write_text("".join(Path(tiny["rows"]).read_text().splitlines(True)[:30]))
    more = {"secure": {"colluding": 0}, "limits": {"kinds": [*KINDS]}}
    nodes = {i: written(root / f"node-{i}", tiny["bert"], str(rows), **more) for i in range(3)}
    kept, there = Recorded(Config.read(settings).flat()), nodes[0].parent
    allowed = [there, Path(tiny["bert"]), rows]
    secret = root / "secret" / "secret.jsonl"
    secret.parent.mkdir()
    secret.write_text('{"text": "red cat", "label": "animal"}\n' * 50)
    found = Moments(Stage(kept, nodes[0], allowed, secret, {}), there)
    errors: list[Any] = []

    def app(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if context.node_config["partition-id"] or kind in kept.messages:
            return client_app(message, context)
        kept.messages[kind] = copy.deepcopy(message.content)
        found.before[kind] = root / "before" / kind
        shutil.copytree(there, found.before[kind])
        with watched() as deeds:
            reply = client_app(message, context)
        found.stage.honest[kind] = deeds
        errors.extend([reply.error] if reply.has_error() else [])
        return reply

    try:
        federate(settings, app, nodes={i: named(path) for i, path in nodes.items()})
    finally:
        assert not errors, errors
    for kind in kept.messages:  # once more, alone: what a process imports it imports once
        found.restore(kind)
        with watched() as deeds:
            reply = found.ask(kind, copy.deepcopy(kept.messages[kind]))
        assert not reply.has_error(), reply.error
        before = found.stage.honest[kind]
        found.stage.honest[kind] = Deeds(
            before.read | deeds.read, before.wrote | deeds.wrote,
            before.imported | deeds.imported, before.other | deeds.other,
        )  # fmt: skip
    return found


def test_a_table_of_a_sum_that_is_larger_than_may_leave_is_refused_before_anything_of_its_size(
    moments: dict[str, Moments],
) -> None:
    """Other clients send what the server says, and a mask has as many numbers."""
    found, kind = moments["secagg"], "train.secagg_setup"
    found.restore(kind)
    content = copy.deepcopy(found.stage.kept.messages[kind])
    told = Agreement.read(str(content.config_records["secagg"]["agreement"]))
    (shapes,) = told.table.shapes
    for more in ((10**6, 10**6), (-1, 10**12)):
        large = table_of([shapes, {("A", "z"): more}], [*told.table.trains * 2], told.table.kinds)
        text = replace(told, table=large).record()
        content["secagg"] = ConfigRecord({"agreement": text})
        reply = found.ask(kind, content)
        assert "limits.upload-mb is reached" in reply.error.reason


def test_every_kind_of_message_is_tried_here_or_beside(moments: dict[str, Moments]) -> None:
    """A new kind fails here until somebody tries it; so does a field that no run sends."""
    sent_kinds = {kind for m in moments.values() for kind in m.stage.kept.messages}
    assert {*KIND} | ELSEWHERE == sent_kinds | ELSEWHERE
    assert {kind.rpartition(".")[2] for kind in {*KIND} | ELSEWHERE} == {*HANDLERS}


def tried(moments: dict[str, Moments], kind: str, values: list[Any]) -> int:
    """Each value in each field of each record of the message; how many were no error."""
    at, answered = moments[KIND[kind]], 0
    honest = at.stage.kept.messages[kind]
    for record in honest.config_records:
        names = {*honest.config_records[record], *FIELDS.get(record, ())}
        for name in sorted(names):
            for value in values:
                content = copy.deepcopy(honest)
                content[record] = ConfigRecord({**honest.config_records[record], name: value})
                reply = at.held(kind, content, f"{record}.{name} = {str(value)[:60]!r}")
                answered += not reply.has_error()
    return answered


@pytest.mark.parametrize("kind", [k for k in KIND if k != "query"])
def test_no_field_of_another_kind_has_a_node_touch_what_its_policy_does_not_name(
    moments: dict[str, Moments], kind: str
) -> None:
    tried(moments, kind, ["../../x"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KIND if k != "query"])
def test_no_value_of_any_field_of_another_kind_does(moments: dict[str, Moments], kind: str) -> None:
    tried(moments, kind, VALUES)


SHAPES = [(0,), (3, 3), (2**31, 2**31), (-1, 4)]


@pytest.mark.parametrize("kind", [*KIND])
def test_no_record_that_is_missing_of_another_kind_or_too_many_does(
    moments: dict[str, Moments], kind: str
) -> None:
    at = moments[KIND[kind]]
    honest = at.stage.kept.messages[kind]
    other = ArrayRecord({"x": Array("object", (), "fedlora.object", b"cos\nsystem\n(S'x'\ntR.")})
    for name in [*honest, "more"]:
        for instead in (None, ConfigRecord(), ConfigRecord({"path": "/etc/passwd"}), other):
            content = RecordDict({k: x for k, x in honest.items() if k != name})
            if instead is not None:
                content[name] = instead
            at.held(kind, content, f"{name} = {instead!r:.60}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train.gradient", "train.secagg_collect"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_array_of_another_kind_does(
    moments: dict[str, Moments], kind: str, shape: tuple[int, ...]
) -> None:
    at = moments[KIND[kind]]
    honest = at.stage.kept.messages[kind]
    for name in honest.array_records:
        for dtype, data in (("float32", b""), ("float32", np.zeros(9, "float32").tobytes()),
                            ("object", b"cos\nsystem\n(S'x'\ntR.")):  # fmt: skip
            content = copy.deepcopy(honest)
            array = Array(dtype, shape, f"fedlora.{dtype}", data)
            keys = [*honest.array_records[name], "B/encoder.layer.1.attention.self.query"]
            content[name] = ArrayRecord(dict.fromkeys(keys, array))
            at.held(kind, content, f"{name} {shape} {dtype}")


def test_what_is_tried_meets_the_stage_and_not_its_absence(moments: dict[str, Moments]) -> None:
    """The node answers the honest message again each time: a refusal is of what was changed."""
    for kind, run in KIND.items():
        honest = copy.deepcopy(moments[run].stage.kept.messages[kind])
        moments[run].restore(kind)
        assert not moments[run].ask(kind, honest).has_error(), kind
