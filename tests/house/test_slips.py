"""The list of `make mutants`: every slip still has its place, and a test that is named for it."""

from collections import Counter

import pytest

from tests.support.mutants import ROOT, Mutant, mutants, table, tried

LISTED = mutants()

FIRST = {
    "one Poisson sample for all steps",
    "samples drawn from the run's seed",
    "dropout drawn from the run's seed",
    "the ledger is written after the training",
    "the probe of mixed examples is never called",
    "a fixed cohort accounted as if sampled",
    "masks of their own that everybody knows",
    "shares of an unauthenticated sender",
}
"""Those that the tests once did not see."""


@pytest.mark.parametrize("mutant", LISTED, ids=lambda m: m.name)
def test_a_slip_has_its_place_and_changes_it(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    planted = mutant.planted(text)
    assert planted != text
    compile(planted, mutant.file, "exec")
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file()
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text()


def test_there_are_enough_of_each_and_those_that_were_not_seen_are_among_them() -> None:
    names = [m.name for m in LISTED]
    about = Counter(m.about for m in LISTED)
    assert len(names) == len(set(names)) >= 40
    assert set(about) == {"privacy", "ledger", "protocol"}
    assert about["ledger"] + about["protocol"] >= 15
    assert set(names) >= FIRST


def test_a_slip_whose_place_is_gone_or_twice_is_broken_and_no_success(tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old in ("y = 1", "x = 1"):
        slip = Mutant("n", "privacy", "a.py", ((old, "z = 1"),), ())
        assert tried(tmp_path, slip).fate == "broken"
    assert (tmp_path / "a.py").read_text() == "x = 1\nx = 1\n"


def test_a_test_that_does_not_end_in_time_has_seen_no_slip(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tests.support.mutants.LONGEST", 0)
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "test_a.py").write_text("def test_x():\n    assert True\n")
    slip = Mutant("n", "privacy", "a.py", (("x = 1", "x = 2"),), ("test_a.py",))
    assert tried(tmp_path, slip).fate == "broken"


def test_a_slip_that_its_test_does_not_see_survives(tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "test_a.py").write_text("from a import x\n\ndef test_x():\n    assert x == 1\n")
    fates = {}
    for old, new in (("x = 1", "x = 3"), ("y = 2", "y = 4")):
        slip = Mutant(old, "privacy", "a.py", ((old, new),), ("test_a.py",))
        outcome = tried(tmp_path, slip)
        fates[old] = outcome.fate
        assert ("test_x" in outcome.by) == (old == "x = 1")
        assert "survived" in table([slip], {old: outcome}) or old == "x = 1"
    assert fates == {"x = 1": "killed", "y = 2": "survived"}
