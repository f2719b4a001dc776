"""Rows and examples by a task's name, as tests of data ask for them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedlora.config.sections import DataConfig
from fedlora.training.data import corpus
from fedlora.training.data.batches import Encoded
from fedlora.training.data.rows import ClientRows, Rows
from fedlora.training.tasks import task_of


def load(data: DataConfig, task: str, *args: Any, **more: Any) -> corpus.Corpus:
    return corpus.load(data, task_of(task), *args, **more)


def load_node(data: DataConfig, task: str, *args: Any, **more: Any) -> ClientRows:
    return corpus.load_node(data, task_of(task), *args, **more)


def load_calibration(data: DataConfig, task: str, *args: Any) -> Rows:
    return corpus.load_calibration(data, task_of(task), *args)


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    chat_template: bool = False,
    windows: bool = False,
) -> Encoded:
    """As a classification where there are label names, else as a language model's."""
    task = task_of("classification" if labels else "causal-lm")
    how = DataConfig(chat_template=chat_template, long_texts="windows" if windows else "cut")
    return task.encode(rows, tokenizer, labels, how, max_length)
