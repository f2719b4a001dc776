"""The report shows the certificate: how far off, whether that is rounding, what it leaves out."""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.reports import report, tables, units
from fedlora.reports.certificate import spans
from fedlora.training.certificate import K
from tests.reports.test_report import Page, change, lines, make_run
from tests.support.tiny_federation import federate, quick

SILENT = "client-level privacy: the mean is clipped and noised"


def certificate(**changes: Any) -> dict[str, Any]:
    return {
        "start": {"0": 2e-8, "1": 0.0},
        "start_excess": 0.04,
        "deviation": 3e-8,
        "excess": 0.02,
        "worst": "layer.1.query",
        "layers": {"layer.0.query": 1e-8, "layer.1.query": 3e-8},
        "not_certified": [],
    } | changes


def silent(*texts: str, **changes: Any) -> dict[str, Any]:
    """Of a round that was not held against its equation."""
    texts = texts or (SILENT,)
    nothing = {"deviation": 0.0, "excess": 0.0, "worst": "", "layers": {}}
    return certificate(**nothing, not_certified=list(texts), **changes)


def certified(folder: Path, *found: dict[str, Any], promise: str = "exact") -> Path:
    """A run of four clients whose rounds from 1 on have these certificates."""
    make_run(folder, clients=4, rounds=len(found), promise=promise)

    def edit(rounds: list[Any], _: list[Any], __: Any) -> None:
        rounds[0]["certificate"] = None
        for r, c in zip(rounds[1:], found, strict=True):
            r["certificate"] = c

    return change(folder, edit)


def page(run: Path) -> Page:
    return Page(report.write(run, plots=False))


def table(run: Path) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(report.summary_table(run))
    return console.file.getvalue()


def row(run: Path) -> str:
    """What the last table says of the certificate."""
    found = re.findall(r"certificate \(\w+\) *\u2502 *(.*?) *\u2502", table(run))
    assert len(found) == 1
    return str(found[0])


def columns(run: Path) -> list[tuple[str, str]]:
    """(text, tone) of the column of certificates, by round."""
    grid = tables.rounds(report.read(run))
    at = grid.head.index("certificate")
    return [(cells[at].text, cells[at].tone) for cells in grid.rows]


def tile(run: Path) -> Any:
    return next(t for t in tables.tiles(report.read(run)) if t.title == "certificate")


# -- what is told ---------------------------------------------------------------------------------


def test_the_largest_of_each_figure_is_told_with_its_round_and_module(tmp_path: Path) -> None:
    most = certificate(excess=0.25, worst="classifier.weight", start_excess=0.5)
    far = certificate(deviation=7e-8, start={"0": 1e-8, "3": 9e-8})
    run = certified(tmp_path / "a", certificate(), most, far)
    text = page(run).text
    assert "was 7.0e-08 of their change, in round 3" in text
    assert "largest excess was 0.25, in round 2, in classifier.weight." in text
    assert "client 3 began farthest from what it was sent, by 9.0e-08" in text
    assert "largest excess was 0.5, in round 2." in text
    assert "Nothing of that was above rounding." in text
    assert "ABOVE" not in text
    assert report.read(run).summary["max_certificate"] == 7e-8
    assert columns(run) == [("-", ""), ("3.0e-08", ""), ("3.0e-08", ""), ("7.0e-08", "")]
    assert tile(run)[1:] == ("7.0e-08", "within rounding", "")
    assert row(run) == "7.0e-08"


def test_each_client_that_began_off_is_listed_in_its_worst_round(tmp_path: Path) -> None:
    first = certificate(start={"0": 0.2, "1": 0.05, "2": 0.0}, start_excess=1e5)
    second = certificate(start={"0": 0.1, "1": 0.3, "2": 0.0}, start_excess=2e5)
    run = certified(tmp_path / "a", first, second, promise="approximate")
    shown = page(run)
    listed = next(t for t in shown.tables if t[0][-1] == "in round")
    assert listed[1:] == [["1", "8", "0.300", "2"], ["0", "4", "0.200", "1"]]
    assert "largest excess was 2e+05" in shown.text
    assert "a sketch or a cut leaves out" in shown.text


def test_clients_that_all_began_exactly_are_not_listed(tmp_path: Path) -> None:
    shown = page(certified(tmp_path / "a", certificate(start={"0": 0.0}, start_excess=0.0)))
    assert "every client began from exactly what it was sent" in shown.text
    assert "Clients that began farthest" not in shown.text
    run = certified(tmp_path / "b", certificate(start={"0": 0.0}, start_excess=None))
    assert "exactly what it was sent" not in page(run).text


def test_what_is_not_certified_is_listed_once_with_its_rounds(tmp_path: Path) -> None:
    one, other = "gate: not linear in its input", SILENT
    partly = certificate(not_certified=[one])
    run = certified(tmp_path / "a", partly, partly, silent(other), partly)
    listed = next(t for t in page(run).tables if t[0] == ["what", "in rounds"])
    assert listed[1:] == [[one, "1-2, 4"], [other, "3"]]
    assert row(run) == "3.0e-08, of 3 of 4 rounds"


def test_the_zero_of_a_round_that_was_not_certified_is_no_deviation(tmp_path: Path) -> None:
    run = certified(tmp_path / "a", silent(), silent())
    assert report.read(run).summary["max_certificate"] is None
    assert columns(run)[1:] == [("not certified", "")] * 2
    assert tile(run)[1:] == ("none", "not certified", "")
    assert row(run) == "not certified"
    text = page(run).text
    assert "no round was certified" in text
    assert "of their change" not in text


