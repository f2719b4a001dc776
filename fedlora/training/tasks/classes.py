"""One label a row: what classification of texts and of pictures share.

loss of an example     -log softmax(z)_y of its logits z (c,); with e = train.label-smoothing
                       -sum_k t_k log softmax(z)_k of t = (1 - e) [k = y] + e / c
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.config.reader import Config
from fedlora.training import metrics
from fedlora.training.data.batches import Batch, Encoded, inputs_of
from fedlora.training.devices import sent
from fedlora.training.tasks.base import Net, Scores
from fedlora.training.tasks.outputs import outputs, own_loss, own_scores
from fedlora.training.tasks.parts import Parts, of_classes
from fedlora.training.tasks.texts import by_example


def losses(net: Net, batch: Batch) -> Tensor:
    """(b,), in float32, on the net's device."""
    logits = net.logits(inputs_of(batch))
    wanted, smooth = sent(batch["labels"], logits.device), net.config.train.label_smoothing
    return cross_entropy(logits, wanted, reduction="none", label_smoothing=smooth)


def defined(net: Net, batch: Batch) -> Tensor:
    """The same by the definition, (b,), in float64 on the host."""
    logits, e = net.logits(inputs_of(batch)), net.config.train.label_smoothing
    return by_example(
        lambda z, y: z.logsumexp(0) - (1 - e) * z[y] - e * z.mean(), logits, batch["labels"]
    )


def score(net: Net, rows: Encoded, config: Config) -> Scores:
    """accuracy, macro_f1, loss (nats, the mean over examples), and what the config asks for."""
    logits, labels = outputs(net, rows, config)
    found = metrics.classification(logits, labels, len(net.labels))
    return found | own_loss(config, logits, labels) | own_scores(config, logits, labels)


def parts(net: Net, rows: Encoded, config: Config) -> Parts:
    logits, labels = outputs(net, rows, config)
    return of_classes(logits.argmax(-1), labels, net.labels)


def label_options(labels: Sequence[str]) -> Mapping[str, Any]:
    """What transformers is told of the names of a model's outputs."""
    names = dict(enumerate(labels))
    numbers = {label: i for i, label in names.items()}
    return {"num_labels": len(labels), "id2label": names, "label2id": numbers}
