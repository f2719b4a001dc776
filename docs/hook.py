"""What mkdocs is told of pages that come later: the nav's patterns, and rows of result tables.

mkdocs calls the two functions by their names. In a page,

    <!-- pages of results/ -->   becomes a list of docs/results/*.md
    <!-- rows of results/ -->    becomes their tables' rows whose "strategy" is the page's

so a result page that is added, or measured anew, is linked and quoted without another edit.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
LIST, ROWS = "<!-- pages of results/ -->", "<!-- rows of results/ -->"


def on_config(config: Any) -> Any:
    """The nav with each pattern replaced by the pages that no line names; empty sections go."""
    config.nav = [x for x in expanded(config.nav, set(named(config.nav))) if x]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with its results in place."""
    source = Path(page.file.src_uri)
    if LIST in markdown:
        markdown = markdown.replace(LIST, "\n".join(listed(results())))
    if ROWS in markdown:
        found = "\n\n".join(rows_of(source.stem, results()))
        markdown = markdown.replace(ROWS, found or "No table has it yet.")
    return markdown


# -- the nav ------------------------------------------------------------------------------------


def named(nav: Any) -> Iterator[str]:
    """Every page and pattern of a nav, however deep."""
    for item in nav:
        if isinstance(item, str):
            yield item
        else:
            for below in item.values():
                yield from [below] if isinstance(below, str) else named(below)


def expanded(nav: list[Any], taken: set[str]) -> Iterator[Any]:
    for item in nav:
        if isinstance(item, dict):
            ((title, below),) = item.items()
            inside = below if isinstance(below, str) else list(expanded(below, taken))
            yield {title: inside} if inside else None
        elif "*" not in item:
            yield item
        else:
            found = (p.relative_to(DOCS).as_posix() for p in sorted(DOCS.glob(item)))
            yield from (page for page in found if page not in taken)


# -- results ------------------------------------------------------------------------------------


def results() -> list[Path]:
    pages = sorted((DOCS / "results").glob("*.md"))
    return [p for p in pages if p.name != "index.md"]


def title_of(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else "Untitled"


def listed(pages: list[Path]) -> Iterator[str]:
    for path in pages:
        yield f"- [{title_of(path.read_text(encoding='utf-8'))}]({path.name})"


def rows_of(strategy: str, pages: list[Path]) -> Iterator[str]:
    """A table for each table of the pages that has the strategy, under a link to where it is."""
    for path in pages:
        text = path.read_text(encoding="utf-8")
        for heading, head, rule, rows in tables(text):
            names = [cell.strip(" `*") for cell in cells(head)]
            if "strategy" not in names:
                continue
            at = names.index("strategy")
            mine = [row for row in rows if cells(row)[at].strip(" `*") == strategy]
            if mine:
                title = f"[{title_of(text)}](../results/{path.name})"
                title += f", {heading}" if heading else ""
                yield f"{title}:\n\n" + "\n".join([head, rule, *mine])


def tables(text: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """(nearest heading below the title, head, rule, rows) of each table of a page."""
    heading, table = "", list[str]()
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if len(table) > 2:
            yield heading, table[0], table[1], table[2:]
        table = []
        if line.startswith("##"):
            heading = line.lstrip("# ")


def cells(row: str) -> list[str]:
    return row.strip().strip("|").split("|")
