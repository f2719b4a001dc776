"""The federation of plain tensors that `fedlora.testing` ships, and fedlora's own strategies."""

from typing import Any

from fedlora.strategies import STRATEGIES
from fedlora.testing import federation
from fedlora.testing.federation import (
    EQUAL,
    EVEN,
    EVEN_MIXED,
    EXAMPLES,
    MIXED,
    MODULES,
    PARTIAL,
    RESCALED,
    SEED,
    SQUARE,
    Played,
    Site,
    Visit,
    assert_same,
    base_change,
    cast,
    deviation,
    fitting,
    make_clients,
    make_start,
    model_change,
    noise,
    numel,
    perturb,
    play,
    visit,
)

__all__ = [
    "EQUAL",
    "EVEN",
    "EVEN_MIXED",
    "EXAMPLES",
    "MIXED",
    "MODULES",
    "PARTIAL",
    "RESCALED",
    "SEED",
    "SQUARE",
    "Played",
    "Site",
    "Visit",
    "assert_same",
    "base_change",
    "cast",
    "deviation",
    "fitting",
    "make_clients",
    "make_start",
    "model_change",
    "noise",
    "numel",
    "perturb",
    "play",
    "variants",
    "visit",
]

NUMBERS = (("fedex", "rank", 2), ("florist", "energy", 1.0), ("hetlora", "gamma", 0.5))
"""Options that are numbers, at a value that takes another path."""


def variants() -> dict[str, Any]:
    """Every strategy with its defaults, and once for each other value of each choice it offers."""
    found: dict[str, Any] = {}
    for name, cls in STRATEGIES.items():
        found |= federation.variants(name, cls)
    for name, option, value in NUMBERS:
        found[f"{name}[{option}={value}]"] = STRATEGIES[name](**{option: value})
    return found
