"""What a run chooses by is scored after every round, on the validation rows and on no test row."""

from collections.abc import Callable
from typing import Any

import pytest

from fedlora.reports import report, tables
from fedlora.reports.run_files import read
from fedlora.training import cache
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
VALIDATES = {"data.validation-size": 20, "run.rounds": 3}


def test_validation_rows_are_scored_after_every_round(settings: Settings) -> None:
    given = settings(**quick("fedex", **VALIDATES))
    ran = federate(given)
    assert [r["validation"]["examples"] for r in ran.rounds] == [20, 20, 20, 20]
    assert [r["evaluation"] for r in ran.rounds] == [None] * 4
    losses = [r["validation"]["loss"] for r in ran.rounds]
    assert len(set(losses)) == 4
    assert ran.summary["rows"]["validation"]
    report.write(ran.directory)
    grid = tables.rounds(read(ran.directory))
    assert "validation" in grid.head
    assert grid.rows[0][grid.head.index("validation")].text != "-"


def test_a_run_without_them_has_no_word_of_them(settings: Settings) -> None:
    ran = federate(settings(**quick("fedex")))
    assert not any("validation" in r for r in ran.rounds)
    assert "validation" not in ran.summary["rows"]
    assert "validation" not in tables.rounds(read(ran.directory)).head


def test_where_the_report_shows_no_test_by_round_none_is_read_before_the_end(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """evaluate.every = run.rounds: round 0, and the end; between them validation rows alone."""
    asked, real = list[str](), cache.encoded

    def encoded(part: str, *rest: Any) -> Any:
        if part in cache.CENTRAL:
            asked.append(part.rpartition(" ")[2])
        return real(part, *rest)

    monkeypatch.setattr(cache, "encoded", encoded)
    federate(settings(**quick("fedex", **VALIDATES, **{"evaluate.every": 3})))
    before, by_round, last = asked[:2], asked[2:4], asked[4:]
    assert before == ["central", "validation"]
    assert by_round == ["validation"] * 2
    assert {*last} == {"central", "validation"}, "round 3, and the result with its parts"


def test_the_same_rows_are_chosen_by_with_other_evaluations(settings: Settings) -> None:
    one = federate(settings(**quick("fedex", **VALIDATES)))
    two = federate(
        settings(**quick("fedex", **VALIDATES, **{"evaluate.every": 1, "run.name": "b"}))
    )
    assert [r["validation"] for r in one.rounds] == [r["validation"] for r in two.rounds]
    assert one.adapter == two.adapter
