"""Rows of `word-pairs`: is this gloss the word's own? Made from the nouns of WordNet 3.0.

    python wordnet.py DATA.NOUN      # of Debian's wordnet-base, /usr/share/wordnet/data.noun

writes word-pairs.tsv beside this file. The same input gives the same bytes.

A word is the first lemma of a synset: lower-case letters only, and in no other synset, so that no
other gloss is one of its own. A gloss is the synset's definition, up to its first semicolon, of 20
to 120 characters, without the word's first four letters. From each of FIELDS (WordNet's
lexicographer files) the PER_FIELD words with the smallest SHA-256 are taken. Every second one
keeps its gloss, "match"; the others of a field hand theirs on in a circle, "other": so a gloss that
does not match is still of the same field.

A word is in one row, and so is a gloss. So rows can be split anyhow, and no word or gloss is on
both sides.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

OUT = Path(__file__).parent / "word-pairs.tsv"
FIELDS = {
    4: "act", 5: "animal", 6: "artifact", 8: "body", 10: "communication",
    13: "food", 18: "person", 20: "plant", 26: "state", 27: "substance",
}  # fmt: skip
PER_FIELD = 300

Sense = tuple[str, str, int]
"""A word, its gloss, the number of its field."""


def senses(lines: list[str]) -> Iterator[Sense]:
    """What can be a row."""
    read = [(line.split(" "), line.partition(" | ")[2]) for line in lines if line[:1].isdigit()]
    in_synsets = Counter(w.lower() for fields, _ in read for w in set(lemmas(fields)))
    for fields, text in read:
        word, gloss = lemmas(fields)[0], definition(text)
        plain = re.fullmatch("[a-z]{3,}", word) and in_synsets[word] == 1
        if plain and 20 <= len(gloss) <= 120 and word[:4] not in gloss.lower():
            yield word, gloss, int(fields[1])


def lemmas(fields: list[str]) -> list[str]:
    return fields[4 : 4 + 2 * int(fields[3], 16) : 2]


def definition(text: str) -> str:
    return text.strip().partition(";")[0].strip()


def rows(lines: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """Field, word, gloss and label, field by field, as the top of this file says."""
    of_field: dict[int, dict[str, Sense]] = {number: {} for number in FIELDS}
    for sense in senses(lines):
        if sense[2] in FIELDS:
            of_field[sense[2]].setdefault(sense[1], sense)
    taken = set[str]()
    for number, name in FIELDS.items():
        found = [s for gloss, s in of_field[number].items() if gloss not in taken]
        found = sorted(found, key=lambda s: digest(s[0]))[:PER_FIELD]
        taken |= {gloss for _, gloss, _ in found}
        own, handed = found[::2], found[1::2]
        for word, gloss, _ in own:
            yield name, word, gloss, "match"
        for (word, _, _), (_, gloss, _) in zip(handed, handed[1:] + handed[:1], strict=True):
            yield name, word, gloss, "other"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main(path: str) -> None:
    lines = Path(path).read_text("latin-1").splitlines()
    found = [("field", "word", "gloss", "label"), *rows(lines)]
    OUT.write_text("".join("\t".join(row) + "\n" for row in found))


if __name__ == "__main__":
    main(sys.argv[1])
