"""Writes the runs of tests/data/e8f4be2/, as they lay on disk at that commit.

    git worktree add --detach OLD e8f4be2
    PYTHONPATH=OLD:OLD/tests python tests/data/write_old_runs.py tests/data/e8f4be2

    base/  rows.jsonl        what all of them train, and on what
    names.json               every class and field that a checkpoint of that commit could hold
    stopped/<run>/           after round 2 of 4: config, rounds, checkpoint, client memory
    finished/<run>/          what the same commit left when it went on: adapter, clients, summary

Weights are multiples of 1/64 from a generator of integers, and training is plain SGD, so that
another processor comes to the same adapters but for rounding. Paths are relative to the directory.
"""

import dataclasses
import json
import os
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import CUES, LABELS, WORDS, write_tokenizer
from fedlora.adapter import Factors, Pair, Stack
from fedlora.journal import Member, Saved
from fedlora.server_opt import Moments
from strategy_federation import fitting, play
from tiny_federation import federate
from transformers import BertConfig, BertForSequenceClassification

from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import BaseLog, Client, Layer, Version

RUNS: dict[str, dict[str, object]] = {
    "fedex": {"strategy.name": "fedex"},
    "fedsb": {"strategy.name": "fedsb", "clients.ranks": "3"},
    "lora-a2": {"strategy.name": "lora-a2"},
    "fedsa": {"strategy.name": "fedsa"},
    "buffered": {
        "strategy.name": "fedavg",
        "clients.ranks": "3",
        "round.buffer": 2,
        "devices.classes": "fast:1:100,slow:0.5:40",
    },
    "fedadam": {"strategy.name": "fedavg", "clients.ranks": "3", "server.optimizer": "fedadam"},
    "pissa": {"strategy.name": "fedex", "lora.init": "pissa"},
}
SETTINGS: dict[str, object] = {
    "run.out": ".",
    "run.rounds": 4,
    "model.path": "base",
    "model.pooling": "default",
    "data.path": "rows.jsonl",
    "data.partition": "iid",
    "data.test-size": 12,
    "clients.count": 3,
    "clients.ranks": "2,3,4",
    "lora.layers": "",
    "lora.target-modules": "query,value,intermediate.dense",
    "train.batch-size": 4,
    "train.steps": 2,
    "train.lr": 0.2,
    "train.lr-schedule": "constant",
    "train.optimizer": "sgd",
    "train.precision": "float32",
    "train.threads": 1,
    "evaluate.baselines": False,
    "output.plots": False,
    "simulate.workers": 1,
}


def write_base(directory: Path) -> None:
    """A classifier of 8 hidden units, no dropout, and adapted layers that are not square."""
    config = BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=24, num_labels=len(LABELS),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    chance = random.Random(11)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "LayerNorm" in name:
                x.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                drawn = [chance.randrange(-32, 33) / 64 for _ in range(x.numel())]
                x.copy_(torch.tensor(drawn).reshape(x.shape))
    model.save_pretrained(str(directory))
    write_tokenizer(directory)


def write_rows(path: Path) -> None:
    chance = random.Random(3)
    rows = []
    for n in range(60):
        label = LABELS[n % 3]
        words = [chance.choice(WORDS) for _ in range(chance.randrange(1, 4))]
        text = " ".join([*words, chance.choice(CUES[label]), WORDS[n % 18], WORDS[n // 18]])
        rows.append({"text": text, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stop_after_two(server: Any) -> None:
    def started(number: int, cohort: list[int]) -> None:
        if number == 3:
            raise KeyboardInterrupt

    server.observer.round_started = started


def write_run(name: str, changes: Mapping[str, object]) -> None:
    """The run as it stopped, and as it ended; the working directory is where both lie."""
    given = {**SETTINGS, **changes, "run.name": name}
    try:
        federate(given, before=stop_after_two)
    except KeyboardInterrupt:
        before, last = sorted(Path(name, "checkpoint").iterdir())[-2:]
        assert last.name == "round-00002.safetensors"
        before.unlink()
    shutil.copytree(name, Path("stopped", name))
    federate({**given, "run.resume": True})
    for memory in ("checkpoint", "clients"):
        shutil.rmtree(Path(name, memory), ignore_errors=True)
    shutil.move(name, Path("finished", name))


def classes(tree: Any, found: dict[str, list[str]]) -> None:
    """Add the dataclasses in a tree, with their fields."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, tuple | list):
        for x in tree:
            classes(x, found)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = [f.name for f in dataclasses.fields(tree)]
        found[type(tree).__name__] = fields
        classes([getattr(tree, name) for name in fields], found)


def names() -> dict[str, dict[str, list[str]]]:
    """The classes with their fields that a tree of that commit could hold, of each strategy."""
    every = (Saved, Member, Moments, Factors, Pair, Stack, Version, BaseLog, Client, Layer)
    found = {"": {one.__name__: [f.name for f in dataclasses.fields(one)] for one in every}}
    for name, cls in STRATEGIES.items():
        strategy: Any = cls()
        *_, last = play(strategy, fitting(strategy), [(0, 1, 2), (3, 0)])
        classes(last.after, found.setdefault(name, {}))
    return found


def main() -> None:
    torch.set_num_threads(1)
    Path(sys.argv[1]).mkdir(parents=True)
    os.chdir(sys.argv[1])
    write_base(Path("base"))
    write_rows(Path("rows.jsonl"))
    Path("names.json").write_text(json.dumps(names(), indent=1) + "\n")
    Path("finished").mkdir()
    for name, changes in RUNS.items():
        write_run(name, changes)


if __name__ == "__main__":
    main()
