"""The training check's first half: the rows, and what each example's loss is.

Nothing here differentiates: a batch scores what its examples have, each example's loss is that of
the definition, and it is the same alone as beside others.
"""

import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import TrainingCheckError
from fedlora.training.data.batches import IGNORE, Batch, Encoded
from fedlora.training.devices import on_host, wide_on_host
from fedlora.training.model.model import Model
from fedlora.training.precision import autocast
from fedlora.training.train import example_losses, own_losses

EXAMPLES = 4
"""Of the check's batch."""

ALONE = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.1}
"""How far an example's loss beside others may be from the one it has alone, of the spread of the
examples' losses, by the base's dtype."""


def scored(encoded: Encoded) -> Tensor:
    """Of how many numbers each example's loss is the mean, (n,)."""
    if encoded.classes is not None:
        return torch.ones(len(encoded), dtype=torch.long)
    assert encoded.prompts is not None
    return (encoded.lengths - encoded.prompts.clamp(min=1)).clamp(min=0)


def check_rows(encoded: Encoded) -> None:
    """Raises TrainingCheckError where the rows hold nothing to learn from."""
    if not len(encoded):
        raise TrainingCheckError("there are no rows to train on")
    if not bool((scored(encoded) > 0).any()):
        raise TrainingCheckError("no row has a token that is scored: every label is ignored")


def chosen(encoded: Encoded) -> Tensor:
    """A few examples that are scored, of different lengths, from the shorter half."""
    good = torch.nonzero(scored(encoded) > 0).flatten()
    order = good[encoded.lengths[good].argsort(stable=True)]
    last = min(len(order), max(EXAMPLES, len(order) // 2)) - 1
    return order[torch.linspace(0, last, min(EXAMPLES, len(order))).long()]


def check_labels(batch: Batch, want: Tensor) -> None:
    """Raises TrainingCheckError where a batch scores other tokens than its examples have."""
    labels = batch["labels"]
    found = torch.ones(len(labels)) if labels.ndim == 1 else (labels[:, 1:] != IGNORE).sum(1)
    if not torch.equal(found.long(), want):
        raise TrainingCheckError("a batch's labels are not those of its examples")


@torch.no_grad()
def check_losses(model: Model, batch: Batch, config: Config) -> None:
    """Raises TrainingCheckError where an example's loss is not its own, or not the definition's."""
    precision = config.train.precision
    model.peft.eval()
    given = wide_on_host(example_losses(model, batch, precision))
    with autocast(precision, model.device):
        logits = on_host(model.logits({k: x for k, x in batch.items() if k != "labels"}))
    want = torch.stack([_loss(config, *row) for row in zip(logits, batch["labels"], strict=True)])
    theirs = "what train.loss gives it alone"
    right = theirs if config.train.loss else "the mean over its own scored tokens"
    what = f"an example's loss is not {right}"
    _close(given, want, 1e-4 * want.abs().max(), what)
    ones = [example_losses(model, _one(batch, i)) for i in range(len(given))]
    alone, own = wide_on_host(torch.cat(ones)), ALONE[model.config.model.dtype]
    _close(
        wide_on_host(example_losses(model, batch)),
        alone,
        own * (alone.max() - alone.min()) + 2e-6 * alone.abs().max(),
        "an example's loss depends on what else is in its batch: padding that is not masked, or a "
        "padding token that the model does not know",
    )


def _loss(config: Config, logits: Tensor, label: Tensor) -> Tensor:
    """One example's loss by its definition; by the user's own function where there is one."""
    if name := config.train.loss:
        return own_losses(name, logits[None], label[None])[0].double()
    return _defined(logits, label)


def _defined(logits: Tensor, label: Tensor) -> Tensor:
    """-log p of what is scored, averaged over it, in float64, token by token."""
    logits = logits.double()
    if label.ndim == 0:
        return logits.logsumexp(0) - logits[label]
    at = [t for t in range(1, len(label)) if label[t] != IGNORE]
    return torch.stack([logits[t - 1].logsumexp(0) - logits[t - 1, label[t]] for t in at]).mean()


def _one(batch: Batch, i: int) -> Batch:
    """Example i in a batch of its own, without padding."""
    there = batch["attention_mask"][i].bool()
    return {key: x[i : i + 1, there] if x.ndim > 1 else x[i : i + 1] for key, x in batch.items()}


def _close(given: Tensor, want: Tensor, size: Tensor, what: str) -> None:
    gap = (given - want).abs().max()
    if not bool(gap <= size):
        raise TrainingCheckError(what, f"off by {float(gap):.1e}")
