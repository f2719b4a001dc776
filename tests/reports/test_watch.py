"""Where a run can be watched: JSON lines, Prometheus, TensorBoard."""

import json
import math
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.errors import ConfigError
from fedlora.launch.deploy.plan import free_ports
from fedlora.reports.console import Silent
from fedlora.reports.observers import All, Figures, JsonLines, metrics, numbers
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]


def test_every_event_is_one_json_object_a_line(settings: Settings, capsys) -> None:
    found = federate(settings(**quick("fedavg", **{"output.log": "json"})))
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    done = [x for x in lines if x["event"] == "round_done"]
    assert [x["round"] for x in done] == [0, 1, 2]
    assert done[2]["train_loss"] == found.rounds[2]["train_loss"]
    assert done[2]["certificate"] == found.rounds[2]["certificate"]
    assert [x["client"] for x in lines if x["event"] == "client_done"] == [0, 1, 2] * 2
    assert all("time" in x for x in lines)


def test_a_number_that_is_none_is_null() -> None:
    said: list[str] = []
    JsonLines(said.append).client_done(0, {"loss": math.nan, "rank": 3})
    assert json.loads(said[0])["metrics"] == {"loss": None, "rank": 3}


RECORD = {
    "round": 3, "train_loss": 0.5, "evaluation": {"accuracy": 0.75, "loss": math.nan},
    "bytes": {"down": 100, "up": 20}, "seconds": {"total": 2.0}, "accepted": [0, 1],
    "failures": [{"client": 2}], "proof": {"deviation": 1e-7},
    "certificate": {"deviation": 2e-7, "excess": 0.25, "layers": {"query": 2e-7},
                    "start": {"0": 0.0}, "start_excess": 0.125},
}  # fmt: skip


def test_prometheus_reads_the_figures_while_the_run_lasts() -> None:
    port = free_ports(1)[0]
    with metrics(port) as figures:
        figures.client_done(1, {"seconds": 1.5})
        figures.client_failed(2, "no reply")
        figures.round_done(RECORD)
        figures.round_done({**RECORD, "round": 4})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    assert "fedlora_round 4.0" in text
    assert 'fedlora_evaluation{metric="accuracy"} 0.75' in text
    assert 'fedlora_bytes_total{direction="down"} 200.0' in text
    assert 'fedlora_replies_total{client="2",outcome="failed"} 1.0' in text
    assert 'fedlora_client_seconds{client="1"} 1.5' in text
    assert "fedlora_proof_deviation 1e-07" in text
    assert 'fedlora_certificate{figure="deviation"} 2e-07' in text
    assert 'fedlora_certificate{figure="start_excess"} 0.125' in text
    assert "nan" not in text.lower()
    with pytest.raises(OSError, match=r"refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def told(*certificates: object) -> str:
    """What Prometheus is told of the certificate after rounds that had these."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    figures = Figures(registry)
    for found in certificates:
        figures.round_done({**RECORD, "certificate": found})
    lines = generate_latest(registry).decode().splitlines()
    return "\n".join(x for x in lines if x.startswith("fedlora_certificate"))


def test_prometheus_hears_nothing_of_a_round_that_was_not_certified() -> None:
    silent = {"deviation": 0.0, "excess": 0.0, "layers": {}, "start": {}, "start_excess": None}
    for missing in (None, silent):
        assert not told(missing)
        assert not told(RECORD["certificate"], missing), "nor what an earlier round had"
    begun = {**silent, "start": {"0": 1.0}, "start_excess": 3.0}
    assert told(begun) == 'fedlora_certificate{figure="start_excess"} 3.0'


def test_an_infinite_excess_reaches_prometheus_so_that_an_alarm_rings() -> None:
    found = {"deviation": math.nan, "excess": math.inf, "layers": {"query": 1.0}, "start": {}}
    assert 'fedlora_certificate{figure="excess"} +Inf' in told(found)
    assert "certificate/excess" not in numbers({"certificate": found})


def test_a_port_in_use_is_said_before_round_1(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"output.metrics-port = {port}"):
            federate(settings(**quick("fedavg", **{"output.metrics-port": port})))


def test_tensorboard_gets_every_round(settings: Settings) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = federate(settings(**quick("fedavg", **{"output.tracker": "tensorboard"})))
    events = [p.parent for p in Path(found.directory, "tracker").rglob("events.out.*")]
    scalars: dict[str, list[tuple[int, float]]] = {}
    for directory in set(events):
        board = EventAccumulator(str(directory)).Reload()
        for tag in board.Tags()["scalars"]:
            scalars[tag] = [(e.step, e.value) for e in board.Scalars(tag)]
    told = scalars["train_loss"]
    assert [step for step, _ in told] == [1, 2]  # round 0 trains nothing
    assert told[1][1] == pytest.approx(found.rounds[2]["train_loss"])
    assert [step for step, _ in scalars["bytes/up"]] == [0, 1, 2]


def test_a_tracker_that_fails_costs_nothing_but_itself() -> None:
    class Broken(Silent):
        def round_done(self, record: object) -> None:
            raise ConnectionError("its server is away")

    class Notes(Silent):
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    notes = Notes()
    both = All(notes, [Broken()])
    both.round_done(RECORD)
    both.round_done(RECORD)
    assert notes.said == ["Broken is left out from here on: its server is away"]


def test_figures_are_finite_numbers_only() -> None:
    assert numbers(RECORD) == {
        "train_loss": 0.5, "evaluation/accuracy": 0.75, "seconds/total": 2.0, "bytes/down": 100.0,
        "bytes/up": 20.0, "replies": 2.0, "failures": 1.0, "proof/deviation": 1e-7,
        "certificate/deviation": 2e-7, "certificate/excess": 0.25,
        "certificate/start_excess": 0.125,
    }  # fmt: skip
