"""One label a text, or a pair of texts.

    loss of an example     cross entropy, with train.label-smoothing: tasks/classes.py
    scores                 accuracy, macro_f1, loss (nats, the mean over examples)

Reads data.text, data.label and, for pairs, data.text-pair. Labels: data/labels.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.training.data.batches import SYNTHETIC, Batch, Encoded, synthetic
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.labels import as_label, labels_of
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table, column
from fedlora.training.tasks import classes
from fedlora.training.tasks.base import Columns, Features, Needed, Net, Scores
from fedlora.training.tasks.parts import Parts
from fedlora.training.tasks.texts import encoded_texts, texts_of, two_texts


@dataclass(frozen=True)
class Classification:
    """See the top of this file."""

    name = "classification"
    predicts = "classes"
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
        label = [renames.get(x, x) for x in read]
        texts = texts_of(table, where, data)
        needed = [*texts.needed, Needed(data.label, label)]
        return Columns(texts.text, label, second=texts.second, needed=needed, mapped=read)

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        return labels_of(rows, data)

    def names(self, rows: Rows) -> Sequence[str]:
        return rows.label

    def mapped(self, rows: Rows) -> Sequence[str]:
        return rows.label

    def written(self, rows: Rows, data: DataConfig) -> Mapping[str, Sequence[str]]:
        pair = {data.text_pair: rows.second} if rows.second else {}
        return {data.text: rows.text, **pair, data.label: rows.label}

    def encode(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        data: DataConfig,
        longest: int,
    ) -> Encoded:
        index = {label: i for i, label in enumerate(labels)}
        found, kept = encoded_texts(rows, tokenizer, longest)
        numbers = torch.tensor([index[rows.label[i]] for i in kept], dtype=torch.long)
        return replace(found, classes=numbers)

    def made_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        return synthetic(tokenizer, len(labels), ends, lengths=lengths)

    def losses(self, net: Net, batch: Batch) -> Tensor:
        return classes.losses(net, batch)

    def defined(self, net: Net, batch: Batch) -> Tensor:
        return classes.defined(net, batch)

    def scored(self, encoded: Encoded) -> Tensor:
        return torch.ones(len(encoded), dtype=torch.long)

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        return classes.score(net, rows, config)

    def parts(self, net: Net, rows: Encoded, config: Config) -> Parts:
        return classes.parts(net, rows, config)

    def baselines(
        self, corpus: Corpus, features: Features | None
    ) -> Mapping[str, Callable[[], Scores]]:
        from fedlora.training import baselines  # scikit-learn takes a second to import

        found: dict[str, Callable[[], Scores]] = {
            "majority class": lambda: baselines.majority(corpus),
            "TF-IDF + logistic regression": lambda: baselines.tfidf(corpus),
        }
        if features is not None:
            found["trained head only"] = lambda: baselines.trained_head(corpus, features)
        return found

    def options(self, labels: Sequence[str]) -> Mapping[str, Any]:
        return classes.label_options(labels)

    def script(self, data: DataConfig, end: int | None) -> str:
        return f"""
batch = tokenizer({two_texts(data)}, padding=True, truncation=True, return_tensors="pt")
for row in logits(batch).softmax(-1):
    print(LABELS[int(row.argmax())], float(row.max()))
"""
