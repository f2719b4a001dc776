"""Features of the frozen model, for the baseline that trains a head only."""

import torch
from torch import Tensor

from fedlora.config.reader import Config
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
                given = model.tokenizer(
                    list(part.text),
                    list(part.second) or None,
                    padding=True,
                    truncation=True,
                    max_length=model.longest(config.data.max_length),
                    return_tensors="pt",
                )
                model.peft(**moved(given, model.device))
                if seen[-1].ndim == 3:
                    mask = given["attention_mask"][..., None].float()
                    seen[-1] = (seen[-1] * mask).sum(1) / mask.sum(1).clamp(min=1)
    finally:
        hook.remove()
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(seen)[back]
