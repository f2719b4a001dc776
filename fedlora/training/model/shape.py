"""The size of an adapted layer, and where its weight lies."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """An adaptable linear layer: k inputs, d outputs."""

    d: int
    k: int
    fan_in_fan_out: bool
    """Its weight lies transposed, (k, d): GPT-2's Conv1D, gpt-oss's experts."""
    stack: str = ""
    """Of an expert the parameter that holds all of them, by its full name; see expert.py."""
