"""A planted slip: a card's worker that imports this loads each model twice, and keeps both.

Any other process is left as it is: what the tests' own kept here would be in later tests' counts.
"""

import sys
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.launch.simulate.workers import MODULE
from fedlora.training import cache

_kept: list[Any] = []
_load = cache._load_model


def _twice(*args: Any) -> Any:
    _kept.append(_load(*args))
    return _load(*args)


started_as = getattr(sys.modules["__main__"], "__spec__", None)
if started_as and started_as.name == MODULE:
    cache._model.make = _twice


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")
