"""The devices that torch computes on: which there are, and all that is done differently on each.

    device = chosen(config.simulate.devices)     the host, or a card of this machine

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
    count = module_of(here).device_count() if here is not None else 0
    if asked == HOST.type or (asked == AUTO and not count):
        return [HOST]
    kind, _, numbers = asked.partition(":")
    if here is None or not count or kind not in (AUTO, here.type):
        own = f"{here.type} ({count} of them)" if here is not None and count else "none"
        what = f"this machine's accelerator is {own}"
        raise ConfigError([f"simulate.devices = {asked!r}: {what}; set it to {AUTO!r}"])
    wanted = [int(n) for n in numbers.split(",")] if numbers else [*range(count)]
    if len({*wanted}) < len(wanted):
        raise ConfigError([f"simulate.devices = {asked!r}: names a card twice; name each once"])
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
    # not as a warning: with that the fused attention's backward passes stay as they are
    torch.use_deterministic_algorithms(deterministic)
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = str(int(deterministic))  # transformers asks it
    use(device)


@contextlib.contextmanager
def by_any_algorithm() -> Iterator[None]:
    """Within it a card may compute by algorithms that give other bits each time."""
    asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked)


def use(device: torch.device | str) -> None:
    """Make a card the process's current one, so that no library begins with another."""
    device = torch.device(device)
    if (choose := getattr(module_of(device), "set_device", None)) is not None:
        choose(device)


def workers(asked: int, devices: str, spread: bool = False) -> int:
    """Processes of a simulation in which clients train, the server's among them on a card.

    On the host as `processes.workers` says; but beside a card each has a base of its own there, so
    0 is one. On cards 0 is one for each, 1 the server's alone, as is a base that is spread over
    them.

    Raises:
        ConfigError: more than there are devices: two on one card would be two bases there.
    """
    cards = found(devices)
    if is_host(cards[0]):
        return processes.workers(asked or int(is_beside_card()))
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
    count = module_of(cards[0]).device_count()
    if [card.index for card in cards] == [*range(count)]:
        return {}
    if kind != "cuda":
        what = f"Flower's engine cannot be given some of this machine's {kind} cards"
        raise ConfigError([f"simulate.devices: {what}; set it to {kind!r}, or leave --engine out"])
    variable = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
    seen = os.environ.get(variable) or ",".join(map(str, range(count)))
    names = seen.split(",")
    return {variable: ",".join(names[card.index or 0] for card in cards)}


def fresh(asked: str, count: int) -> list[torch.device]:
    """The devices of those of so many workers that must be processes of their own, started anew.

    All but the server's on cards. All but it on the host too where the machine has a card: once a
    process there has computed gradients, wherever, torch lets no copy of it compute any.
    """
    cards = found(asked)
    if not is_host(cards[0]):
        return cards[1:count]
    return [HOST] * (count - 1) if is_beside_card() else []


def is_beside_card() -> bool:
    """Has this machine an accelerator?"""
    here = torch.accelerator.current_accelerator()
    return here is not None and bool(module_of(here).device_count())


def check_fork(key: str = "simulate.workers") -> None:
    """Raises ConfigError on a machine with a card: a copy of this process may compute nothing."""
    if is_beside_card():
        here = torch.accelerator.current_accelerator()
        what = f"this machine has an accelerator ({here}), and no copy of a process computes beside"
        raise ConfigError([f"{key}: {what} one; set it to 1"])


# -- what they are --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a device, in bytes."""

    free: int
    total: int


def name_of(device: torch.device) -> str:
    """What its maker calls it: "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    ask = None if is_host(device) else getattr(module_of(device), "get_device_name", None)
    return f"{device} ({ask(device)})" if ask else str(device)


def memory_of(device: torch.device) -> Memory:
    """What a device has, and what of it is free; the host's own for the host."""
    if is_host(device):
        host = psutil.virtual_memory()
        return Memory(int(host.available), int(host.total))
    module = module_of(device)
    if hasattr(module, "mem_get_info"):
        return Memory(*module.mem_get_info(device))
    total = int(module.recommended_max_memory())
    return Memory(max(0, total - int(module.driver_allocated_memory())), total)


def lacks_bfloat16(device: torch.device) -> str | None:
    """Why a card does not multiply bfloat16 by itself; None where it does."""
    ask = getattr(module_of(device), "is_bf16_supported", None)
    if ask is None:
        return f"torch does not say whether {device.type} multiplies bfloat16"
    return None if ask(False) else f"{name_of(device)} does not multiply bfloat16"


def counts_memory(device: torch.device) -> bool:
    """Does torch count what tensors take of its memory at most? Not of the host, nor of Apple's."""
    return not is_host(device) and hasattr(module_of(device), "max_memory_allocated")


def most_used(device: torch.device) -> int:
    """The most bytes of a card's memory that tensors had at once since `forget_most`; 0 where
    torch does not count."""
    return int(module_of(device).max_memory_allocated(device)) if counts_memory(device) else 0


def forget_most(device: torch.device) -> None:
    """Count the most that is used from now on."""
    if not is_host(device) and hasattr(module_of(device), "reset_peak_memory_stats"):
        module_of(device).reset_peak_memory_stats(device)


def release(device: torch.device) -> None:
    """Give the memory that torch holds back to the card, after it ran out or where it idles."""
    if not is_host(device):
        module_of(device).empty_cache()


WITHOUT = {"mps": ("8-bit states", "paged states", "flash-attn", "liger-kernel")}
"""What has no kernels for a kind of device: docs/gpu.md says by which source."""


def has_kernels(device: torch.device, what: str) -> bool:
    """Has it kernels for this kind of device, as far as is known?"""
    return what not in WITHOUT.get(device.type, ())


def compiles_with(device: torch.device) -> str:
    """What torch compiles layers by there: a C++ compiler, triton, or "": itself, on Apple's."""
    return {HOST.type: "c++", "mps": ""}.get(device.type, "triton")


def module_of(device: torch.device) -> Any:
    """torch's own module of a kind of device, such as torch.cuda."""
    return torch.get_device_module(device.type)


# -- to and from ----------------------------------------------------------------------------------


def on_host(x: Tensor) -> Tensor:
    """A tensor's numbers on the host; itself where it is there."""
    return x.detach().to(HOST)


def wide_on_host(x: Tensor) -> Tensor:
    """The same in float64, which not every device has: over first, then widened."""
    return on_host(x).double()


def counts_wide(device: torch.device) -> bool:
    """Has it float64? Apple's cards have none, nor have Intel's Arc, which say so themselves."""
    if is_host(device):
        return True
    ask = getattr(module_of(device), "get_device_properties", None)
    if (has := getattr(ask and ask(device), "has_fp64", None)) is not None:
        return bool(has)
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {k: sent(x, device) if isinstance(x, Tensor) else x for k, x in batch.items()}


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for what it has to do before.

    Not on Apple's: torch does not say that what is sent so has left the host when it is let go of.
    """
    return x.to(device, non_blocking=device.type != "mps")


def repeats_draws(device: torch.device) -> bool:
    """Does a checkpointed layer, computed again, draw what it drew before?

    torch puts back the generators of devices whose module says whether they are initialised.
    Apple's does not say.
    """
    return is_host(device) or hasattr(module_of(device), "_initialized")


def norm_of(x: Tensor) -> float:
    """The Frobenius norm; on the host in float64, on a card without a copy, in float32."""
    if is_host(x.device):
        return float(x.detach().double().norm())
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float32))


# -- time -----------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if is_host(device):
        return
    wait = module_of(device).synchronize
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
        module = module_of(self.device)
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
