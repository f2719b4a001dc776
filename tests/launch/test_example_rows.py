"""Rows of the examples that ship: what their scripts promise, of the files and of made-up input."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from fedlora.training.data.locate import locate
from tests.support.doc_tables import load
from tests.support.tiny_federation import ROOT

ROWS = ROOT / "simulations" / "rows"
Row = dict[str, str]

wordnet = load(ROWS / "wordnet.py", "rows_wordnet")
chatterbot = load(ROWS / "chatterbot.py", "rows_chatterbot")


def read(name: str) -> list[Row]:
    with open(locate(f"pkg:fedlora/simulations/rows/{name}"), encoding="utf-8", newline="") as f:
        return [*csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]


# -- words and glosses ----------------------------------------------------------------------------


def twice(rows: list[Row], column: str) -> list[str]:
    return [text for text, n in Counter(row[column] for row in rows).items() if n > 1]


def test_no_word_and_no_gloss_is_in_two_rows_so_that_no_split_leaks() -> None:
    rows = read("word-pairs.tsv")
    assert len(rows) == 3000
    assert twice(rows, "word") == twice(rows, "gloss") == []
    assert twice([*rows, rows[0]], "gloss") == [rows[0]["gloss"]]
    matching = [row for row in rows if row["label"] == "match"]
    assert not [r for r in matching if r["word"][:4] in r["gloss"].lower()]
    labels = Counter((row["field"], row["label"]) for row in rows)
    assert set(labels.values()) == {wordnet.PER_FIELD // 2}


def synset(n: int, field: int, words: str, gloss: str) -> str:
    lemmas = " ".join(f"{word} 0" for word in words.split())
    return f"{n:08} {field:02} n {len(words.split()):02x} {lemmas} 000 | {gloss}  "


def test_a_gloss_that_does_not_match_is_another_words_of_the_field() -> None:
    own = {"heron": "a wading bird with long legs", "otter": "a playful swimmer of the rivers",
           "viper": "a snake with hollow fangs", "gecko": "a lizard of the walls"}  # fmt: skip
    foods = {"bread": "what is baked of flour and water", "cider": "a drink made of pressed apples"}
    left = [("bank", "sloping land beside a body of water"), ("bank", "an institution for money"),
            ("Paris", "the capital of a country in Europe"), ("seal", "too short"),
            ("robin", "any of several robins of the woods")]  # fmt: skip
    senses = [(5, *x) for x in own.items()] + [(13, *x) for x in foods.items()]
    senses += [(5, *x) for x in left]
    lines = [synset(n, *sense) for n, sense in enumerate(senses)]
    rows = [*wordnet.rows(["  1 a licence line", *lines])]
    assert {word for _, word, _, _ in rows} == own.keys() | foods.keys()
    for field, word, gloss, label in rows:
        mine, others = (own, foods) if field == "animal" else (foods, own)
        assert gloss not in others.values()
        alone = field == "food" and label == "other"  # one of two: its circle is itself
        assert (gloss == mine[word]) is (label == "match" or alone)
    assert [*wordnet.rows(lines[::-1])] == rows, "the order of the input decides nothing"


# -- questions and answers ------------------------------------------------------------------------


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
