"""What a run that began before a key existed was run with: the rule there was before the key.

A run's config.toml and checkpoints hold every key that there was as it began. A key that they lack
came later, and its default may be another rule than the one the run began with. So whoever reads
the config of a run that is on disk (to go on with it, to export it, to look at it) completes it
here, and the run keeps the rule it began with. A key that is not listed means by its default what
was done before it.

A value here is never changed again: there are runs on disk that mean it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

MEANT: Mapping[str, bool | int | float | str] = {
    "strategy.fedsb.signs": "clients",
    "strategy.fedsvd.head": "trained",
    "strategy.hetlora.rounding": "down",
    "strategy.lora-a2.choice": "server-0.1",
    "strategy.ravan.average": "all",
    "strategy.ravan.choice": "leading",
}
"""By key, the value that stands for what was done before it."""


def missing(begun_with: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a run's config lacks, flat, with what their absence means."""
    return {key: value for key, value in MEANT.items() if key not in begun_with}


def of_strategy(key: str) -> str:
    """The strategy that a key is an option of: "fedsvd" of "strategy.fedsvd.head"; else empty."""
    first, _, rest = key.partition(".")
    name, dot, _ = rest.partition(".")
    return name if first == "strategy" and dot else ""


def kept(
    begun_with: Mapping[str, Any], defaults: Mapping[str, Any], strategy: str
) -> Iterator[str]:
    """A line for each rule that a resumed run keeps, and that a new one would not begin with."""
    for key, value in missing(begun_with).items():
        if of_strategy(key) in ("", strategy) and defaults.get(key) != value:
            yield (
                f"{key} = {value!r}: this run began before there was the key and keeps its rule; "
                f"a new run has {defaults.get(key)!r}"
            )
