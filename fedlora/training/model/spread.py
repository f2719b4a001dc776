"""Where the parts of one base lie, over several cards: its layers spread, all else on the first.

    {"model.embed_tokens": card 0, "model.layers.0": card 0, "model.layers.1": card 1, ...}

So what comes in and goes out lies on the first card, as of a base on one; a layer takes what it is
given over to its own, and the last one gives its result back to the first. The first card's share
of layers is smaller by what else it holds.

accelerate's own hooks, by which transformers does the same, are taken off: they are on every module
within a layer as well, which then could not be measured on the host, and stand in for its forward.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

from fedlora.errors import ModelError


def device_map(made: Any, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """The device of every part of a model, which may be on the meta device, by its path.

    Raises:
        ModelError: it has no stack of layers that could be spread.
    """
    path, layers = layers_of(made, "model.device-map = 'auto'", "'none'")
    found = dict.fromkeys(_others(made, path), devices[0])
    sizes = [_bytes(x) for x in layers]
    rest = _bytes(made) - sum(sizes)
    share, filled = (rest + sum(sizes)) / len(devices), float(rest)
    for i, size in enumerate(sizes):
        at = min(len(devices) - 1, int((filled + size / 2) // share))
        found[f"{path}.{i}"] = devices[at]
        filled += size
    return found


def connect(model: Any, devices: Sequence[torch.device]) -> None:
    """Have each layer of a model that was loaded so take its inputs to where it lies."""
    remove_hook_from_submodules(model)
    _, layers = layers_of(model, "model.device-map = 'auto'", "'none'")
    for layer in layers:
        own = next(layer.parameters()).device
        layer.register_forward_pre_hook(partial(_over, own), with_kwargs=True)
    layers[-1].register_forward_hook(lambda _, __, y: _moved(y, devices[0]))


def _over(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _moved(args, device), _moved(kwargs, device)


def _moved(x: Any, device: torch.device) -> Any:
    """The same tuple, list, dict or tensor with each tensor on a device; all else as it is."""
    if isinstance(x, Tensor):
        return x.to(device)
    if type(x) in (tuple, list):
        return type(x)(_moved(y, device) for y in x)
    if type(x) is dict:
        return {key: _moved(y, device) for key, y in x.items()}
    return x


def layers_of(made: Any, what: str, instead: str) -> tuple[str, nn.ModuleList]:
    """The longest list of modules of a kind that may not be split, and its path.

    Raises:
        ModelError: it has none, which `what` needs.
    """
    kinds = set(getattr(made, "_no_split_modules", None) or ())
    lists = [(name, x) for name, x in made.named_modules() if isinstance(x, nn.ModuleList)
             and len(x) > 1 and type(x[0]).__name__ in kinds]  # fmt: skip
    if not lists:
        raise ModelError(
            f"{what}: {type(made).__name__} does not say which of its modules are layers; set it "
            f"to {instead}"
        )
    return max(lists, key=lambda found: len(found[1]))


def _others(module: nn.Module, layers: str, prefix: str = "") -> Iterator[str]:
    """The paths of all that lies beside the layers, each as high up as it can be."""
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name
    for name, child in module.named_children():
        path = prefix + name
        if layers.startswith(f"{path}."):
            yield from _others(child, layers, f"{path}.")
        elif path != layers:
            yield path


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
