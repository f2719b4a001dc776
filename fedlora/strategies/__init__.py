"""The strategies by their config name. A new one is a new file, a line here and a test."""

from typing import Any

from fedlora.strategies.base import Strategy
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex import FedEx
from fedlora.strategies.fedsa import FedSA
from fedlora.strategies.fedsb import FedSB
from fedlora.strategies.ffa import FFA
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.fslora import FSLoRA

STRATEGIES: dict[str, type[Strategy[Any]]] = {
    "fedavg": FedAvg,
    "ffa": FFA,
    "fedex": FedEx,
    "flora": FLoRA,
    "fedsa": FedSA,
    "fedsb": FedSB,
    "fslora": FSLoRA,
}

__all__ = ["STRATEGIES", "Strategy"]
