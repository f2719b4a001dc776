"""Rows of the examples that ship: what their scripts promise, of the files and of made-up input."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from fedlora.training.data.locate import locate
from tests.support.doc_tables import load
from tests.support.tiny_federation import ROOT

ROWS = ROOT / "simulations" / "rows"
Row = dict[str, str]

made_names = load(ROWS / "names.py", "rows_names")
chatterbot = load(ROWS / "chatterbot.py", "rows_chatterbot")


def read(name: str) -> list[Row]:
    with open(locate(f"pkg:fedlora/simulations/rows/{name}"), encoding="utf-8", newline="") as f:
        return [*csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]


# -- generated sentences with real names -----------------------------------------------------------

Sentence = dict[str, list[str]]


def sentences(side: str) -> list[Sentence]:
    with open(locate(f"pkg:fedlora/simulations/rows/names-{side}.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def split(rows: list[Sentence]) -> tuple[set[str], set[str]]:
    """The words of all names, lower case; and the sentences with a mark for each name."""
    words, templates = set(), set()
    for row in rows:
        both = [*zip(row["words"], row["tags"], strict=True)]
        words |= {word.lower() for word, tag in both if tag != "O"}
        marks = (word if tag == "O" else tag for word, tag in both if tag[0] != "I")
        templates.add(" ".join(marks))
    return words, templates


def test_no_word_of_a_name_and_no_template_is_on_both_sides() -> None:
    train, test = sentences("train"), sentences("test")
    assert (len(train), len(test)) == (400, 150)
    (names, templates), (others, unseen) = split(train), split(test)
    assert not names & others
    assert not templates & unseen
    assert len(templates | unseen) == sum(map(len, made_names.GENRES.values()))
    assert names & split([*test, train[0]])[0], "a row of the other side is seen"


def synset(field: int, lemma: str, pointer: str) -> str:
    return f"00000001 {field:02} n 01 {lemma} 0 001 {pointer} 00000002 n 0000 | a gloss  "


def test_names_are_instances_of_plain_words_and_their_tags_are_iob2() -> None:
    real = ["Ada", "Bly", "Cato", "Dora", "Edo", "Fry_Gil", "Hal", "Ivo_Jan_Kit", "Lea", "Moe"]
    lines = [synset(field, f"{lemma}{'abc'[n]}", "@i") for lemma in real
             for n, field in enumerate(made_names.TYPES)]  # fmt: skip
    odd = [synset(18, "heron", "@i"), synset(18, "Painter", "@"), synset(5, "Rex", "@i"),
           synset(18, "O'Hara", "@i"), synset(18, "A_B_C_D", "@i")]  # fmt: skip
    found = made_names.names([*lines, *odd])
    told = {"_".join(x) for kinds in found.values() for same in kinds.values() for x in same}
    assert told <= {f"{lemma}{x}" for lemma in real for x in "abc"}
    assert made_names.names([*odd, *lines[::-1]]) == found, "the order of the input decides nothing"
    for row in sentences("train"):
        for tag, before in zip(row["tags"], ["O", *row["tags"]], strict=False):
            assert tag[0] != "I" or before[1:] == tag[1:]


# -- questions and answers ------------------------------------------------------------------------


def twice(rows: list[Row], column: str) -> list[str]:
    return [text for text, n in Counter(row[column] for row in rows).items() if n > 1]


def slips(rows: list[Row]) -> list[str]:
    """What is wrong with the rejected answers of a file."""
    topics = {row["chosen"]: row["topic"] for row in rows}
    found = [f"of its own topic: {r}" for r in rows if topics.get(r["rejected"]) == r["topic"]]
    if Counter(r["chosen"] for r in rows) != Counter(r["rejected"] for r in rows):
        found.append("an answer is not once chosen and once rejected")
    return [*found, *twice(rows, "chosen"), *twice(rows, "prompt")]


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_rejected_answer_is_another_topics_and_each_is_chosen_once(side: str) -> None:
    rows = read(f"chatterbot-{side}.tsv")
    assert slips(rows) == []
    near = [{**row, "rejected": rows[i - 1]["chosen"]} for i, row in enumerate(rows)]
    assert "of its own topic" in slips(near)[0]
    assert "not once chosen" in slips([*rows[:-1], {**rows[-1], "rejected": "?"}])[0]


def test_the_test_topics_share_nothing_with_the_others() -> None:
    train, test = read("chatterbot-train.tsv"), read("chatterbot-test.tsv")
    assert {row["topic"] for row in test} == {*chatterbot.TEST}
    assert not {*chatterbot.TEST} & {row["topic"] for row in train}
    for column in ("prompt", "chosen", "rejected"):
        assert not {r[column].lower() for r in train} & {r[column].lower() for r in test}


def test_a_row_is_the_first_of_a_question_and_of_an_answer(tmp_path: Path) -> None:
    said = ["- - What is it?\n  - A bird.\n  - not read", "- - what is it?\n  - Another.",
            "- - W?\n  - a bird.", f"- - Y?\n  - {'x' * 81}", "- - When?\n  - '1963'"]  # fmt: skip
    (tmp_path / "birds.yml").write_text("conversations:\n" + "\n".join(said))
    assert [*chatterbot.pairs(tmp_path)] == [
        ("birds", "What is it?", "A bird."), ("birds", "When?", "1963"),
    ]  # fmt: skip
