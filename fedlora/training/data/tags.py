"""Tags of words: which chunks they mark, and by which scheme.

    O            in no chunk
    B-X I-X      a chunk of type X: its first word and those after it         IOB2
    I-X          where its first word is a B only behind a chunk of its type  IOB1
    I-X E-X      its last word marked                                         IOE2
    B I E S      its last word marked, and one of a single word               IOBES
    B I L U      the same by other letters                                    BILOU

Of one type alone the tags are B and I.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

OUTSIDE = "O"
TAG = re.compile(r"O|[BIESLU](-.+)?", re.DOTALL)
SCHEMES = {"IOB2": "IOB", "IOE2": "IOE", "IOBES": "IOBES", "BILOU": "BILOU"}
"""seqeval's name of each scheme that the letters alone tell, and its letters; IOB1 has IOB2's."""


def type_of(tag: str) -> str:
    """Of "B-PER": "PER"; of one of another form, or without a type: ""."""
    return tag[2:] if TAG.fullmatch(tag) else ""


def renamed(tag: str, renames: Mapping[str, str]) -> str:
    """The tag by data.map, which names whole tags or types: PER=person makes B-PER B-person.

    A type whose new name is O, or empty, is in no chunk any more.
    """
    if tag in renames:
        return renames[tag] or OUTSIDE
    if (new := renames.get(kind := type_of(tag))) is None or not kind:
        return tag
    return OUTSIDE if new in ("", OUTSIDE) else f"{tag[:2]}{new}"


def as_iobes(tag: str) -> str:
    """The tag with IOBES' letters for BILOU's L and U."""
    return {"L": "E", "U": "S"}.get(tag[:1], tag[:1]) + tag[1:]


def marks_chunks(tags: Collection[str]) -> bool:
    """Do these tags mark chunks? Those of parts of speech do not."""
    return any(tag != OUTSIDE for tag in tags) and all(map(TAG.fullmatch, tags))


def scheme_of(tags: Collection[str], sequences: Iterable[Sequence[str]]) -> str:
    """seqeval's name of the scheme: by the letters of all tags, and where these are B and I by how
    most chunks of the sequences begin. Empty: of no scheme that there is."""
    letters = {tag[0] for tag in tags} if marks_chunks(tags) else set()
    found = next((name for name, of in SCHEMES.items() if letters and letters <= set(of)), "")
    if found == "IOB2":
        begun, continued = beginnings(sequences)
        return "IOB2" if begun >= continued else "IOB1"
    return found


def beginnings(sequences: Iterable[Sequence[str]]) -> tuple[int, int]:
    """How many chunks begin as only IOB2 writes them, and how many as only IOB1 does.

    A B that stands behind no chunk of its type, and an I that does.
    """
    begun = continued = 0
    for tags in sequences:
        before = OUTSIDE
        for tag in tags:
            if tag != OUTSIDE and (before == OUTSIDE or type_of(before) != type_of(tag)):
                begun += tag[0] == "B"
                continued += tag[0] == "I"
            before = tag
    return begun, continued
