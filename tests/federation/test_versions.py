"""Nodes whose fedlora or Flower differ are named, with both versions, before round 1."""

import pytest
from flwr.app import ConfigRecord

from client_app.app import app as client_app
from fedlora.config.reader import Config
from fedlora.errors import RoundError
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.wire import versions
from fedlora.launch.simulate.grid import LocalGrid
from fedlora.reports.console import Silent
from tests.support.tiny_federation import quick

MINE = {"fedlora": "0.4.2", "flwr": "1.41.0"}


@pytest.mark.parametrize(
    ("theirs", "refused", "said"),
    [
        ({}, "", ""),
        ({"fedlora": "0.4.3"}, "", "its fedlora is 0.4.3, the server's is 0.4.2"),
        ({"fedlora": "0.5.2"}, "its fedlora is 0.5.2, the server's is 0.4.2", ""),
        ({"fedlora": "1.4.2"}, "its fedlora is 1.4.2, the server's is 0.4.2", ""),
        ({"fedlora": "0.40.2"}, "its fedlora is 0.40.2, the server's is 0.4.2", ""),
        ({"flwr": "1.42.0"}, "", "its flwr is 1.42.0, the server's is 1.41.0"),
        ({"flwr": "2.41.0"}, "its flwr is 2.41.0, the server's is 1.41.0", ""),
        ({"flwr": None}, "", "it does not say its version of flwr, the server's is 1.41.0"),
        ({"fedlora": 4}, "its fedlora is no version", ""),
        ({"fedlora": "0.4.2\x1b[2J"}, "its fedlora is no version", ""),
        ({"fedlora": "0.4." + "2" * 99}, "its fedlora is no version", ""),
    ],
)
def test_the_rule(monkeypatch, theirs: dict[str, object], refused: str, said: str) -> None:
    monkeypatch.setattr(versions, "here", lambda: MINE)
    told = {k: v for k, v in {**MINE, **theirs}.items() if v is not None}
    found = versions.differences(told)
    for texts, text in zip(found, (refused, said), strict=True):
        assert [t.removesuffix(": install one on both") for t in texts] == ([text] if text else [])


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[tuple[str, bool]] = []
        self.begun = False

    def note(self, text: str) -> None:
        self.said.append((text, self.begun))

    def round_started(self, *_: object) -> None:
        self.begun = True


def started(settings, wait: float, **other: str) -> tuple[FederatedLora, Notes]:
    """A run of three nodes, the last of which says that it has these versions."""

    def app(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "query" and context.node_id == 1002:
            facts = dict(reply.content.config_records["facts"])
            reply.content["facts"] = ConfigRecord({**facts, **other})
        return reply

    notes = Notes()
    config = Config.read(settings(**quick("fedavg", **{"round.wait-for-clients": wait})))
    with LocalGrid(app, 3, config.flat(), 1) as grid:  # type: ignore[arg-type]
        server = FederatedLora(config, notes)
        server.start(grid)
    return server, notes


def test_a_node_of_another_patch_takes_part_and_is_named_before_round_1(settings) -> None:
    mine = versions.here()["fedlora"]
    theirs = f"{mine.rpartition('.')[0]}.99"
    server, notes = started(settings, 5.0, fedlora=theirs)
    assert set(server.session.nodes) == {0, 1, 2}
    said = [begun for text, begun in notes.said if f"its fedlora is {theirs}" in text]
    assert said == [False]
    assert any(f"node 1002: its fedlora is {theirs}, the server's is {mine}" in t
               for t, _ in notes.said)  # fmt: skip


def test_a_node_of_another_minor_is_not_taken_in(settings) -> None:
    with pytest.raises(RoundError, match=r"its fedlora is 99\.1\.0, the server's is \d") as error:
        started(settings, 0.5, fedlora="99.1.0")
    assert "2 of clients.count = 3" in str(error.value)


def test_nodes_of_the_servers_versions_are_not_spoken_of(settings) -> None:
    _, notes = started(settings, 5.0)
    assert not [t for t, _ in notes.said if "the server's is" in t]
