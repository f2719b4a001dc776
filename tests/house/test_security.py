"""SECURITY.md promises nothing without a test that is there, or the words "not tested"."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.support.tiny_federation import ROOT

TEXT = (ROOT / "SECURITY.md").read_text()
PAIRS = TEXT.split("## How to read this")[1].split("\n## ")[2:]
"""What stands under each heading after the table of who sees what."""
NAME = re.compile(r"`(?:([\w/]+\.py)(?:::(test_\w+))?|(test_\w+))`")


def named(text: str) -> list[tuple[str, str]]:
    """(file, test) of each test that a text names; a bare name is of the file named before it."""
    found: list[tuple[str, str]] = []
    for file, test, alone in NAME.findall(text):
        found.append((file, test) if file else (found[-1][0] if found else "", alone))
    return found


@cache
def defined(file: str) -> set[str]:
    path = Path(ROOT, "tests", file)
    assert path.exists(), f"SECURITY.md names tests/{file}, which is not there"
    return {x.name for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.FunctionDef)}


def promises(text: str) -> list[str]:
    """The rows of a pair's table of promises, and each thing that it does not cover."""
    rows = [x for x in text.splitlines() if x.startswith("| ") and not x.startswith("| promised")]
    items = re.findall(r"^- (.+?)(?=^- |^\n|\Z)", text, re.M | re.S)
    return [*rows, *(" ".join(item.split()) for item in items)]


@pytest.mark.parametrize(("file", "test"), sorted(set(named(TEXT))))
def test_every_test_that_is_named_exists(file: str, test: str) -> None:
    assert file, f"{test}: of which file?"
    assert not test or test in defined(file)


def test_every_promise_and_every_gap_names_a_test_or_says_that_there_is_none() -> None:
    found = [x for pair in PAIRS for x in promises(pair)]
    assert len(found) > 50
    silent = [x for x in found if not named(x) and "not tested" not in x]
    assert silent == []


def test_every_pair_says_what_it_does_not_cover() -> None:
    assert [p.split("\n")[0] for p in PAIRS if "\nNot covered:\n" not in p] == []
    assert len(PAIRS) == 6


def test_a_promise_without_a_test_is_seen() -> None:
    assert named("| all is well | trust us |") == []
    assert named("`a/test_b.py::test_c`, `test_d`") == [
        ("a/test_b.py", "test_c"),
        ("a/test_b.py", "test_d"),
    ]
    assert promises("| x | y |\n\n- one\n  more\n- two\n") == ["| x | y |", "one more", "two"]
