"""Weights that a model has under two names: its input and output embeddings, tied."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fedlora.errors import ModelError


def check_ties(base: Any, adapted: Iterable[str], whole: Iterable[str]) -> None:
    """Nothing, where no adapted module is tied, and what is trained whole can be held apart.

    A language model's input and output embeddings can: its config says whether they are one.

    Raises:
        ModelError: a module shares a weight with others, and a change of it would be one of them.
    """
    for name in _shared(base, adapted):
        raise ModelError(
            f"{name.rpartition('.')[0]} is tied to {_others(base, name)}: what is merged into one "
            "changes both; take it out of lora.target-modules, or train it whole with "
            "lora.modules-to-save"
        )
    pair = {id(x) for x in _embeddings(base)}
    for name in _shared(base, whole):
        if any(id(x) not in pair for _, x in _owners(base, name)):
            raise ModelError(
                f"{name.rpartition('.')[0]} is tied to {_others(base, name)}, and no export can "
                "hold them apart; take it out of lora.modules-to-save"
            )


def untie(base: Any, changed: Iterable[str]) -> None:
    """Give every changed module a weight of its own, as it is, and have the config say so."""
    for name in _shared(base, changed):
        module, _, tail = name.rpartition(".")
        weight = base.get_parameter(name)
        own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        setattr(base.get_submodule(module), tail, own)
    say_apart(base)


def say_apart(base: Any) -> None:
    """Have the config say that the embeddings are no longer one, where they are not."""
    ends = _embeddings(base)
    tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    if tied and len(ends) == 2 and ends[0].weight is not ends[1].weight:
        base.config.tie_word_embeddings = False
        base.all_tied_weights_keys = {}  # what transformers 5 leaves out when it saves


def input_embedding(base: Any) -> Any:
    """The module with a row for each token id; None where ids go another way: hashes, bytes."""
    try:
        found = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(getattr(found, "weight", None), torch.Tensor) else None


def _embeddings(base: Any) -> list[nn.Module]:
    if not hasattr(base, "get_output_embeddings"):
        return []
    return [x for x in (input_embedding(base), base.get_output_embeddings()) if x is not None]


def _shared(base: nn.Module, changed: Iterable[str]) -> list[str]:
    """Those of these parameters, and of these modules', that other modules have as well."""
    names = [name for name, _ in base.named_parameters(remove_duplicate=False)]
    changed = {*changed}
    inside = [name for name in names if not changed.isdisjoint(_above(name))]
    return [name for name in inside if len(_owners(base, name)) > 1]


def _above(name: str) -> list[str]:
    """The path itself, and the paths of all that it lies in."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _others(base: nn.Module, name: str) -> str:
    module = name.rpartition(".")[0]
    return ", ".join(m for m, _ in _owners(base, name) if m != module)


def _owners(base: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """(module's name, module) of all that have this parameter."""
    wanted: torch.Tensor = base.get_parameter(name)
    return [
        (m, module)
        for m, module in base.named_modules()
        if any(p is wanted for p in module.parameters(recurse=False))
    ]
