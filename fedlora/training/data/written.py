"""Names that people write in more than one way, and characters that nobody sees."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal

WHOLE = re.compile(r"[-+\u2212]?\d+(\.0*)?\s?%?")
NUMBER = re.compile(r"[-+\u2212]?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d{1,3})?\s?%?")

MARKS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4`", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"')
    | {"_": " ", "\u2212": "-"}
)
"""Quotation marks, apostrophes, spaces and minus signs in one form each."""


def size(number: str) -> Decimal:
    """Of a number with a point, or with a comma as some languages write it; of a percentage too."""
    return Decimal(number.rstrip("% \u00a0").replace(",", ".").replace("\u2212", "-"))


def trimmed(name: str) -> str:
    """The name without space, control and format characters at its ends."""
    at = [i for i, c in enumerate(name) if not (c.isspace() or _unseen(c))]
    return name[at[0] : at[-1] + 1] if at else ""


def shown(name: str) -> str:
    """The name for a message, or a config: what would not be seen is written as JSON writes it."""
    return "".join(
        json.dumps(c)[1:-1] if _unseen(c) or (c.isspace() and c != " ") else c for c in name
    )


def _unseen(c: str) -> bool:
    """Is it a control or format character, which takes no place?"""
    return unicodedata.category(c) in ("Cc", "Cf")


def folded(name: str) -> str:
    """The name in one of the forms that people write it in: without what is not seen, and with one
    case, space, dash, apostrophe and number for all."""
    seen = "".join(c for c in name if c.isspace() or not _unseen(c))
    seen = "".join("-" if unicodedata.category(c) == "Pd" else c for c in seen.translate(MARKS))
    text = " ".join(unicodedata.normalize("NFKC", seen).split()).casefold()
    if NUMBER.fullmatch(text):
        return f"{size(text).normalize() + 0:f}{'%' * text.endswith('%')}"
    return text


def bare(name: str) -> str:
    """The letters, digits and signs of a folded name, without their accents; a number whole."""
    text = folded(name)
    if NUMBER.fullmatch(text):
        return text
    whole = unicodedata.normalize("NFKD", text)
    return "".join(c for c in whole if c.isalnum() or unicodedata.category(c) == "Sm")


def near(count: Counter[str]) -> list[list[str]]:
    """The names that are one when folded, the most common of each first."""
    return _together(count, folded)


def alike(names: Iterable[str]) -> list[list[str]]:
    """The names that differ in accents and punctuation alone."""
    return [x for x in _together(Counter(names), bare) if bare(x[0])]


def _together(count: Counter[str], form: Callable[[str], str]) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for name in count:
        found.setdefault(form(name), []).append(name)
    groups = [sorted(names, key=lambda x: (-count[x], len(x), x)) for names in found.values()]
    return sorted(names for names in groups if len(names) > 1)


def told(groups: list[list[str]], count: Counter[str]) -> str:
    """The first of these groups, with the rows of each name."""
    return "; ".join(
        ", ".join(f'"{shown(x)}" ({count[x]} rows)' for x in names) for names in groups[:5]
    )
