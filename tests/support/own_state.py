"""The state of tests/support/own_strategy.py, in a module of its own."""

from dataclasses import dataclass

from fedlora.lora.adapter import Factors


@dataclass(frozen=True, eq=False)
class Padded:
    factors: Factors
    rounds: int = 0
