"""A run's settings: every key, its default, its reader."""

from typing import Any

from fedlora.moved import attribute_of


def __getattr__(name: str) -> Any:
    return attribute_of(__name__, "fedlora.config.reader", name)
