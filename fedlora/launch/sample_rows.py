"""Generated rows of each form that `fedlora init` writes: nobody's, and easy to learn."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
ROWS = 400

THINGS = {
    "kitchen": ["pan", "oven", "kettle", "spoon", "plate"],
    "garden": ["spade", "hedge", "rose", "lawn", "pond"],
    "office": ["desk", "printer", "folder", "stapler", "chair"],
}
SAID = ["The {} is broken again.", "I would like a new {}.", "Where did you put the {}?",
        "My {} arrived today.", "Who left the {} outside?", "That {} is too small."]  # fmt: skip
WHEN = ["today", "this morning", "since Monday", "in May", "last week", "as always", "by noon"]
PRAISE = {"awful": 1, "poor": 2, "fair": 3, "good": 4, "superb": 5}
FIRST = ["Anna", "Boris", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas"]
LAST = ["Berg", "Costa", "Dahl", "Evans", "Fischer", "Garcia", "Holm", "Ivanov", "Jensen", "Kaya"]
TOWNS = ["Lisbon", "Oslo", "Vienna", "Dublin", "Porto", "Ghent", "Turin", "Basel", "Graz", "Lyon"]


def _sentence(chance: random.Random, place: str) -> str:
    said = chance.choice(SAID).format(chance.choice(THINGS[place]))
    return f"Note {chance.randint(1, 999)}, {chance.choice(WHEN)}: {said}"


def classes(chance: random.Random) -> Iterator[Row]:
    for place in _places(chance):
        yield {"text": _sentence(chance, place), "label": place}


def pairs(chance: random.Random) -> Iterator[Row]:
    """A note, and a room that it is of, or is not."""
    for n, place in enumerate(_places(chance)):
        room = place if n % 2 else _another(chance, place)
        first, second = _sentence(chance, place), f"It belongs in the {room}."
        yield {"first": first, "second": second, "label": "yes" if n % 2 else "no"}


def several(chance: random.Random) -> Iterator[Row]:
    for _ in range(ROWS):
        places = [place for place in THINGS if chance.random() < 0.5]
        sentences = [_sentence(chance, place) for place in places or ["office"]]
        yield {"text": " ".join(sentences), "label": places or ["office"]}


def numbers(chance: random.Random) -> Iterator[Row]:
    for place in _places(chance):
        word, stars = chance.choice([*PRAISE.items()])
        yield {"text": f"{_sentence(chance, place)} It is {word}.", "label": stars / 5}


def tagged(chance: random.Random) -> Iterator[str]:
    """Sentences of a word and its tag a line: who left what in which town."""
    for place in _places(chance):
        words = [(chance.choice(FIRST), "B-PER"), (chance.choice(LAST), "I-PER")]
        words = words[: chance.randint(1, 2)]
        words += [(word, "O") for word in ("left", "the", chance.choice(THINGS[place]), "in")]
        words += [(chance.choice(TOWNS), "B-LOC")]
        words += [(word, "O") for word in (*chance.choice(WHEN).split(), ",", "note")]
        words += [(str(chance.randint(1, 999)), "O")]
        yield "".join(f"{word}\t{tag}\n" for word, tag in words)


def answers(chance: random.Random) -> Iterator[Row]:
    for place in _places(chance):
        yield {"prompt": f"{_sentence(chance, place)}\nRoom:", "response": f" {place}"}


def chats(chance: random.Random) -> Iterator[Row]:
    """One or two questions each, with their answers."""
    for place in _places(chance):
        turns = []
        for room in [place, _another(chance, place)][: chance.randint(1, 2)]:
            turns.append({"role": "user", "content": f"{_sentence(chance, room)} Which room?"})
            turns.append({"role": "assistant", "content": f"The {room}."})
        yield {"messages": turns}


def preferences(chance: random.Random) -> Iterator[Row]:
    for place in _places(chance):
        asked, other = f"{_sentence(chance, place)}\nRoom:", _another(chance, place)
        yield {"prompt": asked, "chosen": f" {place}", "rejected": f" {other}"}


def _places(chance: random.Random) -> Iterator[str]:
    return (chance.choice([*THINGS]) for _ in range(ROWS))


def _another(chance: random.Random, place: str) -> str:
    return chance.choice([x for x in THINGS if x != place])
