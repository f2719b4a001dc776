"""Rows of `names`: sentences made from templates, with real names of WordNet 3.0 in them.

    python names.py DATA.NOUN      # of Debian's wordnet-base, /usr/share/wordnet/data.noun

writes names-train.jsonl and names-test.jsonl beside this file. The sentences are generated, and no
text that anybody wrote; the names are not. The same input gives the same bytes.

A name is the first lemma of a synset that is an instance of another ("@i"), of one to three words
of letters, in one of TYPES (WordNet's lexicographer files). A word belongs to the test with one
chance in five, by its SHA-256; a name is of the test if all its words are, and of the training rows
if none is. So no word of a name is on both sides, and neither is a template: of each genre the last
two are the test's. Each name is in one row, but events, of which there are few.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path

OUT = Path(__file__).parent
TYPES = {18: "person", 15: "place", 4: "event"}
ROWS = {"train": 80, "test": 30}
"""Of a genre."""
KEPT = {"train": slice(None, -2), "test": slice(-2, None)}
"""The templates of a side."""
GENRES = {
    "history": (
        "After EVENT the people of PLACE built a monument to PERSON .",
        "PERSON was born near PLACE and wrote a long account of EVENT .",
        "Few letters of PERSON have survived .",
        "The treaty that followed EVENT was signed in PLACE .",
        "PLACE changed hands twice before PERSON arrived .",
        "Historians still argue whether PERSON took part in EVENT .",
        "During EVENT a messenger left PLACE with a letter for PERSON .",
        "What PERSON knew of EVENT is told in one chronicle only .",
    ),
    "travel": (
        "We took the night train to PLACE and slept until noon .",
        "The road from PLACE to PLACE is closed in winter .",
        "In PLACE they sell postcards with the face of PERSON on them .",
        "Our guide told us about EVENT while we waited for the bus .",
        "Do not leave PLACE without seeing the old bridge .",
        "The house in which PERSON lived is now a small hotel .",
        "From the tower one sees as far as PLACE on clear days .",
        "A ferry leaves PLACE every morning , and on board hangs a portrait of PERSON .",
    ),
    "school": (
        "Next week the class reads a play by PERSON .",
        "Find PLACE on the map and colour it green .",
        "The exam asks for the year of EVENT and the name of its victor .",
        "My essay compares PERSON with PERSON .",
        "Our teacher grew up in PLACE and never tires of telling us so .",
        "Which rivers flow past PLACE ?",
        "Write two pages on PERSON and hand them in by Monday .",
        "The film about EVENT was shot in PLACE .",
    ),
    "museum": (
        "The second room shows drawings that PERSON made in PLACE .",
        "A coin found in PLACE shows a man who may be PERSON .",
        "This painting of EVENT was cut from its frame and stolen .",
        "The collection was a gift of friends of PERSON .",
        "Visitors from PLACE enter free on the day of EVENT .",
        "The bust of PERSON has lost its nose .",
        "Upstairs are maps of PLACE that nobody has dated .",
        "A soldier who saw EVENT carved this box for PERSON .",
    ),
    "letters": (
        "Dear friend , I am writing to you from PLACE .",
        "Yesterday I met a man who looked just like PERSON .",
        "Father talks of EVENT as if he had been there .",
        "If you come to PLACE , bring the book by PERSON .",
        "It has rained in PLACE since you left .",
        "PERSON , I think , would have laughed at us .",
        "We named the cat PERSON and the dog PLACE .",
        "Grandmother remembers nothing of EVENT and everything about PLACE .",
    ),
}  # fmt: skip

Row = Mapping[str, str | Sequence[str]]


def names(lines: Sequence[str]) -> dict[str, dict[str, list[list[str]]]]:
    """By side and type, each name as its words, in the order of their SHA-256."""
    found: dict[str, dict[str, list[list[str]]]] = {
        side: {kind: [] for kind in TYPES.values()} for side in ROWS
    }
    for line in sorted(lines, key=digest):
        fields = line.split(" ")
        if not line[:1].isdigit() or int(fields[1]) not in TYPES or " @i " not in line:
            continue
        words = fields[4].split("_")
        plain = all(re.fullmatch("[A-Za-z]{2,}", word) for word in words)
        sides = {side_of(word) for word in words}
        if plain and words[0][0].isupper() and len(words) <= 3 and len(sides) == 1:
            mine = found[sides.pop()][TYPES[int(fields[1])]]
            if words not in mine:
                mine.append(words)
    return found


def side_of(word: str) -> str:
    return "test" if int(digest(word.lower()), 16) % 5 == 0 else "train"


def rows(lines: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """The side of each row, and the row: its genre, its words, and their tags (IOB2)."""
    for side, kinds in names(lines).items():
        left = {kind.upper(): cycle(found) for kind, found in kinds.items()}
        for genre, templates in GENRES.items():
            mine = cycle(templates[KEPT[side]])
            for template, _ in zip(mine, range(ROWS[side]), strict=False):
                words, tags = list[str](), list[str]()
                for part in template.split():
                    name = next(left[part]) if part in left else [part]
                    kind = part.lower() if part in left else ""
                    words += name
                    tags += [
                        f"{'I' if i else 'B'}-{kind}" if kind else "O" for i in range(len(name))
                    ]
                yield side, {"genre": genre, "words": words, "tags": tags}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main(path: str) -> None:
    found = [*rows(Path(path).read_text("latin-1").splitlines())]
    for side in ROWS:
        text = "".join(json.dumps(row) + "\n" for s, row in found if s == side)
        (OUT / f"names-{side}.jsonl").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
