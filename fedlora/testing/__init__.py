"""For those who write a strategy: the contract that fedlora's own keep, to run over another."""

from fedlora.testing.run_contract import check_strategy

__all__ = ["check_strategy"]
