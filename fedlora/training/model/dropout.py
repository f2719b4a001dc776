"""Dropout of a model, wherever it is: in modules of its own, or in numbers that a module reads.

Llama, ModernBERT, OPT, BART and T5 keep a rate as a number, and drop inside a function; Falcon
reads it off the config as it goes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

SCARCELY = 1e-30
"""A rate of which 1 less it is 1, in every precision: what is kept is kept as it is."""


def rates(module: Any) -> Iterator[tuple[str, float]]:
    """(attribute, rate) of all that this module by itself drops by."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        yield "p", module.p
    for name, value in vars(module).items():
        if isinstance(value, float) and "drop" in name:
            yield name, value


def drops(module: nn.Module) -> bool:
    """Has it dropout? Then its output in training is not a function of its input."""
    return any(rate > 0 for _, rate in rates(module))


def set_dropout(model: Any, rate: float) -> None:
    """Give all dropout of a model this rate. Layers are dropped whole by none, or as before."""
    known = getattr(model, "config", None)
    for part in (*model.modules(), *([known] if known else [])):
        for name, _ in [*rates(part)]:
            if "layer" not in name:
                setattr(part, name, rate)
            elif not rate:
                setattr(part, name, 0.0)


@contextmanager
def undropped(model: nn.Module, scarcely: bool = False) -> Iterator[None]:
    """Within it nothing of a model is dropped; after it, all rates are as before.

    scarcely: by a rate that is no 0, so that kernels take the way that they take with dropout.
    """
    parts = [*model.modules(), *([c] if (c := getattr(model, "config", None)) else [])]
    before = [(part, name, rate) for part in parts for name, rate in rates(part)]
    try:
        set_dropout(model, 0.0)
        for part, name, rate in before if scarcely else ():
            if rate > 0 and "layer" not in name:
                setattr(part, name, SCARCELY)
        yield
    finally:
        for part, name, rate in before:
            setattr(part, name, rate)
