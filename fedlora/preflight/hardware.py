"""What needs an accelerator, or a package that is not everywhere, and what it does not go with.

Every process asks of itself, before it loads anything: a simulation, the doctor, a server, a node.
A server trains one step before round 1, as a check, so it needs what its clients need.
docs/gpu.md has the table.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which

import torch

from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.federation.server.ranks import BY_MODULE
from fedlora.training.devices import (
    chosen,
    compiles_with,
    found,
    has_kernels,
    is_host,
    repeats_draws,
)
from fedlora.training.user_code import is_code

PROFILES = 8
"""Rank profiles whose adapters stay attached: training/model/model.py."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a setting needs: one of some packages, and perhaps a card."""

    what: str
    packages: tuple[str, ...]
    install: str
    instead: str
    on_card: bool = False
    kernels: str = ""
    """What a kind of device may have no kernels for, as `devices` calls it."""


def needs(config: Config) -> Iterator[Need]:
    """What the config's settings need beyond fedlora's own dependencies."""
    model, train = config.model, config.train
    stored, optimizer = model.quantization, train.optimizer
    if stored != "none":
        package = "torchao" if stored == "int8" else "bitsandbytes"
        what = f"model.quantization = {stored!r}"
        yield Need(what, (package,), "'fedlora[quantized]'", "'none'")
    if optimizer.endswith(("8bit", "32bit")):
        what, paged = f"train.optimizer = {optimizer!r}", optimizer.startswith("paged")
        instead = "'adamw_8bit' or 'adamw'" if paged else "'adamw'"
        kernels = "paged states" if paged else "8-bit states"
        yield Need(what, ("bitsandbytes",), "'fedlora[quantized]'", instead, paged, kernels)
    if model.attention == "flash_attention_2":
        what = f"model.attention = {model.attention!r}"
        packages, name = ("flash_attn", "kernels"), "flash-attn"
        yield Need(what, packages, name, "'sdpa'", on_card=True, kernels=name)
    if model.liger:
        name = "liger-kernel"
        yield Need("model.liger = true", ("liger_kernel",), name, "false", True, kernels=name)


def problems(config: Config) -> Iterator[str]:
    """Each setting that this machine cannot serve, or that goes with another, and what to do."""
    device = _device(config)
    for need in needs(config):
        if device and not has_kernels(device, need.kernels):
            yield (
                f"{need.what}: there are no kernels of {need.kernels} for this process's device, "
                f"{device}; set it to {need.instead}"
            )
        elif need.on_card and _on_host(config):
            yield (
                f"{need.what}: is for an accelerator, and this process computes on the host; set "
                f"it to {need.instead}"
            )
        elif not any(find_spec(name) for name in need.packages):
            yield (
                f"{need.what}: needs {need.packages[0]}, which is not installed; pip install "
                f"{need.install}, or set it to {need.instead}"
            )
    if config.model.attention == "flash_attention_2" and _all_float32(config):
        yield (
            "model.attention = 'flash_attention_2': computes in 16 bits alone; set "
            "train.precision or model.dtype = 'bfloat16'"
        )
    dropout = config.lora.dropout > 0 or config.model.dropout != 0
    if config.train.gradient_checkpointing and dropout and device and not repeats_draws(device):
        yield (
            f"train.gradient-checkpointing = true: on {device.type} torch draws other dropout when "
            "a layer is computed again, so gradients would be wrong; set it to false, or "
            "model.dropout = 0 and lora.dropout = 0"
        )
    if config.model.device_map != "none":
        yield from _spread(config)
    if config.train.compile:
        yield from _compiled(config)
    if config.model.liger and is_code(config.model.path):
        yield f"model.liger = true: {config.model.path} makes the model as it is to be"
    if config.train.precision == "float16" and config.privacy.by_example:
        yield (
            "train.precision = 'float16' with privacy.level = 'example': the scale of its "
            "gradients follows all examples of the steps before, which no noise covers; use "
            "'bfloat16' or 'float32'"
        )


def _spread(config: Config) -> Iterator[str]:
    """What a base over several devices does not go with."""
    what = "model.device-map = 'auto'"
    asked = config.simulate.devices
    if is_code(config.model.path):
        yield f"{what}: {config.model.path} makes the model as it is to be; set it to 'none'"
    elif _count(asked) == 1:
        yield f"{what}: simulate.devices = {asked!r} is one device; set it to 'none'"
    if config.train.prefix_cache:
        yield f"{what} with train.prefix-cache: what it remembers lies on one card; set that to 0"
    if config.simulate.workers > 1:
        yield (
            f"{what} with simulate.workers = {config.simulate.workers}: each would have a base of "
            "its own; set that to 1"
        )


def _compiled(config: Config) -> Iterator[str]:
    """What compiled layers need, and what they do not go with."""
    what = "train.compile = true"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    device = _device(config)
    by = compiles_with(device) if device else "triton"
    here = by != "triton" or bool(find_spec("triton"))
    if by == "c++":
        here = any(which(name) for name in compilers if name)
    if not here:
        yield (
            f"{what}: on the host torch needs a C++ compiler such as g++, on most accelerators the "
            "package triton; install it, or set it to false"
        )
    if is_code(config.model.path):
        yield f"{what}: {config.model.path} does not say which of its modules are layers"
    if config.privacy.by_example:
        yield (
            f"{what} with privacy.level = 'example': its gradients are taken apart in code that a "
            "compiled backward pass does not run; set it to false"
        )
    if config.train.prefix_cache or config.model.device_map != "none":
        yield (
            f"{what} with train.prefix-cache or model.device-map: what stands in for a layer, or "
            "moves its inputs, would have it compiled anew; set it to false"
        )
    if config.model.quantization != "none" or config.lora.target_parameters:
        yield (
            f"{what} with model.quantization or lora.target-parameters: not tried; set it to false"
        )
    if config.ranks.policy in BY_MODULE or len(set(config.clients.ranks)) > PROFILES:
        yield (
            f"{what}: each of more than {PROFILES} rank profiles, as of a ranks.policy that gives "
            "ranks by module, would be compiled again and again; set it to false"
        )


def _count(asked: str) -> int:
    """How many devices these are; 0 where they are none of this machine, as is said elsewhere."""
    try:
        return len(found(asked))
    except ConfigError:
        return 0


def _device(config: Config) -> torch.device | None:
    """What this process computes on; None where it is not there, which is refused elsewhere."""
    try:
        return chosen(config.simulate.devices)
    except ConfigError:
        return None


def _on_host(config: Config) -> bool:
    device = _device(config)
    return device is not None and is_host(device)


def _all_float32(config: Config) -> bool:
    return config.model.dtype == "float32" and config.train.precision == "float32"
