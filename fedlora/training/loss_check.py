"""The training check's first half: the rows, and what each example's loss is.

Nothing here differentiates: a batch scores what its examples have, each example's loss is that of
the definition, and it is the same alone as beside others.
"""

import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import TrainingCheckError
from fedlora.training.data.batches import IGNORE, Batch, Encoded, inputs_of
from fedlora.training.data.batches import alone as one
from fedlora.training.devices import on_host, wide_on_host
from fedlora.training.model.model import Model
from fedlora.training.precision import autocast
from fedlora.training.tasks import Task
from fedlora.training.tasks.outputs import own_losses
from fedlora.training.train import example_losses

EXAMPLES = 4
"""Of the check's batch."""

ALONE = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.1}
"""How far an example's loss beside others may be from the one it has alone, of the spread of the
examples' losses, by the base's dtype."""


def check_rows(encoded: Encoded, task: Task) -> None:
    """Raises TrainingCheckError where the rows hold nothing to learn from."""
    if not len(encoded):
        raise TrainingCheckError("there are no rows to train on")
    if not bool((task.scored(encoded) > 0).any()):
        raise TrainingCheckError("no row has a token that is scored: every label is ignored")


def chosen(encoded: Encoded, task: Task) -> Tensor:
    """A few examples that are scored, of different lengths, from the shorter half."""
    good = torch.nonzero(task.scored(encoded) > 0).flatten()
    order = good[encoded.lengths[good].argsort(stable=True)]
    last = min(len(order), max(EXAMPLES, len(order) // 2)) - 1
    return order[torch.linspace(0, last, min(EXAMPLES, len(order))).long()]


def check_labels(batch: Batch, want: Tensor, task: Task) -> None:
    """Raises TrainingCheckError where a batch scores other numbers than its examples have."""
    labels = batch["labels"]
    found = torch.ones(len(labels)) if labels.ndim == 1 else (labels != IGNORE).sum(1)
    if task.shifted:  # nothing predicts a first token
        found = found - (labels[:, 0] != IGNORE).long()
    if not torch.equal(found.long(), want):
        raise TrainingCheckError("a batch's labels are not those of its examples")


@torch.no_grad()
def check_losses(model: Model, batch: Batch, config: Config) -> None:
    """Raises TrainingCheckError where an example's loss is not its own, or not the definition's."""
    own = ALONE[model.config.model.dtype]
    # the definition reads rows of other shapes than a pack's, which 16 bits round in other ways
    precision = "float32" if config.train.packing else config.train.precision
    model.peft.eval()
    given = wide_on_host(example_losses(model, batch, precision))
    with autocast(precision, model.device):
        want = _defined(model, batch, config)
    coarse = config.train.packing and model.config.model.dtype != "float32"
    rounding = own * (want.max() - want.min()) if coarse else 0
    theirs = "what train.loss gives it alone"
    right = theirs if config.train.loss else f"what model.task = {model.task.name!r} defines"
    what = f"an example's loss is not {right}"
    _close(given, want, 1e-4 * want.abs().max() + rounding, what)
    ones = [example_losses(model, one(batch, i)) for i in range(len(given))]
    alone = wide_on_host(torch.cat(ones))
    _close(
        wide_on_host(example_losses(model, batch)),
        alone,
        own * (alone.max() - alone.min()) + 2e-6 * alone.abs().max(),
        "an example's loss depends on what else is in its batch: padding that is not masked, or a "
        "padding token that the model does not know",
    )


def _defined(model: Model, batch: Batch, config: Config) -> Tensor:
    """Each example's loss by its definition; by the user's own function where there is one."""
    if not (name := config.train.loss):
        return model.task.defined(model, batch)
    logits = on_host(model.logits(inputs_of(batch)))
    rows = zip(logits, batch["labels"], strict=True)
    return torch.cat([own_losses(name, z[None], y[None]) for z, y in rows]).double()


def _close(given: Tensor, want: Tensor, size: Tensor, what: str) -> None:
    gap = (given - want).abs().max()
    if not bool(gap <= size):
        raise TrainingCheckError(what, f"off by {float(gap):.1e}")
