"""Rows of `chat` and `preference`: questions and answers of ChatterBot's English corpus.

    python chatterbot.py DIRECTORY      # chatterbot_corpus/data/english of chatterbot-corpus 1.3.3

writes chatterbot-train.tsv and chatterbot-test.tsv beside this file. The same input gives the same
bytes.

A row is the first two turns of a conversation, its topic the name of the file. Taken are turns of 2
to 80 characters without a line break, the first of each question and of each answer (case aside),
the MOST of a topic with the smallest SHA-256, and topics of FEWEST and more. The topics of TEST
are in the test file, with all that they say; so nothing is on both sides.

`rejected` is another topic's answer of the same file. Each answer is the chosen one of one row and
the rejected one of another: nothing of an answer alone says which it is, and a model must read the
question.
"""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

OUT = Path(__file__).parent
TEST = ("food", "literature", "movies", "politics")
MOST, FEWEST = 16, 8

Said = tuple[str, str, str]
"""A topic, a question, its answer."""


def pairs(directory: Path) -> Iterator[Said]:
    """What can be a row, file by file."""
    asked, answered = set[str](), set[str]()
    for file in sorted(directory.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text("utf-8"))["conversations"]:
            question, answer = (str(turn).strip() for turn in turns[:2])
            short = all(2 <= len(x) <= 80 and x.isprintable() for x in (question, answer))
            if short and question.lower() not in asked and answer.lower() not in answered:
                asked.add(question.lower())
                answered.add(answer.lower())
                yield file.stem, question, answer


def by_topic(found: Iterator[Said]) -> dict[str, list[Said]]:
    topics = defaultdict(list)
    for said in found:
        topics[said[0]].append(said)
    return {
        topic: sorted(rows, key=lambda x: hashlib.sha256(x[1].encode()).hexdigest())[:MOST]
        for topic, rows in topics.items()
        if len(rows) >= FEWEST
    }


def with_rejected(topics: Sequence[Sequence[Said]]) -> Iterator[tuple[str, str, str, str]]:
    """Topic, prompt, chosen and rejected answers.

    Rows lie topic by topic and each takes the answer that lies as many rows on as the largest
    topic has. That is of another topic, as long as no topic has more than half of all rows.
    """
    rows, step = [said for rows in topics for said in rows], max(map(len, topics))
    assert 2 * step <= len(rows)
    for i, said in enumerate(rows):
        yield *said, rows[(i + step) % len(rows)][2]


def main(directory: str) -> None:
    topics = by_topic(pairs(Path(directory)))
    for side in ("train", "test"):
        mine = [rows for topic, rows in topics.items() if (topic in TEST) == (side == "test")]
        found = [("topic", "prompt", "chosen", "rejected"), *with_rejected(mine)]
        text = "".join("\t".join(row) + "\n" for row in found)
        (OUT / f"chatterbot-{side}.tsv").write_text(text, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
