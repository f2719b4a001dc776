"""A planted slip: where this is imported, each model is loaded twice, and both are kept."""

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.training import cache

_kept: list[Any] = []
_load = cache._load_model


def _twice(*args: Any) -> Any:
    _kept.append(_load(*args))
    return _load(*args)


if cache._model.value is None:  # the process of a worker, which has none yet
    cache._model.make = _twice


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")