def test_that_the_numbers_left_the_clients_is_said(tmp_path: Path) -> None:
    run = certified(tmp_path / "a", certificate())
    told = dict(page(run).table("what"))
    assert told["Certificate"].startswith(f"{K} numbers of each module")
    assert told["Certificate"].endswith("and at its end")
    shared = certified(tmp_path / "b", certificate(), promise="shared")
    told = dict(page(shared).table("what"))
    assert told["Certificate"].startswith(f"{K} numbers of each block of rows of A")
    change(run, lambda rounds, *_: rounds[1].update(secure={"summed": 4}))
    assert "the sum alone" in dict(page(run).table("what"))["Certificate"]
    change(run, lambda rounds, *_: rounds[1]["certificate"].update(start={}, start_excess=None))
    assert "Certificate" not in dict(page(run).table("what"))


def test_a_run_without_certificates_has_no_word_of_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old", clients=4, rounds=2)
    before = page(run).source
    change(run, lambda rounds, *_: [r.update(certificate=None) for r in rounds])
    for source in (before, page(run).source):
        assert "ertif" not in source.split("</style>")[1]
    assert "ertif" not in table(run)
    assert report.read(run).summary["max_certificate"] is None


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("promise", ["exact", "shared", "approximate"])
@pytest.mark.parametrize("key", ["excess", "start_excess"])
@pytest.mark.parametrize("excess", [1.5, math.nan, math.inf, None])
def test_an_excess_above_1_is_a_fault_where_there_is_a_promise(
    tmp_path: Path, promise: str, key: str, excess: float | None
) -> None:
    wrong = certificate(**{key: excess})
    run = certified(tmp_path / "a", certificate(), wrong, promise=promise)
    told, broken = page(run).text, promise != "approximate"
    assert ("That is a fault: ABOVE ROUNDING in round 2." in told) == broken
    assert f"largest excess was {'1.5' if excess == 1.5 else 'infinite'}, in round 2" in told
    tone = "bad" if broken else ""
    assert columns(run)[1:] == [("3.0e-08", ""), ("3.0e-08", tone)]
    assert tile(run)[1:] == ("3.0e-08", "above rounding", tone)
    assert row(run) == "3.0e-08, above rounding"


def test_a_wrong_start_shows_in_a_round_that_is_not_certified(tmp_path: Path) -> None:
    run = certified(tmp_path / "a", silent(start_excess=7.0))
    assert "ABOVE ROUNDING in round 1." in page(run).text
    assert columns(run)[1] == ("not certified", "bad")
    assert row(run) == "above rounding, not certified"


@pytest.mark.parametrize("nothing", [math.nan, None])
def test_what_is_no_number_is_worse_than_any(tmp_path: Path, nothing: float | None) -> None:
    wrong = certificate(deviation=nothing, start={"0": 0.5, "2": nothing})
    run = certified(tmp_path / "a", wrong, certificate(deviation=9.0))
    shown = page(run)
    assert "was not a number of their change, in round 1" in shown.text
    assert "client 2 began farthest from what it was sent, by not a number" in shown.text
    assert columns(run)[1][0] == "not a number"
    assert math.isnan(report.read(run).summary["max_certificate"])
    assert (tile(run).value, row(run)) == ("nan", "nan")


def test_a_proof_that_is_no_number_is_the_largest_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", clients=2, rounds=2)

    def edit(rounds: Any, _: Any, summary: Any) -> None:
        rounds[1]["proof"]["deviation"] = None
        del summary["max_deviation"]

    assert math.isnan(report.read(change(run, edit)).summary["max_deviation"])


def test_no_starts_are_no_infinite_excess(tmp_path: Path) -> None:
    run = certified(tmp_path / "a", certificate(start={}, start_excess=None))
    assert row(run) == "3.0e-08"
    assert "Start:" not in page(run).text


def test_words_from_outside_are_escaped(tmp_path: Path) -> None:
    attack = '</td><script>alert("1")</script><img src=x onerror=alert(2)> & {{ 7 * 7 }}'
    hover = attack + '" onmouseover="x'
    found = certificate(worst=attack, layers={attack: 1e-8}, not_certified=[hover])
    run = certified(tmp_path / "a", found, silent(hover))
    shown = page(run)
    assert shown.tags.isdisjoint({"script", "img"})
    assert 'onmouseover="x' not in shown.source
    assert [hover, "1-2"] in next(t for t in shown.tables if t[0] == ["what", "in rounds"])
    assert f"in {attack}." in shown.text


def test_a_promise_that_no_proof_names_is_none(tmp_path: Path) -> None:
    """An approximate strategy under secure aggregation, killed: no proof, no summary."""
    run = certified(tmp_path / "a", certificate(excess=9.0), promise="approximate")
    change(run, lambda rounds, *_: [r.update(proof=None) for r in rounds])
    (run / "summary.json").unlink()
    assert "it cannot be told from sums alone" in page(run).text
    assert row(run) == "3.0e-08, above rounding"
    assert tile(run).tone == ""


def test_spans_of_rounds_read_as_people_write_them() -> None:
    assert spans([]) == ""
    assert spans([4]) == "4"
    assert spans([1, 1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


# -- a whole run ----------------------------------------------------------------------------------


def test_the_page_reads_what_the_server_writes(settings: Callable[..., Any]) -> None:
    ran = federate(settings(**quick("flexlora")))
    found = [r["certificate"] for r in ran.rounds[1:]]
    largest = max(c["deviation"] for c in found)
    off = max(x for c in found for x in c["start"].values())
    assert row(ran.directory) == f"{units.tiny(largest)}, above rounding"
    text = page(ran.directory).text
    assert f"was {units.tiny(largest)} of their change" in text
    assert f"by {units.tiny(off)} of the size" in text
    assert json.loads(json.dumps(report.read(ran.directory).summary))["max_certificate"] == largest
    assert lines(ran.directory)[0]["certificate"] is None
