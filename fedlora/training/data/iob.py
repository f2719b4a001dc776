"""Files of one word a line, with its tag: IOB, as the CoNLL tasks have them.

    EU NNP B-NP B-ORG
    rejects VBZ B-VP O

    Peter NNP B-NP B-PER

A blank line stands between sentences. Columns stand between tabs where the line has one, else
between spaces: the word is the first, its tag the last. A no-break space is a letter of its word.
Lines of -DOCSTART- are none of a sentence, and neither are comments before one, "# id 7 domain=en".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LINE_END = re.compile(r"\r\n|\r|\n")


TAGGED = re.compile(r"-DOCSTART-|\S+[ \t](\S+[ \t])*([BI]-\S+|O)[ \t]*$")


@dataclass(frozen=True, slots=True)
class Sentences:
    """What a file holds."""

    words: list[list[str]]
    tags: list[list[str]]
    lines: list[int]
    """In which each sentence begins, from 1."""


def read_iob(text: str) -> Sentences:
    """The sentences of such a file.

    Raises:
        ValueError: a line has another number of columns than the first, or one alone; says which.
            Or the first column holds no words but their numbers.
    """
    found = Sentences([], [], [])
    inside, width = False, 0
    for number, line in enumerate(LINE_END.split(text), 1):
        cells = _cells(line)
        if not line.strip() or cells[0] == "-DOCSTART-":
            inside = False
            continue
        if not inside and cells[0] == "#" and "=" in cells[-1]:
            continue
        width = width or len(cells)
        if len(cells) != width or width < 2:
            raise ValueError(
                f"line {number}: it has {len(cells)} columns, must be "
                f"{width if width > 1 else 'two or more'}, a word first and its tag last: "
                f"{line[:60]!r}"
            )
        if not inside:
            found.words.append([])
            found.tags.append([])
            found.lines.append(number)
        inside = True
        found.words[-1].append(cells[0])
        found.tags[-1].append(cells[-1])
    if any(len(row) > 1 for row in found.words) and any(_numbered(found.words, n) for n in (0, 1)):
        raise ValueError(
            "its first column numbers the words of each sentence, as CoNLL-U has it: write each "
            "line with the word first and its tag last"
        )
    return found


def _numbered(words: Sequence[Sequence[str]], first: int) -> bool:
    """Are these the numbers of places, counted from `first`?"""
    return all(list(row) == [str(n + first) for n in range(len(row))] for row in words)


def _cells(line: str) -> list[str]:
    """The columns of a line, by tabs where it has one, else by common spaces and by no others."""
    if "\t" in line:
        return [cell.strip(" ") for cell in line.split("\t")]
    return [cell for cell in line.split(" ") if cell]


def looks_iob(text: str) -> bool:
    """Does a text begin as such a file does?"""
    return bool(TAGGED.match(LINE_END.split(text.lstrip(), maxsplit=1)[0]))
