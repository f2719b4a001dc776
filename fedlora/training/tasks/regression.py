"""A number a text, or a pair of texts: similarity, sentiment, a grade.

    loss of an example     (z - y)^2 of its one output z and its number y
    scores                 loss (the mean square), mae (the mean |z - y|), pearson and spearman
                           (nan where all predictions, or all numbers, are equal)

Numbers are learned as they are: far from 0, or in the thousands, they are better divided first.
Reads data.text, data.text-pair and data.label, a column of numbers with a point or a comma.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training import metrics
from fedlora.training.data.batches import SYNTHETIC, Batch, Encoded, inputs_of, synthetic
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.labels import as_label
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table, column
from fedlora.training.data.written import NUMBER, size
from fedlora.training.devices import sent
from fedlora.training.tasks.base import Columns, Features, Needed, Net, Scores
from fedlora.training.tasks.outputs import outputs, own_loss, own_scores
from fedlora.training.tasks.parts import Parts, of_numbers
from fedlora.training.tasks.texts import by_example, encoded_texts, texts_of, two_texts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Regression:
    """See the top of this file."""

    name = "regression"
    predicts = "numbers"
    auto = "AutoModelForSequenceClassification"
    what = "sequence classifier"
    peft = "SEQ_CLS"
    hub = "text-classification"
    headed = pooled = True
    answers = generates = pictured = shifted = False

    def read(
        self, table: Table, where: str, data: DataConfig, renames: Mapping[str, str]
    ) -> Columns:
        read = [as_label(x) for x in column(table, where, "data.label", data.label)]
        numbers = [
            _number(x, f"{where}, {table.unit} {line},", data.label)
            for x, line in zip(read, table.lines, strict=True)
        ]
        _tell_commas(read, where, data.label)
        texts = texts_of(table, where, data)
        needed = [*texts.needed, Needed(data.label, numbers)]
        return Columns(texts.text, second=texts.second, target=numbers, needed=needed)

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        return ()

    def names(self, rows: Rows) -> Sequence[str]:
        return ()

    def mapped(self, rows: Rows) -> Sequence[str]:
        return ()

    def written(self, rows: Rows, data: DataConfig) -> Mapping[str, Sequence[str]]:
        pair = {data.text_pair: rows.second} if rows.second else {}
        return {data.text: rows.text, **pair, data.label: rows.target}

    def encode(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        data: DataConfig,
        longest: int,
    ) -> Encoded:
        found, kept = encoded_texts(rows, tokenizer, longest)
        return replace(found, targets=torch.tensor([float(rows.target[i]) for i in kept]))

    def made_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        rows = synthetic(tokenizer, 7, ends, lengths=lengths)  # seven numbers about 0
        assert rows.classes is not None
        return replace(rows, classes=None, targets=rows.classes / 2 - 1.5)

    def losses(self, net: Net, batch: Batch) -> Tensor:
        logits = net.logits(inputs_of(batch))
        return (logits[:, 0] - sent(batch["labels"], logits.device)).square()

    def defined(self, net: Net, batch: Batch) -> Tensor:
        logits = net.logits(inputs_of(batch))
        return by_example(lambda z, y: (z[0] - y.double()) ** 2, logits, batch["labels"])

    def scored(self, encoded: Encoded) -> Tensor:
        return torch.ones(len(encoded), dtype=torch.long)

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        logits, wanted = outputs(net, rows, config)
        found = metrics.numbers(logits[:, 0].double(), wanted.double())
        return found | own_loss(config, logits, wanted) | own_scores(config, logits, wanted)

    def parts(self, net: Net, rows: Encoded, config: Config) -> Parts:
        logits, wanted = outputs(net, rows, config)
        return of_numbers(logits[:, 0], wanted)

    def baselines(
        self, corpus: Corpus, features: Features | None
    ) -> Mapping[str, Callable[[], Scores]]:
        from fedlora.training.baselines import regression

        return regression(corpus, features)

    def options(self, labels: Sequence[str]) -> Mapping[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def script(self, data: DataConfig, end: int | None) -> str:
        return f"""
batch = tokenizer({two_texts(data)}, padding=True, truncation=True, return_tensors="pt")
print(logits(batch)[:, 0].tolist())
"""


def _tell_commas(read: Sequence[str], where: str, name: str) -> None:
    """Log how a comma is read: some mean thousands by it."""
    if commas := [x for x in read if "," in x]:
        log.warning(
            '%s: %d of %d numbers in "%s" have a comma, which is read as a point: %r is %s',
            *(where, len(commas), len(read), name, commas[0], _number(commas[0], where, name)),
        )


def _number(value: str, where: str, name: str) -> str:
    """The number as Python writes it; "" for a missing one."""
    if not value:
        return ""
    if not NUMBER.fullmatch(value) or value.endswith("%"):
        raise DataError(
            f'data.label = "{name}": {where} has {value[:40]!r} there, and model.task = '
            '"regression" learns numbers; name a column of numbers, or another model.task'
        )
    return repr(float(size(value)))
