"""The tables of the documentation, which tests hold the code to."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from tests.support.tiny_federation import ROOT

DOCS = ROOT / "docs"


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hook = load(DOCS / "hook.py", "docs_hook")


def table(page: Path, first: str) -> list[dict[str, str]]:
    """The rows of the page's table whose first column has this title; links as their text."""
    for _, head, _, rows in hook.tables(page.read_text()):
        names = [c.strip() for c in hook.cells(head)]
        if names[0] == first:
            plain = [re.sub(r"\[(.+?)\]\(.+?\)", r"\1", row) for row in rows]
            return [
                dict(zip(names, (c.strip() for c in hook.cells(r)), strict=True)) for r in plain
            ]
    raise AssertionError(f"{page.name} has no table of {first}")
