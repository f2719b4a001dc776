"""What a model makes of rows for scoring them, and the user's own loss and scores."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.config.metric_names import code_of, names_of
from fedlora.config.reader import Config
from fedlora.config.task_names import kind_of
from fedlora.errors import ModelError
from fedlora.training.data.batches import IGNORE, Encoded, eval_batches
from fedlora.training.devices import on_host
from fedlora.training.named_metrics import further
from fedlora.training.tasks.base import Net
from fedlora.training.user_code import find


def at_once(config: Config) -> int:
    """Examples of an evaluation that are in memory at once: four for one of training where that is
    limited, since none of their activations is kept."""
    most = 4 * config.train.microbatch or config.evaluate.batch_size
    return min(config.evaluate.batch_size, most)


def outputs(net: Net, rows: Encoded, config: Config) -> tuple[Tensor, Tensor]:
    """Logits and labels of all the rows, by `eval_order`, on the host; of one output a text."""
    logits, labels = [], []
    for batch in eval_batches(rows, at_once(config)):
        labels.append(batch.pop("labels"))
        logits.append(net.logits(batch))
    return on_host(torch.cat(logits)), torch.cat(labels)


def mean_losses(logits: Tensor, labels: Tensor, smooth: float = 0.0) -> Tensor:
    """The mean cross entropy over each example's own scored tokens, (b,), of (b, t, names) and
    (b, t); smooth: of labels of which this part is dealt out over all names.

    Of all tokens, scored or not, one product each: under DP how many it has must not depend on
    what other examples have.
    """
    scored = labels != IGNORE
    wanted = labels.where(scored, 0).flatten()
    flat = logits.flatten(0, 1)
    found = cross_entropy(flat, wanted, reduction="none", label_smoothing=smooth)
    found = found.view(labels.shape)
    return (found * scored).sum(1) / scored.sum(1).clamp(min=1)


def own_losses(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Each example's loss by the user's own function, from float32 logits and labels, (b,).

    Raises:
        ModelError: it gives something else.
    """
    losses = find("train.loss", name)(logits, labels)
    if not isinstance(losses, Tensor) or losses.shape != labels.shape[:1]:
        given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ModelError(
            f"train.loss = {name!r}: it gives {given}, must be a tensor of one loss an example, "
            f"{tuple(labels.shape[:1])}: not their mean, which privacy could not bound"
        )
    return losses.float()


def own_loss(config: Config, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The mean of the user's own losses as "loss"; nothing where there are none."""
    if not (name := config.train.loss):
        return {}
    return {"loss": own_losses(name, logits, labels).double().mean().item()}


def own_scores(config: Config, predicted: Any, wanted: Any) -> dict[str, float]:
    """The scores that evaluate.metrics asks for: those it names, and the user's own function's.

    Raises:
        DataError: a metric that is named does not know what is wanted.
        ModelError: the function gives something else than numbers by name.
    """
    how, predicts = config.evaluate, kind_of(config.model.task).predicts
    named = further(names_of(how.metrics), predicts, predicted, wanted, how)
    if not (name := code_of(how.metrics)):
        return named
    found = find("evaluate.metrics", name)(predicted, wanted)
    try:
        return named | {str(key): float(value) for key, value in found.items()}
    except (AttributeError, TypeError, ValueError) as e:
        raise ModelError(
            f"evaluate.metrics = {name!r}: it gives {found!r:.80}, must be numbers by name"
        ) from e
