"""Chance on every device: dropout from the device's own generator, all else from the host's.

with own_draws([device], seed): ...          dropout, from a stream of its own
with host_draws(device, seed): ...           first weights, the same on every device
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fedlora.training.devices import HOST, is_host, module_of, on_host

ROUNDED = ("erfinv", "erfinv_", "linalg_qr")
"""What a first weight goes through beside its draw that kernels round each in their way: truncated
normal numbers (by older versions of torch), orthogonal columns. A sum or product of two numbers is
the same everywhere."""


@contextlib.contextmanager
def own_draws(devices: Sequence[torch.device], seed: int) -> Iterator[None]:
    """Within it, whatever is drawn on the devices or the host follows from the seed alone.

    After it their generators are as before. A card's numbers are not the host's of the same seed.
    """
    cards = [device for device in devices if not is_host(device)]
    kind = {"device_type": cards[0].type} if cards else {}  # older torch takes no None
    with torch.random.fork_rng(devices=[d.index or 0 for d in cards], **kind):
        torch.default_generator.manual_seed(seed)
        for n, device in enumerate(cards):
            _seed(device, seed + n)
        yield


def _seed(device: torch.device, seed: int) -> None:
    """Seed one card's generator, and no other's."""
    module = module_of(device)
    if hasattr(module, "device"):  # a context that makes a card the current one
        with module.device(device):
            module.manual_seed(seed)
    else:
        module.manual_seed(seed)


@contextlib.contextmanager
def host_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Within it, what is drawn on the device is drawn on the host and moved there.

    So first weights are the same numbers on every device. After it the host's generator is as
    before; the device's is not touched. No place for a pass of the model: torch counts attention
    among what draws, and the host has not a card's kernels of it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        with contextlib.nullcontext() if is_host(device) else _DrawnOnHost():  # type: ignore[no-untyped-call]
            yield


class _DrawnOnHost(TorchDispatchMode):
    """Carries each random operation out on the host, and those of ROUNDED."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        if torch.Tag.nondeterministic_seeded not in func.tags and name not in ROUNDED:
            return func(*args, **kwargs)
        given = next((x for x in args if isinstance(x, Tensor)), None)
        device = kwargs.get("device") or (given.device if given is not None else HOST)
        device = torch.device(device)
        if is_host(device) or device.type == "meta":
            return func(*args, **kwargs)
        host_args, host_kwargs = tree_map_only(Tensor, on_host, (args, kwargs))
        if "device" in host_kwargs:
            host_kwargs = {**host_kwargs, "device": HOST}
        drawn = func(*host_args, **host_kwargs)
        if given is not None and name.endswith("_"):
            given.copy_(drawn)
            return given
        return tree_map_only(Tensor, lambda x: x.to(device), drawn)
