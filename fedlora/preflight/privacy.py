"""Settings that no privacy guarantee covers: docs/privacy/index.md."""

from collections.abc import Iterator
from typing import Any

from fedlora.config.reader import Config
from fedlora.privacy.delta import delta_problem
from fedlora.strategies.base import Strategy


def problems(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """Each combination of settings that no privacy guarantee covers, and what to do instead."""
    p = config.privacy
    if p.epsilon and p.noise_multiplier:
        yield (
            "privacy.epsilon and privacy.noise-multiplier are both set: the one follows from the "
            "other; set one of them to 0"
        )
    if p.level == "client" and not p.on:
        yield "privacy.level = 'client': needs privacy.epsilon or privacy.noise-multiplier"
    if p.insecure_reproducible_noise and not p.on:
        yield "privacy.insecure-reproducible-noise = true: there is no noise; privacy is off"
    if p.max_epsilon and (not p.by_example or p.release_metrics or p.insecure_reproducible_noise):
        yield (
            f"privacy.max-epsilon = {p.max_epsilon:g} is this node's limit: it takes part only at "
            "privacy.level = 'example', without release-metrics and insecure-reproducible-noise"
        )
    if not p.on:
        return
    if strategy.needs().first_gradient:
        yield (
            f"strategy.name = {config.strategy.name!r}: this initialisation sends gradients "
            "without noise; choose another, such as strategy.fedsb.init-from = 'svd-w0'"
        )
    if strategy.needs().client_choice == "gradient":
        yield (
            f"strategy.name = {config.strategy.name!r}: which ranks a client sends would say where "
            "its gradient is largest, without noise; choose otherwise, such as by "
            "strategy.ravan.choice = 'random'"
        )
    if config.lora.by_gradient:
        yield (
            f"lora.form = {config.lora.form!r} with choice=gradient: sends each client's first "
            "gradient without noise; use choice=weight in lora.options"
        )
    yield from (_by_example if p.by_example else _by_client)(config, strategy)


def _by_example(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    if strategy.needs().scaled_blocks:
        yield (
            f"strategy.name = {config.strategy.name!r}: a core's scales have no per-example "
            "gradients; leave strategy.ravan.head-scales out, or use privacy.level = 'client'"
        )
    if config.lora.form != "lora":
        yield (
            f"lora.form = {config.lora.form!r}: only LoRA factors and linear heads have "
            "per-example gradients; use lora.form = 'lora', or privacy.level = 'client'"
        )
    if config.model.quantization == "8bit":
        yield (
            "model.quantization = '8bit' with privacy.level = 'example': bitsandbytes chooses the "
            "columns that it leaves unrounded by all examples of a batch, so none has a gradient "
            "of its own; use '4bit' or 'int8'"
        )
    if config.privacy.clip_quantile:
        yield "privacy.clip-quantile: adaptive clipping is for privacy.level = 'client' only"


def _by_client(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    if problem := delta_problem(config):
        yield problem
    if strategy.needs().collect_at_end:
        yield (
            f"strategy.name = {config.strategy.name!r}: it collects at the end what clients kept, "
            "without noise; turn that off, as by strategy.fedsa.average-at-end = false"
        )
    if config.output.keep_updates:
        yield "output.keep-updates = true: it keeps each client's update as it came, un-noised"
    if config.robust.method != "none":
        yield (
            f"robust.method = {config.robust.method!r}: which updates it lets count depends on "
            "all of them, which no clipping bounds; the clipping of each limits its harm already"
        )
    if config.privacy.microbatch:
        yield "privacy.microbatch: is for privacy.level = 'example' only"
    if config.privacy.sample_rate and config.clients.per_round:
        yield (
            "privacy.sample-rate and clients.per-round are both set: under privacy.level = "
            "'client' the first samples clients at random, the second takes so many; set one"
        )
