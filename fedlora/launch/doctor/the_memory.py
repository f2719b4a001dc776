"""The devices of this machine, and whether what a client needs fits there."""

from collections.abc import Iterator, Sequence

import torch

from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.launch.doctor.finding import Finding
from fedlora.launch.simulate.cards import card_workers, workers_of
from fedlora.training.devices import (
    HOST,
    OutOfMemory,
    found,
    fresh,
    is_host,
    memory_of,
    name_of,
)
from fedlora.training.footprint import Footprint, footprint
from fedlora.training.model.model import Model

LESS = "set train.gradient-checkpointing, or use a smaller base"
RESERVE = 0.1
"""Of a device's free memory, what is left alone: torch's own, and what the allocator cuts off."""


def machine_devices() -> Finding:
    """What torch can compute on here beside the host."""
    devices = [d for d in found("auto") if not is_host(d)]
    if not devices:
        return Finding("ok", "no accelerator that torch knows: everything runs on the host")
    each = (f"{name_of(d)}, {_gb(memory_of(d).total)}" for d in devices)
    return Finding("ok", f"accelerators: {'; '.join(each)}")


def crew(config: Config) -> Iterator[Finding]:
    """The workers of a simulation on several cards, or why there cannot be so many."""
    try:
        further = card_workers(config)
    except ConfigError as e:
        yield from (Finding("problem", problem) for problem in e.problems)
        return
    if further:
        each = ", ".join(x.device for x in further)
        yield Finding("ok", f"workers: {len(further) + 1}, the server's process and one on {each}")


def fits(model: Model, config: Config, in_flight: int) -> Iterator[Finding]:
    """Whether a client fits on its device, and all of it into this machine's memory.

    in_flight: bytes of messages that are under way at once.
    """
    try:
        need = footprint(model, config)
    except OutOfMemory:
        what = f"{name_of(model.device)}: not two {_what(model, config)} fit beside the base"
        yield Finding("problem", what, _less(model))
        return
    size = _examples(config)
    clients = workers_of(config)
    if not is_host(model.device):
        alone = [[card] for card in found(config.simulate.devices)[:clients]]
        for cards in alone if len(model.devices) == 1 else [model.devices]:
            yield _on_cards(model, config, need, cards)
    bases = 1 + (len(fresh(config.simulate.devices, clients)) if is_host(model.device) else 0)
    here = bases * need.frozen + clients * (need.trained + need.activations(size))
    total = (here if is_host(model.device) else 0) + 2 * in_flight + 5e8
    have = memory_of(HOST).free
    shorter = "" if model.task.pictured else ", data.max-length"
    yield Finding(
        "ok" if total < have else "problem",
        f"memory: about {total / 1e9:.1f} GB needed, {have / 1e9:.1f} GB available",
        "" if total < have else f"lower train.batch-size{shorter} or clients.ranks",
    )


def _on_cards(
    model: Model, config: Config, need: Footprint, cards: Sequence[torch.device]
) -> Finding:
    """What a client needs on its card, or on those that the base is spread over.

    The server's has the base already.
    """
    size = _examples(config)
    there = need.frozen if cards[0] == model.device else 0
    free = int((1 - RESERVE) * sum(memory_of(d).free for d in cards)) + there
    said = (
        f"{', '.join(map(name_of, cards))}: a client needs {_gb(need.of(size))} "
        f"(base {_gb(need.frozen)}; "
        f"factors, gradients and optimiser {_gb(need.trained)}; {size} {_what(model, config)} "
        f"{_gb(need.activations(size))}), "
        f"{_gb(free)} are free"
    )
    most = need.fitting(free)
    if most >= size:
        clients = (free - need.frozen) // max(1, need.trained + need.activations(size))
        fit = f"in one batch {most} examples would fit, or {clients} such clients beside one base"
        return Finding("ok", f"{said}; {fit} (one trains at a time)")
    if most:
        return Finding("problem", said, f"set train.microbatch = {most}")
    return Finding("problem", said, _less(model))


def _what(model: Model, config: Config) -> str:
    """What the examples are that were measured."""
    if model.task.pictured:
        return "pictures"  # of the one size that the base's image processor makes
    return f"examples of {model.longest(config.data.max_length)} tokens"


def _less(model: Model) -> str:
    return LESS if model.task.pictured else f"lower data.max-length, {LESS}"


def _examples(config: Config) -> int:
    """Examples in memory at once, at most."""
    train = config.train
    if config.privacy.by_example and config.privacy.microbatch:
        return config.privacy.microbatch  # filled up to it, whatever a step draws
    return min(train.microbatch or train.batch_size, train.batch_size)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
