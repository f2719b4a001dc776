"""The names that model.task may have, and what must be known of each before anything is imported.

What they mean is in fedlora/training/tasks.
"""

from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "fedlora.tasks"


@dataclass(frozen=True, slots=True)
class TaskKind:
    """Of a task: the attributes of the same names in `fedlora.training.tasks.base.Task`."""

    pooled: bool
    headed: bool
    generates: bool
    answers: bool
    needs: tuple[str, ...] = ()
    """Packages of the extra `metrics` that its scores come from."""
    predicts: str = ""
    """What evaluate.metrics' names are of: `fedlora.config.metric_names.OWN`. Empty: of none."""
    pictured: bool = False
    refers: bool = False
    """It compares with a reference: nothing is dropped in training where model.dropout is -1."""


PER_TEXT = TaskKind(pooled=True, headed=True, generates=False, answers=False)
WRITES = TaskKind(pooled=False, headed=False, generates=True, answers=True, predicts="answers")

KINDS: dict[str, TaskKind] = {
    "classification": replace(PER_TEXT, predicts="classes"),
    "multi-label": replace(PER_TEXT, predicts="labels"),
    "regression": replace(PER_TEXT, predicts="numbers"),
    "token-classification": TaskKind(False, True, False, False, ("seqeval",), "tags"),
    "causal-lm": WRITES,
    "seq2seq": WRITES,
    "preference": TaskKind(False, False, generates=True, answers=False, refers=True),
    "image-classification": TaskKind(False, True, False, False, predicts="classes", pictured=True),
}
"""Every name, in the order of the documentation. `register_task` adds to it."""


def offered() -> tuple[EntryPoint, ...]:
    """The tasks that installed packages offer, none of them loaded."""
    return tuple(entry_points(group=GROUP))


def kind_of(name: str) -> TaskKind:
    """Its kind; of one that a package offers and nobody has loaded yet, that with most to it."""
    return KINDS.get(name, TaskKind(pooled=True, headed=True, generates=True, answers=True))


def known(value: Any) -> Any:
    """The name of a task.

    Raises:
        ValueError: it is none.
    """
    if value not in KINDS and value not in (names := [point.name for point in offered()]):
        raise ValueError(f"must be one of {', '.join(map(repr, [*KINDS, *names]))}")
    return value
