"""The devices that torch computes on: which there are, and all that is done differently on each.

    device = chosen(config.simulate.devices)     the host, or a card of this machine
    with own_draws([device], seed): ...          dropout, from a stream of its own
    with host_draws(device, seed): ...           first weights, the same on every device

No other file of fedlora names a kind of device. What is inside `Model` lies on its device; what
comes out of it, and all that servers, strategies, files and messages are made of, is on the host.

    auto        the machine's accelerator, as torch finds it, or the host where there is none
    cpu         the host
    cuda        all cards of this kind (also ROCm's); "cuda:0,1" those two
    mps, xpu    Apple's and Intel's

One process computes on one device: the first of those that it may use. A simulation on several
cards has a process for each.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fedlora.config import processes
from fedlora.errors import ConfigError

HOST = torch.device("cpu")
AUTO = "auto"
OutOfMemory = torch.OutOfMemoryError
"""What torch raises where a card's memory does not suffice."""


# -- which ----------------------------------------------------------------------------------------


def found(asked: str) -> list[torch.device]:
    """The devices that simulate.devices, or a node's own `devices`, asks for; one at least.

    Raises:
        ConfigError: it is no device of this machine.
    """
    here = torch.accelerator.current_accelerator()
    count = _module(here).device_count() if here is not None else 0
    if asked == HOST.type or (asked == AUTO and not count):
        return [HOST]
    kind, _, numbers = asked.partition(":")
    if here is None or not count or kind not in (AUTO, here.type):
        own = f"{here.type} ({count} of them)" if here is not None and count else "none"
        what = f"this machine's accelerator is {own}"
        raise ConfigError([f"simulate.devices = {asked!r}: {what}; set it to {AUTO!r}"])
    wanted = [int(n) for n in numbers.split(",")] if numbers else [*range(count)]
    if missing := [n for n in wanted if n >= count]:
        what = f"there is no {here.type}:{missing[0]}; they are numbered from 0 to {count - 1}"
        raise ConfigError([f"simulate.devices = {asked!r}: {what}"])
    return [torch.device(here.type, n) for n in wanted]


def chosen(asked: str) -> torch.device:
    """The device of this process: the first that is asked for.

    Raises:
        ConfigError: it is no device of this machine.
    """
    return found(asked)[0]


def used(asked: str, spread: bool) -> tuple[torch.device, ...]:
    """The devices of this process's one base: the first that is asked for, or all of them."""
    return tuple(found(asked)) if spread else (chosen(asked),)


def is_host(device: torch.device) -> bool:
    return device.type == HOST.type


def prepare(device: torch.device, deterministic: bool) -> None:
    """Make a card compute as the config says, whatever other libraries have set. Cheap.

    float32 products are float32 (no TF32). The host needs nothing: it computes so anyway.
    """
    if is_host(device):
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = str(int(deterministic))  # transformers asks it
    use(device)


def use(device: torch.device | str) -> None:
    """Make a card the process's current one, so that no library begins with another."""
    device = torch.device(device)
    if (choose := getattr(_module(device), "set_device", None)) is not None:
        choose(device)


def workers(asked: int, devices: str, spread: bool = False) -> int:
    """Processes of a simulation in which clients train, the server's among them on a card.

    On the host as `processes.workers` says. On cards 0 is one for each, 1 the server's alone, as
    is a base that is spread over them.

    Raises:
        ConfigError: more than there are devices: two on one card would be two bases there.
    """
    cards = found(devices)
    if is_host(cards[0]):
        return processes.workers(asked)
    if asked > len(cards):
        has = ", ".join(map(str, cards))
        what = f"one worker a device, and simulate.devices = {devices!r} has {len(cards)} ({has})"
        raise ConfigError([f"simulate.workers = {asked}: {what}; set it to 0, one for each"])
    if asked > 1:
        return processes.workers(asked)
    if spread:
        return 1
    return asked or (len(cards) if processes.can_fork() else 1)


def visible(cards: Sequence[torch.device]) -> dict[str, str]:
    """The environment of processes that see these cards only, numbered from 0 anew.

    Nothing where they are all that this process sees.

    Raises:
        ConfigError: they are some of a kind whose drivers, or Ray, have no variable for it.
    """
    kind = cards[0].type
    count = _module(cards[0]).device_count()
    if [card.index for card in cards] == [*range(count)]:
        return {}
    if kind != "cuda":
        what = f"Flower's engine cannot be given some of this machine's {kind} cards"
        raise ConfigError([f"simulate.devices: {what}; set it to {kind!r}, or leave --engine out"])
    variable = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
    seen = os.environ.get(variable) or ",".join(map(str, range(count)))
    names = seen.split(",")
    return {variable: ",".join(names[card.index or 0] for card in cards)}


def check_fork() -> None:
    """Raises ConfigError where this process has begun to compute on a card: its copy could not."""
    here = torch.accelerator.current_accelerator()
    begun = getattr(_module(here), "is_initialized", None) if here is not None else None
    if here is not None and begun is not None and begun():
        what = f"{here.type} cannot be used in a copy of a process that has used it"
        raise ConfigError([f"simulate.workers: {what}; set it to 1, or simulate.devices to 'cpu'"])


# -- what they are --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a device, in bytes."""

    free: int
    total: int


