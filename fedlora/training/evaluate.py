"""How good the loaded model is on some rows, by its task's metrics."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fedlora.config.reader import Config
from fedlora.training.data.batches import Encoded
from fedlora.training.data.seam import end_mark
from fedlora.training.model.model import Model
from fedlora.training.precision import autocast
from fedlora.training.tasks import task_of
from fedlora.training.tasks.base import Reporting


@torch.no_grad()
def evaluate(
    model: Model, rows: Encoded, config: Config, generate: bool = False
) -> dict[str, float] | None:
    """The task's metrics; None where there are no rows.

    generate: those of generated answers as well, of a task that has such.
    """
    if not len(rows):
        return None
    model.peft.eval()
    with autocast(config.train.precision, model.device):
        return dict(model.task.score(model, rows, config, generate))


@torch.no_grad()
def parts(model: Model, rows: Encoded, config: Config) -> dict[str, Any]:
    """What a report shows of these rows beyond the scores; nothing where the task has no such."""
    if not len(rows) or not isinstance(model.task, Reporting):
        return {}
    model.peft.eval()
    with autocast(config.train.precision, model.device):
        return dict(model.task.parts(model, rows, config))


def generation(tokenizer: PreTrainedTokenizerBase, config: Config) -> dict[str, Any] | None:
    """How answers are generated, for the record; None where none are."""
    if not task_of(config.model.task).answers or not config.evaluate.generate_tokens:
        return None
    mark = end_mark(tokenizer, config.data.chats)
    stop = None if mark is None else str(tokenizer.convert_ids_to_tokens(mark))
    return {"greedy": True, "tokens": config.evaluate.generate_tokens, "stops_at": stop}
