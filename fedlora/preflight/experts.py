"""What experts of a mixture, which lora.target-parameters names, do not go with.

PEFT adds their change to the stacked weights in every forward pass, not to a module's output, and
which tokens an expert gets is decided inside.
"""

from collections.abc import Iterator
from typing import Any

from fedlora.config.reader import Config
from fedlora.federation.server.ranks import BY_MODULE
from fedlora.strategies.base import Strategy

UNSEEN = ("eva", "corda")
"""Initialisations from each layer's own inputs."""


def problems(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """Why experts cannot be adapted under these settings, and what to do instead."""
    lora, model = config.lora, config.model
    if not lora.target_parameters:
        return
    what = "lora.target-parameters"
    if lora.form != "lora":
        yield f"{what} with lora.form = {lora.form!r}: PEFT has LoRA alone for experts; use 'lora'"
    if lora.dropout:
        yield (
            f"{what} with lora.dropout = {lora.dropout:g}: the change is added to weights, which "
            "have no inputs to drop; set it to 0"
        )
    if lora.init in UNSEEN:
        yield (
            f"{what} with lora.init = {lora.init!r}: looks at each layer's inputs, and an expert's "
            "are chosen inside its module; use default, pissa, olora or lora_ga"
        )
    if model.quantization != "none":
        yield (
            f"{what} with model.quantization = {model.quantization!r}: experts are no modules that "
            "it could quantise and keep a change beside; set it to 'none'"
        )
    elif model.merge == "keep-as-adapter" or (model.merge == "auto" and model.dtype != "float32"):
        yield (
            f"{what} with model.merge = {model.merge!r} and model.dtype = {model.dtype!r}: an "
            "expert has no output of its own to add a kept change to; set model.merge = "
            "'into-base', or model.dtype = 'float32' with 'auto'"
        )
    if strategy.needs().beside_factors:
        yield (
            f"{what} with strategy.name = {config.strategy.name!r}: it has more than A and B, and "
            "PEFT's code for experts those two alone; use fedavg, fedex, flora or fedsa"
        )
    if config.ranks.policy in BY_MODULE:
        yield (
            f"{what} with ranks.policy = {config.ranks.policy!r}: PEFT holds adapters of one set "
            "of experts at a time, of one rank, and this gives ranks by module; choose another"
        )
    if config.privacy.by_example:
        yield (
            f"{what} with privacy.level = 'example': an expert sees tokens of all examples mixed, "
            "so none has a gradient of its own; use privacy.level = 'client', or leave it empty"
        )