def name_of(device: torch.device) -> str:
    """What its maker calls it: "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    ask = None if is_host(device) else getattr(_module(device), "get_device_name", None)
    return f"{device} ({ask(device)})" if ask else str(device)


def memory_of(device: torch.device) -> Memory:
    """What a device has, and what of it is free; the host's own for the host."""
    if is_host(device):
        host = psutil.virtual_memory()
        return Memory(int(host.available), int(host.total))
    module = _module(device)
    if hasattr(module, "mem_get_info"):
        return Memory(*module.mem_get_info(device))
    total = int(module.recommended_max_memory())
    return Memory(max(0, total - int(module.driver_allocated_memory())), total)


def lacks_bfloat16(device: torch.device) -> str | None:
    """Why a card does not multiply bfloat16 by itself; None where it does."""
    ask = getattr(_module(device), "is_bf16_supported", None)
    if ask is None:
        return f"torch does not say whether {device.type} multiplies bfloat16"
    return None if ask(False) else f"{name_of(device)} does not multiply bfloat16"


def most_used(device: torch.device) -> int:
    """The most bytes of a card's memory that tensors had at once since `forget_most`; 0 of the
    host and where torch does not count."""
    ask = None if is_host(device) else getattr(_module(device), "max_memory_allocated", None)
    return int(ask(device)) if ask else 0


def forget_most(device: torch.device) -> None:
    """Count the most that is used from now on."""
    if not is_host(device) and hasattr(_module(device), "reset_peak_memory_stats"):
        _module(device).reset_peak_memory_stats(device)


def release(device: torch.device) -> None:
    """Give the memory that torch holds back to the card, after it ran out or where it idles."""
    if not is_host(device):
        _module(device).empty_cache()


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


# -- to and from ----------------------------------------------------------------------------------


def on_host(x: Tensor) -> Tensor:
    """A tensor's numbers on the host; itself where it is there."""
    return x.detach().to(HOST)


def wide_on_host(x: Tensor) -> Tensor:
    """The same in float64, which not every device has: over first, then widened."""
    return on_host(x).double()


def counts_wide(device: torch.device) -> bool:
    """Has it float64? Apple's cards have none."""
    if is_host(device):
        return True
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items()}


def norm_of(x: Tensor) -> float:
    """The Frobenius norm; on the host in float64, on a card without a copy, in float32."""
    if is_host(x.device):
        return float(x.detach().double().norm())
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float32))


# -- chance ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_draws(devices: Sequence[torch.device], seed: int) -> Iterator[None]:
    """Within it, whatever is drawn on the devices or the host follows from the seed alone.

    After it their generators are as before. A card's numbers are not the host's of the same seed.
    """
    cards = [device for device in devices if not is_host(device)]
    kind = cards[0].type if cards else None
    with torch.random.fork_rng(devices=[d.index or 0 for d in cards], device_type=kind):
        torch.default_generator.manual_seed(seed)
        for n, device in enumerate(cards):
            _seed(device, seed + n)
        yield


def _seed(device: torch.device, seed: int) -> None:
    """Seed one card's generator, and no other's."""
    module = _module(device)
    if hasattr(module, "device"):  # a context that makes a card the current one
        with module.device(device):
            module.manual_seed(seed)
    else:
        module.manual_seed(seed)


@contextlib.contextmanager
def host_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Within it, what is drawn on the device is drawn on the host and moved there.

    So first weights are the same numbers on every device. After it the host's generator is as
    before; the device's is not touched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        with contextlib.nullcontext() if is_host(device) else _DrawnOnHost():  # type: ignore[no-untyped-call]
            yield


class _DrawnOnHost(TorchDispatchMode):
    """Carries each random operation out on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
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
        if given is not None and func.__name__.split(".")[0].endswith("_"):
            given.copy_(drawn)
            return given
        return tree_map_only(Tensor, lambda x: x.to(device), drawn)


# -- time -----------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if is_host(device):
        return
    wait = _module(device).synchronize
    wait() if device.type == "mps" else wait(device)


class Stopwatch:
    """Seconds of named stretches of a device's work, read once at the end: no step waits for it.

    A call returns before a card has done its work, so a clock read beside it says little.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stretches: dict[str, list[tuple[Any, Any]]] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """What is given to the device within it is one stretch of this name."""
        begun = self._mark()
        yield
        self._stretches.setdefault(name, []).append((begun, self._mark()))

    def seconds(self, name: str) -> float:
        """The sum of the stretches of this name. Waits for the device."""
        synchronise(self.device)
        stretches = self._stretches.get(name, [])
        if is_host(self.device):
            return float(sum(end - begun for begun, end in stretches))
        return float(sum(begun.elapsed_time(end) for begun, end in stretches) / 1e3)

    def _mark(self) -> Any:
        if is_host(self.device):
            return time.perf_counter()
        module = _module(self.device)
        event = (getattr(module, "Event", None) or module.event.Event)(enable_timing=True)
        event.record()
        return event


# -- precision ------------------------------------------------------------------------------------


def in_dtype(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in this dtype on this device, without a cache of casts: see precision.py."""
    low = dtype != torch.float32
    used = dtype if low else torch.bfloat16  # which is then not used
    return torch.autocast(device.type, dtype=used, enabled=low, cache_enabled=False)


def casts(device: torch.device) -> str:
    """What autocast does on this device now: "" or the name of its dtype."""
    if not torch.is_autocast_enabled(device.type):
        return ""
    return str(torch.get_autocast_dtype(device.type))
