"""A run says what became of its rows: in its log, its summary, its clients' lines, its page."""

import json
from collections.abc import Callable
from html import unescape

from fedlora.federation.server.loop import FederatedLora
from fedlora.reports import report
from fedlora.reports.console import Silent
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]


class Notes(Silent):
    """Keeps what a run notes."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def watch(self, server: FederatedLora) -> None:
        server.observer = self

    def note(self, text: str) -> None:
        self.said.append(text)


def test_a_run_accounts_for_every_row_it_read(settings: Settings) -> None:
    notes = Notes()
    ran = federate(settings(**quick("fedex")), before=notes.watch)
    rows = ran.summary["rows"]
    parts = [rows["test"], *rows["train"], *rows["held"]]
    read = sum(s["read"] for s in rows["sources"])
    left = sum(x["rows"] for s in rows["sources"] for x in s["left"])
    assert read == left + sum(sum(part.values()) for part in parts) > 0
    lines = [json.loads(x) for x in (ran.directory / "clients.jsonl").read_text().splitlines()]
    assert [x["labels"] for x in lines] == rows["train"]
    assert [x["test_labels"] for x in lines] == rows["held"]
    assert any(f"{read} rows read = {left} left out" in text for text in notes.said)
    page = unescape(report.write(ran.directory, plots=False).read_text())
    assert rows["sources"][0]["path"] in page.split('<h2 id="rows">')[1].split("<h2")[0]
