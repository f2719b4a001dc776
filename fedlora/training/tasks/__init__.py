"""The tasks by model.task. A new one is a new file, a line here and in config/task_names.py.

One that lives elsewhere is registered by a call, `register_task(Mine)`, in every process that reads
its config, or by an installed package's entry point:

    [project.entry-points."fedlora.tasks"]
    mine = "their_package.mine:Mine"
"""

import inspect
from typing import Any

from fedlora.config import task_names
from fedlora.errors import ConfigError
from fedlora.training.tasks.base import Task
from fedlora.training.tasks.causal_lm import CausalLM
from fedlora.training.tasks.classification import Classification
from fedlora.training.tasks.image_classification import ImageClassification
from fedlora.training.tasks.multi_label import MultiLabel
from fedlora.training.tasks.preference import Preference
from fedlora.training.tasks.regression import Regression
from fedlora.training.tasks.seq2seq import Seq2Seq
from fedlora.training.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multi-label": MultiLabel,
    "regression": Regression,
    "token-classification": TokenClassification,
    "causal-lm": CausalLM,
    "seq2seq": Seq2Seq,
    "preference": Preference,
    "image-classification": ImageClassification,
}

_added: dict[str, type[Task]] = {}


def register_task(cls: type[Any]) -> None:
    """Make a task known by its `name`, before a config that names it is read.

    >>> from fedlora import Config, register_task
    >>> from fedlora.training.tasks import TASKS
    >>> class Sentiment(TASKS["classification"]):
    ...     name = "sentiment"
    >>> register_task(Sentiment)
    >>> Config.read({"model.task": "sentiment"}).model.task
    'sentiment'

    Raises:
        ConfigError: the name is taken, or the class lacks a part of `fedlora.training.tasks.base`.
    """
    name = getattr(cls, "name", None)
    if found := _lacking(cls):
        raise ConfigError([f"the task {name or cls.__name__!r}: it lacks {', '.join(found)}"])
    there = TASKS.get(str(name)) or _added.get(str(name))
    if there is not None and there.__qualname__ + there.__module__ != (
        cls.__qualname__ + cls.__module__
    ):
        raise ConfigError([f"the task {name!r}: its name is taken by {there.__qualname__}"])
    if name not in TASKS:
        _added[str(name)] = cls
        task_names.KINDS[str(name)] = task_names.TaskKind(
            cls.pooled, cls.headed, cls.generates, cls.answers,
            predicts=getattr(cls, "predicts", ""), pictured=cls.pictured,
        )  # fmt: skip


def task_of(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: there is none, or the package that offers it cannot be loaded.
    """
    if (found := TASKS.get(name) or _added.get(name)) is not None:
        return found()
    for point in task_names.offered():
        if point.name == name:
            try:
                register_task(point.load())
            except Exception as e:  # whatever a stranger's module raises as it is imported
                why = f"the task {name!r} ({point.value}) cannot be loaded"
                raise ConfigError([f"{why}: {type(e).__name__}: {e}"]) from e
            return _added[name]()
    raise ConfigError([f"model.task = {name!r}: no such task in this process; register_task first"])


def _lacking(cls: type[Any]) -> list[str]:
    """The parts of a task that a class has not."""
    methods = [name for name, x in vars(Task).items() if inspect.isfunction(x) and name[0] != "_"]
    parts = [*inspect.get_annotations(Task), *methods]
    return [part for part in parts if not hasattr(cls, part)]


__all__ = ["TASKS", "Task", "register_task", "task_of"]
