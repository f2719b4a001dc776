"""The base's layers through torch.compile.

Layer by layer, as they are alike and one compilation serves them all; sizes of batches and texts
are symbols in it from the start. A rank is one too, but an adapter's name is not: each rank profile
has its own adapter, so it is compiled at its first client, once more if another profile was
attached since, and never again while it is attached (`model.KEPT_PROFILES`): in a run with fixed
ranks, not after the second round.
"""

from typing import Any

import torch
import torch._dynamo

from fedlora.training.model.loading import MeanPooled
from fedlora.training.model.spread import layers_of

BACKEND: Any = "inductor"
MOST = 256
"""Compilations of one function, above which torch would go on without: for each profile some, by
whether it trains and by what is a single example or token."""


def compile_layers(base: Any) -> None:
    """Have each layer of a base compiled when it first runs with an adapter.

    Raises:
        ModelError: it does not say what its layers are.
    """
    inner = base.encoder if isinstance(base, MeanPooled) else base
    torch._dynamo.config.recompile_limit = MOST
    torch._dynamo.config.accumulated_recompile_limit = 4 * MOST
    _, layers = layers_of(inner, "train.compile = true", "false")
    for layer in layers:
        layer.compile(backend=BACKEND, dynamic=True)
