"""What the documentation says of papers: departures with reason and cost, claims with tests."""

import ast
import re
from pathlib import Path

import pytest

from fedlora.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "strategies"
SEEDS = PAGES / "seed-systems.md"
HEAD = ["here", "there", "why", "cost"]


def cells(line: str) -> list[str]:
    return [x.strip() for x in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def table(text: str) -> list[list[str]]:
    """The rows of the first table, its head first, its rule left out."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("|")), len(lines))
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append(cells(line))
    return [found[0], *found[2:]] if found else []


def section(page: str, name: str) -> str:
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return found[1] if found else ""


def faults(page: str) -> list[str]:
    """What is wrong with a page's account of its departures."""
    rows = table(section(page, "Differs"))
    if not rows or rows[0] != HEAD:
        return [f"no table of {HEAD} under Differs"]
    wrong = [row for row in rows[1:] if len(row) != len(HEAD) or not all(row)]
    return [f"a row of {len(row)} cells, or an empty one: {row[:1]}" for row in wrong] + (
        [] if rows[1:] else ["no row"]
    )


def slips(head: str, name: str) -> list[str]:
    """What is wrong with a file's own account of them: a list, and where the table is."""
    last = f"Reasons and costs: docs/strategies/{name}.md."
    listed = "\nDiffers from the paper" in head.removesuffix(last)
    return (
        [] if listed and head.endswith(f"\n{last}") else [f"{name}: no list that ends in {last!r}"]
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategys_page_and_file_say_where_it_departs_from_its_paper(name: str) -> None:
    assert not faults((PAGES / f"{name}.md").read_text())
    path = ROOT / "fedlora" / "strategies" / f"{name.replace('-', '_')}.py"
    head = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert not slips(head, name)


def test_a_departure_without_a_reason_or_a_cost_is_seen() -> None:
    """The counterexample."""
    rule = "|---|---|---|---|\n"
    whole = "## Differs\n\n| here | there | why | cost |\n" + rule
    assert not faults(whole + "| a | b | c | d |\n")
    assert faults(whole + "| a | b | c | |\n")
    assert faults(whole + "| a | b | c |\n")
    assert faults(whole)
    assert faults("## Differs\n\nFrom the paper: everything.\n")
    head = "X: a first line.\n\nDiffers from the paper: p_i.\n"
    assert not slips(f"{head}Reasons and costs: docs/strategies/x.md.", "x")
    assert slips(head.strip(), "x")
    assert slips(f"{head}Reasons and costs: docs/strategies/y.md.", "x")
    assert slips("X: a first line.\n\nReasons and costs: docs/strategies/x.md.", "x")


def names() -> dict[str, set[str]]:
    """The tests there are, by file."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        defined = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
        found[path.relative_to(ROOT).as_posix()] = {n for n in defined if n.startswith("test_")}
    return found


def lost(page: str, known: set[str]) -> list[str]:
    """Tests that a page names, and that there are not."""
    return sorted(set(re.findall(r"`(test_\w+)`", page)) - known)


def test_every_test_that_the_pages_of_strategies_name_exists() -> None:
    known = {test for tests in names().values() for test in tests}
    for page in sorted(PAGES.glob("*.md")):
        assert not lost(page.read_text(), known), page.name
    assert lost("see `test_that_nobody_wrote`", known) == ["test_that_nobody_wrote"]


def test_every_point_of_a_seed_system_has_its_file_and_its_test_or_says_that_it_is_open() -> None:
    page = SEEDS.read_text()
    systems = re.findall(r"^## (.+)$", page, re.M)
    for system in systems:
        rows = table(section(page, re.escape(system)))
        assert rows, system
        assert rows[0] == ["what the paper has", "here", "test", "open"], system
        for row in rows[1:]:
            assert len(row) == 4, (system, row)
            assert all(row), (system, row)
            for path in re.findall(r"`((?:fedlora|simulations|benchmarks)/[\w/.-]+)`", row[1]):
                assert (ROOT / path).exists(), path
            assert "`test_" in row[2] or row[2].startswith("none"), (system, row[0])
    assert len(systems) == 7
