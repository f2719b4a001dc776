"""A run says what became of its rows: in its log, its summary, its clients' lines, its page."""

import json
from collections.abc import Callable
from html import unescape
from pathlib import Path

from fedlora.config.reader import Config
from fedlora.federation.server.loop import FederatedLora
from fedlora.launch.doctor.the_rows import lengths
from fedlora.reports import report
from fedlora.reports.console import Silent
from fedlora.training import cache
from fedlora.training.tasks import task_of
from tests.federation.test_federation import dense_adapter
from tests.support.tiny_federation import federate, quick
from tests.training.test_sites import NOTES, hospital

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


def test_each_site_trains_on_its_own_file_at_its_own_rank(
    settings: Settings, tmp_path: Path
) -> None:
    sites = hospital(tmp_path / "sites")
    given = settings(**quick("fedex", **{"data.test-size": 6, "data.path": ""}))
    ran = federate({**given, "data.clients": sites, "data.text": "text", "data.label": "label"})
    rows = ran.summary["rows"]
    assert rows["sites"] == [site["path"] for site in sites]
    lines = [json.loads(x) for x in (ran.directory / "clients.jsonl").read_text().splitlines()]
    assert [x["train_examples"] for x in lines] == [sum(x.values()) for x in rows["train"]]
    assert [x["rank"] for x in lines] == [2, 2, 5]  # clients.ranks "2,3,5", and the second's own


def test_a_node_s_own_config_names_its_columns_as_a_site_does(
    settings: Settings, tmp_path: Path
) -> None:
    sites = hospital(tmp_path / "sites")
    test = tmp_path / "central.csv"
    test.write_text("text,label\n" + "".join(f"t{i},{x}\n" for i, x in enumerate([*NOTES] * 3)))
    changes = {"data.path": "", "data.text": "text", "data.label": "label",
               "data.test-path": str(test), "evaluate.clients": True}  # fmt: skip
    given = {**settings(**quick("fedex")), **changes}
    nodes = [
        {"data-path": site.pop("path"), **site, "map": ",".join(site.get("map", []))}
        for site in hospital(tmp_path / "sites")
    ]
    ran = federate(given, nodes=dict(enumerate(nodes)))
    lines = [json.loads(x) for x in (ran.directory / "clients.jsonl").read_text().splitlines()]
    assert [x["train_examples"] for x in lines] == [22, 22, 22]
    assert [x["rank"] for x in lines] == [2, 2, 5]
    simulated = federate({**given, "data.clients": sites, "run.name": "simulated"})
    assert ran.adapter == simulated.adapter
    losses = [[r["train_loss"], *(c["before"] for c in r["clients"].values())] for r in ran.rounds]
    assert losses == [
        [r["train_loss"], *(c["before"] for c in r["clients"].values())] for r in simulated.rounds
    ]


def test_rows_with_too_long_a_prompt_are_told_with_their_lines(
    settings: Settings, tmp_path: Path
) -> None:
    rows = [{"text": "word " * (90 if i in (4, 11) else 2) + str(i), "answer": f"a{i % 5}"}
            for i in range(30)]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.path": str(file), "data.prompt": "text", "data.response": "answer",
               "data.max-length": 48, "data.test-size": 4, "data.partition": "iid",
               "data.client-test-fraction": 0.0, "clients.count": 2}  # fmt: skip
    given = settings("llama", **quick("fedex", **changes))
    config = Config.read(given)
    corpus = cache.corpus(config)
    (note,) = (
        f.what
        for f in lengths(config, corpus, cache.model(config, corpus.labels))
        if "make no example" in f.what
    )
    assert note.startswith("2 of 30 rows")
    assert f"{file}, line 5, {file}, line 12" in note
    ran = federate(given)
    lines = [json.loads(x) for x in (ran.directory / "clients.jsonl").read_text().splitlines()]
    long = [sum(t.startswith("word word word") for t in c.train.text) for c in corpus.clients]
    assert [x["untokenised"] for x in lines] == long
    assert sum(long) > 0


def test_a_client_weighs_by_its_rows_and_not_by_their_tokens(
    settings: Settings, tmp_path: Path
) -> None:
    """One has many short responses, the other few long ones: more rows here, more tokens there."""
    rows = [{"text": f"red {n}", "response": "dog" if n % 3 else "one two three up down left " * 4,
             "site": "short" if n % 3 else "long"} for n in range(30)]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.path": str(file), "data.prompt": "text", "data.response": "response",
               "data.partition": "natural", "data.natural-column": "site", "clients.count": 2,
               "data.test-size": 3, "data.dedupe": False, "run.rounds": 1,
               "output.keep-updates": True}  # fmt: skip
    ran = federate(given := settings("gpt2", **quick("fedex", **changes)))
    config = Config.read(given)
    corpus = cache.corpus(config)
    sizes = [len(client.train) for client in corpus.clients]
    parts = [cache.encoded("train", i, config, corpus.labels) for i in (0, 1)]
    tokens = [int(task_of("causal-lm").scored(part).sum()) for part in parts]
    assert (sizes[0] > sizes[1]) != (tokens[0] > tokens[1])
    dense = dense_adapter(ran.directory / "adapter")
    updates = [ran.update(1, i) for i in (0, 1)]
    assert [notes["num_examples"] for _, notes in updates] == sizes

    def apart(weights: list[int]) -> float:
        """How far the model is from the clients' updates, weighted like this."""
        gap = norm = 0.0
        for m, found in dense.items():
            want = 0 * found
            for n, (x, notes) in zip(weights, updates, strict=True):
                made = (x[f"{m}.B"].double() @ x[f"{m}.A"].double()).numpy()
                want = want + n / sum(weights) * notes["scale"][m] * made
            gap, norm = gap + ((want - found) ** 2).sum(), norm + (found**2).sum()
        return float((gap / norm) ** 0.5)

    assert apart(sizes) < 1e-5
    assert apart(tokens) > 0.05
