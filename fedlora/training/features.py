"""Features of the frozen model, for the baseline that trains a head only."""

from typing import Any

import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.training.data.batches import collate, inputs_of
from fedlora.training.data.rows import Rows
from fedlora.training.devices import moved, on_host
from fedlora.training.model.model import Model
from fedlora.training.precision import autocast


@torch.no_grad()
def frozen_features(model: Model, rows: Rows, config: Config, batch: int = 128) -> Tensor:
    """What the model's head sees of each row, (n, width), with the adapters off; on the host.

    Of a head that takes the states of all tokens, their mean over the real ones.
    """
    head = model.peft.get_base_model().get_submodule(model.heads[0])
    seen: list[Tensor] = []
    precision = config.train.precision
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(on_host(inputs[0]).float()))
    order = sorted(range(len(rows)), key=lambda i: len(rows.text[i]))
    try:
        with model.peft.disable_adapter(), autocast(precision, model.device):
            for start in range(0, len(order), batch):
                part = rows.select(order[start : start + batch])
                given = _inputs(model, part, config)
                model.peft(**moved(given, model.device))
                if seen[-1].ndim == 3 and "attention_mask" in given:
                    mask = given["attention_mask"][..., None].float()
                    seen[-1] = (seen[-1] * mask).sum(1) / mask.sum(1).clamp(min=1)
    finally:
        hook.remove()
    seen = [x.mean(1) if x.ndim == 3 else x for x in seen]
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(seen)[back]


def _inputs(model: Model, rows: Rows, config: Config) -> Any:
    """What the model is given of these rows."""
    if model.task.pictured:
        found = model.task.encode(rows, model.tokenizer, model.labels, config.data, 0)
        return inputs_of(collate(found, torch.arange(len(found))))
    return model.tokenizer(
        list(rows.text),
        list(rows.second) or None,
        padding=True,
        truncation=True,
        max_length=model.longest(config.data.max_length),
        return_tensors="pt",
    )
