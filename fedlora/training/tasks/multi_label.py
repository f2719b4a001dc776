"""Any number of labels a text, or a pair of texts.

    loss of an example     the mean over the c labels of -log sigmoid(z_j) where it has the label,
                           -log sigmoid(-z_j) where not
    scores                 accuracy (the share of rows of which every label is right), micro_f1,
                           macro_f1 (a label that no row has and none is given counts 0), loss
    predicted              the labels of z_j > 0

Reads data.text, data.text-pair and data.label: a list of names, in a column of lists, or as one
text, a JSON list or names between data.label-separator. A row may have none.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.training import metrics
from fedlora.training.data.batches import SYNTHETIC, Batch, Encoded, inputs_of, synthetic
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.labels import as_label, names_of
from fedlora.training.data.list_columns import lists
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table
from fedlora.training.devices import sent
from fedlora.training.tasks.base import Columns, Features, Net, Scores
from fedlora.training.tasks.classes import label_options
from fedlora.training.tasks.outputs import outputs, own_loss, own_scores
from fedlora.training.tasks.parts import Parts, of_labels
from fedlora.training.tasks.texts import by_example, encoded_texts, texts_of


@dataclass(frozen=True)
class MultiLabel:
    """See the top of this file."""

    name = "multi-label"
    predicts = "labels"
    auto = "AutoModelForSequenceClassification"
    what = "sequence classifier"
    peft = "SEQ_CLS"
    hub = "text-classification"
    headed = pooled = True
    answers = generates = pictured = shifted = False

    def read(
        self, table: Table, where: str, data: DataConfig, renames: Mapping[str, str]
    ) -> Columns:
        cells = lists(table, where, "data.label", data.label, data.label_separator)
        read = [[name for x in row if (name := as_label(x))] for row in cells]
        named = [list(dict.fromkeys(y for x in row if (y := renames.get(x, x)))) for row in read]
        texts = texts_of(table, where, data)
        return Columns(
            texts.text,
            second=texts.second,
            target=[json.dumps(row) for row in named],
            needed=texts.needed,
            mapped=[name for row in read for name in row],
        )

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        return names_of(rows, self.names(rows), data)

    def names(self, rows: Rows) -> Sequence[str]:
        return [name for row in rows.target for name in json.loads(row)]

    def mapped(self, rows: Rows) -> Sequence[str]:
        return self.names(rows)

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
        index = {label: i for i, label in enumerate(labels)}
        found, kept = encoded_texts(rows, tokenizer, longest)
        targets = torch.zeros(len(kept), len(labels))
        for at, i in enumerate(kept):
            targets[at, [index[name] for name in json.loads(rows.target[i])]] = 1.0
        return replace(found, targets=targets)

    def made_up(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        lengths: Sequence[int] = SYNTHETIC,
        ends: Sequence[int] = (),
    ) -> Encoded:
        rows = synthetic(tokenizer, len(labels), ends, lengths=lengths)
        assert rows.classes is not None
        places = torch.arange(len(labels))
        targets = ((places + rows.classes[:, None]) % 2).float()  # some of them, others a row
        return replace(rows, classes=None, targets=targets)

    def losses(self, net: Net, batch: Batch) -> Tensor:
        logits = net.logits(inputs_of(batch))
        targets = sent(batch["labels"], logits.device)
        return binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)

    def defined(self, net: Net, batch: Batch) -> Tensor:
        logits = net.logits(inputs_of(batch))

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return -logsigmoid(torch.where(y > 0, z, -z)).mean()

        return by_example(loss, logits, batch["labels"])

    def scored(self, encoded: Encoded) -> Tensor:
        assert encoded.targets is not None
        return torch.full((len(encoded),), encoded.targets.shape[1])

    def score(self, net: Net, rows: Encoded, config: Config, generate: bool) -> Scores:
        logits, targets = outputs(net, rows, config)
        loss = binary_cross_entropy_with_logits(logits.double(), targets.double()).item()
        found = {"loss": loss, **metrics.several((logits > 0).numpy(), targets.numpy() > 0)}
        return found | own_loss(config, logits, targets) | own_scores(config, logits, targets)

    def parts(self, net: Net, rows: Encoded, config: Config) -> Parts:
        logits, targets = outputs(net, rows, config)
        return of_labels(logits > 0, targets > 0, net.labels)

    def baselines(
        self, corpus: Corpus, features: Features | None
    ) -> Mapping[str, Callable[[], Scores]]:
        from fedlora.training.baselines import multi_label

        return multi_label(corpus, features)

    def options(self, labels: Sequence[str]) -> Mapping[str, Any]:
        return {**label_options(labels), "problem_type": "multi_label_classification"}

    def script(self, data: DataConfig, end: int | None) -> str:
        return """
batch = tokenizer(["a text", "another"], padding=True, truncation=True, return_tensors="pt")
for row in logits(batch):
    print([LABELS[j] for j, z in enumerate(row.tolist()) if z > 0])
"""
