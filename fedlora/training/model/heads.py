"""Which modules of a model are trained whole: a classifier's head, and what was newly drawn.

A classifier of transformers is a pretrained body and what lies on top of it, under a name of its
architecture's own: `classifier`, `score`, `classification_head`, `pre_classifier`, `pooler`. So the
head is found by its place, never by its name. What the checkpoint lacks inside the body, a pooler
say, was drawn anew at loading, and is trained and exported as a part of the head.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fedlora.config.reader import Config
from fedlora.errors import ModelError
from fedlora.training.tasks import task_of

KNOWN = ("classifier", "score")
"""What a head is called in a model that is none of transformers'."""


def head_names(base: nn.Module, config: Config) -> list[str]:
    """The modules trained whole, by their full names, none inside another.

    Raises:
        ModelError: lora.modules-to-save names none of the model's modules.
    """
    found = [*_heads(base)] if task_of(config.model.task).headed else []
    named = [name for name, _ in base.named_modules()]
    for target in config.lora.modules_to_save:
        matching = [n for n in named if n == target or n.endswith(f".{target}")]
        if not matching:
            raise ModelError(f"lora.modules-to-save: {target} matches no module of this model")
        found += matching
    return [n for i, n in enumerate(found) if not within(n, found[:i]) and not _outer(n, found)]


def within(name: str, modules: Sequence[str]) -> bool:
    """Is it one of these modules, or inside one?"""
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def _outer(name: str, found: Sequence[str]) -> bool:
    """Is it inside another of them?"""
    return any(name != m and name.startswith(f"{m}.") for m in found)


def _heads(base: nn.Module) -> Iterator[str]:
    if not isinstance(base, PreTrainedModel):
        yield from (name for name in KNOWN if hasattr(base, name))
        return
    body = base.base_model
    for name, module in base.named_children():
        if module is not body and any(True for _ in module.parameters()):
            yield name
    yield from drawn(base)


def drawn(base: Any) -> Iterator[str]:
    """The modules inside the body whose tensors the checkpoint lacks, as full names."""
    modules = dict.fromkeys(key.rpartition(".")[0] for key in getattr(base, "newly_drawn", ()))
    yield from (m for m in modules if m)
