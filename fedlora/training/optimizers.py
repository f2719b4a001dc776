"""The optimisers of local training, and what their states take of a device's memory.

    adamw, sgd            torch's
    adamw_8bit            bitsandbytes': both states in 8 bits, a scale for each 256 numbers
    paged_adamw_32bit     on a card: states in memory that its driver moves to the host and back
    paged_adamw_8bit      both

What is smaller than SMALL numbers keeps states in 32 bits, and below PAGED it is not paged, as
bitsandbytes has it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedlora.config.sections import TrainConfig

Live = Mapping[str, Mapping[str, nn.Parameter]]
"""The parameters that train, by column ("A", "B", "R", "other") and name."""

SMALL, BLOCK, PAGED = 4096, 256, 100_000


def build_optimizer(live: Live, train: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """The config's optimiser over the live parameters; B's rate is lr * lr-ratio-b (LoRA+)."""
    groups = [
        {"params": list(ps.values()), "lr": lr * (train.lr_ratio_b if column == "B" else 1.0)}
        for column, ps in live.items()
    ]
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=train.momentum, weight_decay=train.weight_decay
        )
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=train.weight_decay)
    import bitsandbytes.optim

    made: Any = bitsandbytes.optim.AdamW(
        groups,
        lr=lr,
        weight_decay=train.weight_decay,
        optim_bits=8 if in_8_bits(train) else 32,
        min_8bit_size=SMALL,
        is_paged=is_paged(train),
    )
    found: torch.optim.Optimizer = made
    return found


def in_8_bits(train: TrainConfig) -> bool:
    return train.optimizer.endswith("8bit")


def is_paged(train: TrainConfig) -> bool:
    return train.optimizer.startswith("paged")


def state_bytes(n: int, train: TrainConfig) -> int:
    """What the states of a tensor of n numbers take on its device; paged ones are not there."""
    if train.optimizer == "sgd":
        return 4 * n if train.momentum else 0
    if is_paged(train) and n >= PAGED:
        return 0
    return 2 * (n + 4 * -(-n // BLOCK)) if in_8_bits(train) and n >= SMALL else 8 * n
