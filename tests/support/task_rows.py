"""A tiny federation for each task: made-up rows and the settings that read them.

A new task is a line in MADE; the contract in tests/training/test_every_task.py then asks it all.
"""

import io
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedlora.config.task_names import KINDS
from fedlora.training.data.pictures import as_text
from tests.conftest import CUES, LABELS, WORDS
from tests.support.architectures import write

Row = Mapping[str, Any]
ROWS = 90


def words(chance: random.Random, n: int) -> str:
    """A text of two to six words, and two that no other row has."""
    found = [chance.choice(WORDS) for _ in range(chance.randint(2, 6))]
    return " ".join([*found, WORDS[n % 18], WORDS[n // 18]])


def classes(chance: random.Random) -> Iterator[Row]:
    for n in range(ROWS):
        label = LABELS[n % 3]
        yield {"text": f"{chance.choice(CUES[label])} {words(chance, n)}", "label": label}


def pairs(chance: random.Random) -> Iterator[Row]:
    for n in range(ROWS):
        first, other = chance.choice(WORDS), chance.choice(WORDS)
        second = first if n % 2 else other
        label = "same" if first == second else "other"
        yield {"text": f"{first} {words(chance, n)}", "second": second, "label": label}


def several(chance: random.Random) -> Iterator[Row]:
    for n in range(ROWS):
        labels = [label for label in LABELS if chance.random() < 0.5]
        cues = [chance.choice(CUES[label]) for label in labels]
        yield {"text": " ".join([*cues, words(chance, n)]), "label": labels}


def numbers(chance: random.Random) -> Iterator[Row]:
    for n in range(ROWS):
        text = words(chance, n)
        yield {"text": text, "label": sum(w in CUES["colour"] for w in text.split()) + 0.5}


def answers(chance: random.Random) -> Iterator[Row]:
    for n in range(ROWS):
        label = LABELS[n % 3]
        text = f"{chance.choice(CUES[label])} {words(chance, n)}"
        yield {"text": text, "response": f" {label}"}


def rewritten(chance: random.Random) -> Iterator[Row]:
    """One to three words to write of each text."""
    for n in range(ROWS):
        label = LABELS[n % 3]
        text = f"{chance.choice(CUES[label])} {words(chance, n)}"
        yield {"text": text, "response": " ".join([label, *["two"] * chance.randint(0, 2)])}


def chats(chance: random.Random) -> Iterator[Row]:
    for n in range(ROWS):
        turns = [{"role": "user", "content": words(chance, n)}]
        for k in range(chance.randint(1, 2)):
            label = LABELS[(n + k) % 3]
            said = {"role": "user", "content": f"{chance.choice(CUES[label])} is the"}
            turns += [*([said] if k else []), {"role": "assistant", "content": label}]
        yield {"messages": turns}


def preferences(chance: random.Random) -> Iterator[Row]:
    for n in range(ROWS):
        label, other = LABELS[n % 3], LABELS[(n + chance.randint(1, 2)) % 3]
        text = f"{chance.choice(CUES[label])} {words(chance, n)}"
        longer = f" {label}{' two' * chance.randint(0, 2)}"
        yield {"text": text, "chosen": longer, "rejected": f" {other}"}


def entities(chance: random.Random) -> Iterator[Row]:
    """Words of a kind are entities, some of two words; "is-the" is cut into three pieces."""
    kinds = {word: kind for kind, cues in CUES.items() for word in cues}
    for n in range(ROWS):
        found: list[tuple[str, str]] = []
        for word in [*words(chance, n).split(), chance.choice(CUES[LABELS[n % 3]])]:
            kind = kinds.get(word, "")
            found.append((word, f"B-{kind}" if kind else "O"))
            if kind and chance.random() < 0.4:
                found.append(("is-the", f"I-{kind}"))
        yield {"text": [word for word, _ in found], "label": [tag for _, tag in found]}


def pictures(chance: random.Random) -> Iterator[Row]:
    """Noise in which one colour is the strongest, as PNG in the cells of a text file."""
    for n in range(ROWS):
        pixels = bytearray(chance.randrange(120) for _ in range(16 * 16 * 3))
        for i in range(n % 3, len(pixels), 3):
            pixels[i] += 100
        file = io.BytesIO()
        Image.frombytes("RGB", (16, 16), bytes(pixels)).save(file, "PNG")
        yield {"image": as_text(file.getvalue()), "label": ("red", "green", "blue")[n % 3]}


MADE: Mapping[str, tuple[str, str, Callable[[random.Random], Iterator[Row]], Row]] = {
    "classification": ("classification", "bert", classes, {}),
    "pairs": ("classification", "bert", pairs, {"data.text-pair": "second"}),
    "multi-label": ("multi-label", "bert", several, {}),
    "regression": ("regression", "bert", numbers, {}),
    "tokens": ("token-classification", "bert", entities, {}),
    "causal-lm": ("causal-lm", "gpt2", answers, {"data.prompt": "text"}),
    "chat": ("causal-lm", "gpt2", chats, {"data.messages": "messages"}),
    "seq2seq": ("seq2seq", "t5", rewritten, {"data.prompt": "text"}),
    "bart": ("seq2seq", "bart", rewritten, {"data.prompt": "text"}),
    "preference": (
        "preference",
        "gpt2",
        preferences,
        {"data.prompt": "text", "data.response": "chosen"},
    ),
    "pictures": ("image-classification", "vit", pictures, {}),
}
"""By name of the case: the task, the model's kind, its rows, and what else is to be set."""


def task_settings(
    settings: Callable[..., dict[str, object]], case: str, directory: Path, **changes: object
) -> dict[str, object]:
    """The settings of a run of this case, its rows in a file of the directory."""
    task, kind, rows, more = MADE[case]
    for package in KINDS[task].needs:
        pytest.importorskip(package)
    path = directory / f"{case}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(random.Random(5))))
    given = {"model.task": task, "data.path": str(path), "data.prompt": "", **more}
    if kind in WRITERS:
        name, targets = WRITERS[kind]
        given |= {"model.path": str(write(kind, directory / kind, name)),
                  "lora.target-modules": targets}  # fmt: skip
        kind = "bert"
    if "data.messages" in more:
        model = directory / "with-template"
        shutil.copytree(str(settings(kind)["model.path"]), model, dirs_exist_ok=True)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        given["model.path"] = str(model)
    return settings(kind, **{**given, **changes})


WRITERS = {
    "t5": ("T5ForConditionalGeneration", "q,v,wo"),
    "bart": ("BartForConditionalGeneration", "q_proj,v_proj,fc1"),
}
"""Encoder-decoders: what they are saved as, and modules of both halves, some of them not square."""

TEMPLATE = (
    "{% for m in messages %}{{ 'what' if m.role == 'user' else 'is' }} {{ m.content }} [EOS] "
    "{% endfor %}{% if add_generation_prompt %}is{% endif %}"
)
"""A chat template of words that the tiny tokenizer knows."""
