"""One label a text, or a pair of texts.

    loss of an example     -log softmax(z)_y of its logits z (c,); with e = train.label-smoothing
                           -sum_k t_k log softmax(z)_k of t = (1 - e) [k = y] + e / c
    scores                 accuracy, macro_f1, loss (nats, the mean over examples)

Reads data.text, data.label and, for pairs, data.text-pair. Labels: data/labels.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.training import metrics
from fedlora.training.data.batches import SYNTHETIC, Batch, Encoded, inputs_of, synthetic
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.labels import as_label, labels_of
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table, column
from fedlora.training.devices import sent
from fedlora.training.tasks.base import Columns, Features, Needed, Net, Scores
from fedlora.training.tasks.outputs import outputs, own_loss, own_scores
from fedlora.training.tasks.parts import Parts, of_classes
from fedlora.training.tasks.texts import by_example, encoded_texts, texts_of


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
        classes = torch.tensor([index[rows.label[i]] for i in kept], dtype=torch.long)
        return replace(found, classes=classes)

    def made_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        return synthetic(tokenizer, len(labels), ends, lengths=lengths)

    def losses(self, net: Net, batch: Batch) -> Tensor:
        logits = net.logits(inputs_of(batch))
        wanted, smooth = sent(batch["labels"], logits.device), net.config.train.label_smoothing
        return cross_entropy(logits, wanted, reduction="none", label_smoothing=smooth)

    def defined(self, net: Net, batch: Batch) -> Tensor:
        logits, e = net.logits(inputs_of(batch)), net.config.train.label_smoothing
        return by_example(
            lambda z, y: z.logsumexp(0) - (1 - e) * z[y] - e * z.mean(), logits, batch["labels"]
        )

    def scored(self, encoded: Encoded) -> Tensor:
        return torch.ones(len(encoded), dtype=torch.long)

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        logits, labels = outputs(net, rows, config)
        found = metrics.classification(logits, labels, len(net.labels))
        return found | own_loss(config, logits, labels) | own_scores(config, logits, labels)

    def parts(self, net: Net, rows: Encoded, config: Config) -> Parts:
        logits, labels = outputs(net, rows, config)
        return of_classes(logits.argmax(-1), labels, net.labels)

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
        names = dict(enumerate(labels))
        numbers = {label: i for i, label in names.items()}
        return {"num_labels": len(labels), "id2label": names, "label2id": numbers}

    def script(self, end: int | None) -> str:
        return """
batch = tokenizer(["a text", "another"], padding=True, truncation=True, return_tensors="pt")
for row in logits(batch).softmax(-1):
    print(LABELS[int(row.argmax())], float(row.max()))
"""
