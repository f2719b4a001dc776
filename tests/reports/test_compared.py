"""Runs side by side: the figures are each run's own, and only keys that differ are named."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.errors import FedLoraError
from fedlora.reports import compared
from tests.reports.test_report import CONFIG, Page, lines, make_run, save

ATTACK = "</td><script>alert(1)</script>"


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    one = make_run(tmp_path / "one", clients=2, rounds=2)
    other = make_run(tmp_path / "other", clients=2, rounds=3)
    summary = json.loads((other / "summary.json").read_text()) | {"name": ATTACK}
    config = {**CONFIG, "lora": {**CONFIG["lora"], "alpha": 32.0}}
    save(other, lines(other), lines(other, "clients"), summary, config)
    return [one, other]


def test_each_run_has_a_line_and_a_curve_and_differing_keys_are_named(
    two: list[Path], tmp_path: Path
) -> None:
    said = CliRunner().invoke(
        app, ["report", *map(str, two), "--out", str(tmp_path / "x" / "page.html")]
    )
    assert said.exit_code == 0, said.output
    page = Page(tmp_path / "x" / "page.html")
    rows = page.table("run")
    for n, (row, run) in enumerate(zip(rows, two, strict=True), 1):
        summary = json.loads((run / "summary.json").read_text())
        assert row[0].strip() == f"{n}: {summary['name']}"
        told = [x.strip() for x in row]
        assert told[1:5] == [
            "fedex", str(n + 1), "accuracy", f"{100 * summary['final']['accuracy']:.1f}%",
        ]  # fmt: skip
        assert told[6] == "83.2%, TF-IDF + logistic regression"
        assert told[11] == str(summary["failures"])
    assert [[x.strip() for x in row] for row in page.table("key")] == [
        ["lora.alpha", "16.0", "32.0"]
    ]
    assert "script" not in page.tags
    assert len(page.pictures) == 1
    table = [*csv.reader((tmp_path / "x" / "page.csv").read_text().splitlines())]
    assert [row[0] for row in table] == ["run", "1: quickstart", f"2: {ATTACK}"]
    assert (tmp_path / "x" / "page.tex").read_text().count("fedex") == 2


def test_runs_of_different_scores_have_a_picture_each(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(n), 2, 1, causal=bool(n)) for n in range(2)]
    page = Page(compared.write(runs, tmp_path / "page"))
    assert len(page.pictures) == 2
    assert [row[3].strip() for row in page.table("run")] == ["accuracy", "perplexity"]
    assert "None." in page.text


def test_a_run_without_scores_is_compared_and_what_is_no_run_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2, 1)
    (run / "rounds.jsonl").write_text("")
    (run / "summary.json").unlink()
    row = compared.outcomes({"a": compared.read(run)}).rows[0]
    assert row[2] == "0, not finished"
    assert row[4:7] == ["-", "-", "-"]
    with pytest.raises(FedLoraError, match="nowhere: no rounds"):
        compared.write([run, tmp_path / "nowhere"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
