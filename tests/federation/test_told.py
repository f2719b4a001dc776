"""What a node tells a server of an error: no word of a row, through real messages."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from client_app.app import app as client_app
from fedlora import errors
from fedlora.config.reader import Config
from fedlora.errors import DataError, FedLoraError
from fedlora.federation.client.told import FIXED, LOCAL, told
from fedlora.federation.wire.codes import LONGEST, Code
from fedlora.federation.wire.job import Job
from fedlora.federation.wire.same_machine import OWN_MACHINE
from fedlora.launch.simulate.grid import LocalGrid
from tests.federation.test_bad_clients import Bad, metric
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
SECRETS = ("Zanzibar", "Quetzal", "Ouagadougou")
NODE: dict[str, Any] = {OWN_MACHINE: False}


def rows(path: Path) -> Path:
    """Rows of which every field but the text is a secret."""
    lines = []
    for n in range(60):
        secret = SECRETS[n % 3]
        lines.append({"text": f"red cat {n}", "note": f"{secret} {n}", "label": secret})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answer(
    settings: Mapping[str, object], node: Mapping[str, Any], kind: str = "train", **job: Any
) -> Message:
    """What a client answers to a message of a server with these settings."""
    config = Config.read(settings)
    made: dict[str, Any] = {
        "round": 1, "token": "run", "incarnation": "start", "client": 0, "ranks": {},
        "memory_round": 0, "base_number": 0, "fingerprint": "", "config": config.identity(),
        "labels": ("colour", "animal", "number"), **job,
    }  # fmt: skip
    content = RecordDict({"job": Job(**made).record()})
    with LocalGrid(client_app, 1, config.flat(), node_configs={0: node}) as grid:  # type: ignore[arg-type]
        message = Message(content, 1000, kind)
        message.metadata.__dict__["_message_id"] = "0" * 32
        reply = client_app(message, grid.contexts[1000])
    assert reply is not None
    return reply


# what a server may set to have a node read and fail on another column, cell or row
QUESTIONS: dict[str, dict[str, object]] = {
    "another column as the label": {"data.label": "note"},
    "the label column's own values": {"data.label": "label"},
    "labels that it states": {"data.label": "label", "data.labels": "colour,animal"},
    "a growing list of labels": {"data.label": "label", "data.labels": "Zanzibar,x"},
    "the text as the label": {"data.label": "text"},
    "no such column": {"data.text": "nothing"},
    "a column that is renamed": {"data.map": "Zanzibar=colour", "data.label": "label"},
    "a separator": {"data.separator": "a"},
    "another encoding": {"data.encoding": "utf-32"},
    "a language model": {"model.task": "causal-lm", "data.prompt": "note", "data.response": "x"},
}


@pytest.mark.parametrize("what", QUESTIONS)
def test_no_error_brings_a_word_of_a_row(settings: Settings, tmp_path: Path, what: str) -> None:
    own = {**NODE, "data-path": str(rows(tmp_path / "secret-place.jsonl")), "memory": str(tmp_path)}
    given = settings(**quick("fedavg", **QUESTIONS[what]))
    for kind in ("train", "evaluate", "query.collect", "train.gradient", "train.secagg_collect"):
        reply = answer(given, own, kind)
        assert reply.has_error()
        said = reply.error.reason
        assert not [s for s in (*SECRETS, "red cat", "secret-place") if s in said], said
        assert len(said) < LONGEST


def test_the_nodes_own_log_has_the_whole_text(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {**NODE, "data-path": str(rows(tmp_path / "rows.jsonl")), "memory": str(tmp_path)}
    given = settings(**quick("fedavg", **{"data.label": "note"}))
    with caplog.at_level(logging.ERROR, "fedlora.node"):
        reply = answer(given, own, "evaluate")
    assert "Zanzibar" in caplog.text
    assert reply.error.reason == (
        f"DataError: {FIXED[DataError]} ({keys_in(reply.error.reason)}); {LOCAL}"
    )
    assert reply.error.code == Code.FAILED


def keys_in(text: str) -> str:
    return text.partition("(")[2].partition(")")[0]


def test_on_the_users_own_machine_an_error_is_whole(settings: Settings, tmp_path: Path) -> None:
    own = {"data-path": str(rows(tmp_path / "rows.jsonl"))}
    given = settings(**quick("fedavg", **{"data.label": "note"}))
    assert "Zanzibar" in answer(given, own, "evaluate").error.reason


def test_every_error_of_ours_has_a_fixed_text_or_says_that_it_may_leave() -> None:
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, FedLoraError):
            words = ["Zanzibar"] if issubclass(error, errors.ConfigError) else "Zanzibar"
            made = error(7, "Zanzibar") if error is errors.ClientError else error(words)
            assert ("Zanzibar" in told(made, own_machine=False)) == error.may_leave, error
            assert "Zanzibar" in told(made, own_machine=True)
    allowed = {e for e in vars(errors).values() if getattr(e, "may_leave", False)}
    assert allowed == {
        errors.WireError,
        errors.TrainingCheckError,
        errors.BundleError,
        errors.PolicyError,
    }


def test_only_keys_that_everybody_knows_are_named() -> None:
    error = DataError('data.label = "note" of data.text: has "secret.key" and data.zanzibar')
    said = told(error, own_machine=False)
    assert keys_in(said) == "data.label, data.text"


def test_of_a_bug_a_server_hears_where_it_is_and_not_what_it_says() -> None:
    try:
        int("Zanzibar")
    except ValueError as e:
        error = e
    said = told(error, own_machine=False)
    assert said.startswith("ValueError: a bug, or this machine (test_told.py:")
    assert "Zanzibar" not in said


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    error = OSError(28, "No space left on device", str(tmp_path / "Zanzibar"))
    assert "No space left" in told(error, own_machine=False)
    assert "Zanzibar" not in told(error, own_machine=False)
    assert "Zanzibar" not in told(FileNotFoundError(2, "No such file", "Zanzibar"), False)


# -- the other way: what a client says reaches no terminal -----------------------------------------

FORGED = "\x1b[2K\rround 3, accuracy 0.9999\n" + "x" * 1000


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (metric(f"before.{FORGED}", 1.0), "a metric's name"),
        (metric("before." + "x" * 5_000_000, 1.0), "a metric's name"),
        (metric("steps", float("nan")), "steps = nan"),
    ],
    ids=["escapes", "5 MB", "NaN"],
)
def test_the_name_of_a_metric_is_bounded_and_prints(
    settings: Settings, spoil: Any, reason: str
) -> None:
    ran = federate(settings(**quick("fedavg")), Bad(spoil))
    (failure,) = ran.rounds[2]["failures"]
    assert reason in failure["reason"]
    text = (ran.directory / "rounds.jsonl").read_text()
    assert "\\u001b" not in text
    assert len(text) < 100_000


def test_final_scores_of_odd_names_are_left_out(settings: Settings) -> None:
    def odd(message: Message, context: Context) -> Message | None:
        reply = client_app(message, context)
        if message.metadata.message_type == "evaluate" and context.node_id == 1001:
            return metric(f"final.{FORGED}", 1.0)(message, reply, Bad(odd))  # type: ignore[arg-type]
        return reply

    ran = federate(settings(**quick("fedavg", **{"evaluate.clients": True, "run.rounds": 1})), odd)
    assert "0.9999" not in (ran.directory / "clients.jsonl").read_text()
    assert ran.summary["clients"]["final"]


def test_a_worker_that_is_lost_does_not_say_what_it_held(tmp_path: Path) -> None:
    """gRPC's details are the words of whatever the worker raised."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    def broken(data: bytes, call: Any) -> bytes:
        raise ValueError("Zanzibar")

    socket, state = tmp_path / "w.sock", health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(2))
    handlers = {"Answer": grpc.unary_unary_rpc_method_handler(broken)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("fedlora.Worker", handlers),)
    )
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    state.set("", health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    try:
        with LocalGrid(client_app, 1, {}) as grid:
            context = grid.contexts[1000]
            context.node_config.update(NODE)
            context.node_config["worker-socket"] = str(socket)
            message = Message(RecordDict(), 1000, "train")
            message.metadata.__dict__["_message_id"] = "0" * 32
            reply = client_app(message, context)
    finally:
        server.stop(None)
    assert reply is not None
    assert reply.error.code == Code.WORKER_LOST
    assert "UNKNOWN" in reply.error.reason
    assert "Zanzibar" not in reply.error.reason
