"""A client's answers to the two phases that find sum_i p_i sign(G_i): see server/first_gradient.py.

1  Omega (k, w), the same on every client     Y_i = sign(G_i) Omega
2  Q (d, w) from the server                   Z_i = Q^T sign(G_i)
"""

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import MetricRecord, RecordDict
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.federation.wire.messages import (
    arrays_of,
    configs_of,
    pack_factors,
    unpack_factors,
)
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import seeded
from fedlora.training.data.batches import Encoded, batches
from fedlora.training.model.model import Model
from fedlora.training.train import example_losses, microbatches

EXAMPLES = 256
"""A client's gradient is that of its first so many examples, in batches."""


def omega(k: int, width: int, m: str, seed: int) -> Tensor:
    """The probing matrix (k, w) of a module: the same on every client."""
    return torch.randn(k, width, generator=seeded(seed, 0, 0, f"omega/{m}"))


def sketch(model: Model, rows: Encoded, config: Config, asked: RecordDict) -> RecordDict:
    """A client's answer to either phase."""
    settings: Mapping[str, Any] = configs_of(asked, "sketch")
    widths = dict(zip(settings["modules"], settings["widths"], strict=True))
    Q = unpack_factors(arrays_of(asked, "send"), {}).B
    signs = first_signs(model, rows, config)
    found = {}
    for m, M in signs.items():
        probe = omega(M.shape[1], widths[m], m, config.run.seed)
        found[m] = Q[m].T @ M if Q else M @ probe
    return RecordDict(
        {
            "sent": pack_factors(Factors(A=found), "float32"),
            "metrics": MetricRecord({"num-examples": len(rows)}),
        }
    )


def first_signs(model: Model, rows: Encoded, config: Config) -> dict[str, Tensor]:
    """sign(G) (d, k) of the untouched base, by module."""
    generator = seeded(config.run.seed, 0, 0, "first gradient")
    seen = 0
    with model.base_gradients() as gradients:
        for batch in batches(rows, config.train.batch_size, generator, 0, 1.0):
            for part in microbatches(batch, config.train.microbatch):
                example_losses(model, part).sum().backward()
            seen += len(batch["input_ids"])
            if seen >= EXAMPLES:
                break
        return {m: G.sign() for m, G in gradients().items()}
