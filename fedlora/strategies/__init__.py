"""The strategies by their config name. A new one is a new file, a line here and a test.

One that lives elsewhere is registered: fedlora/strategies/registry.py.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fedlora.strategies import registry
from fedlora.strategies.base import Strategy
from fedlora.strategies.fed_plora import FedPLoRA
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex import FedEx
from fedlora.strategies.fedsa import FedSA
from fedlora.strategies.fedsb import FedSB
from fedlora.strategies.fedsvd import FedSVD
from fedlora.strategies.ffa import FFA
from fedlora.strategies.flexlora import FlexLoRA
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.florist import FLoRIST
from fedlora.strategies.frlora import FRLoRA
from fedlora.strategies.fslora import FSLoRA
from fedlora.strategies.hetlora import HetLoRA
from fedlora.strategies.lora_a2 import LoRAA2
from fedlora.strategies.lora_fair import LoRAFair
from fedlora.strategies.raflora import RaFLoRA
from fedlora.strategies.ravan import Ravan
from fedlora.strategies.rolora import RoLoRA

STRATEGIES: dict[str, type[Strategy[Any]]] = {
    "fedavg": FedAvg,
    "ffa": FFA,
    "fedex": FedEx,
    "flora": FLoRA,
    "fedsa": FedSA,
    "fedsb": FedSB,
    "fslora": FSLoRA,
    "hetlora": HetLoRA,
    "flexlora": FlexLoRA,
    "raflora": RaFLoRA,
    "florist": FLoRIST,
    "lora-fair": LoRAFair,
    "rolora": RoLoRA,
    "lora-a2": LoRAA2,
    "fedsvd": FedSVD,
    "fed-plora": FedPLoRA,
    "frlora": FRLoRA,
    "ravan": Ravan,
}


def register_strategy(name: str, cls: type[Strategy[Any]], states: Sequence[type] = ()) -> None:
    """Make a strategy known by a name, before a config that names it is read.

    Its options are its fields, as `strategy.<name>.<option>`. `states` are the dataclasses of its
    state that its own module does not name.

    >>> from dataclasses import dataclass
    >>> from fedlora import Config, list_strategies, register_strategy
    >>> @dataclass(frozen=True)
    ... class HalfStep(list_strategies()["fedavg"]):
    ...     step: float = 0.5
    >>> register_strategy("half-step", HalfStep)
    >>> Config.read({"strategy.name": "half-step", "strategy.half-step.step": 0.25}).strategy.name
    'half-step'

    Raises:
        StrategyError: the name is taken, say, or a method is missing; with all that is wrong.
    """
    registry.add(name, cls, states, STRATEGIES)


def list_strategies() -> Mapping[str, type[Strategy[Any]]]:
    """Name to class: fedlora's own, then what was registered and what packages add. Read-only.

    >>> from fedlora import list_strategies
    >>> list_strategies()["fedsa"]().promise
    'shared'
    """
    return MappingProxyType({**STRATEGIES, **registry.added(STRATEGIES)})


__all__ = ["STRATEGIES", "Strategy", "list_strategies", "register_strategy"]
