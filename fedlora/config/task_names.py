"""The names that model.task may have. What they mean is in fedlora/training/tasks."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "fedlora.tasks"

POOLED = {"classification", "multi-label", "regression"}
"""Of these one output stands for a whole text: model.pooling = "mean" can make it."""

NAMES = dict.fromkeys(("classification", "multi-label", "regression", "causal-lm"))
"""In the order of the documentation. What is registered comes behind."""


def add(name: str, pooled: bool) -> None:
    """Make one more name known: `fedlora.training.tasks.register_task`."""
    NAMES[name] = None
    if pooled:
        POOLED.add(name)


def offered() -> tuple[EntryPoint, ...]:
    """The tasks that installed packages offer, none of them loaded."""
    return tuple(entry_points(group=GROUP))


def known(value: Any) -> Any:
    """The name of a task.

    Raises:
        ValueError: it is none.
    """
    if value not in NAMES and value not in (names := [point.name for point in offered()]):
        raise ValueError(f"must be one of {', '.join(map(repr, [*NAMES, *names]))}")
    return value
