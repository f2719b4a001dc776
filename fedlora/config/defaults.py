"""Defaults that depend on other keys: without example-level DP, and with it.

DP wants few trained numbers and few large steps.

    key                  without DP      under example-level DP
    train.optimizer      adamw           sgd
    train.momentum       0               0.8
    train.lr             2e-3            3 / clip-norm, 1 / clip-norm at epsilon <= 1; adamw 1e-2
    model.pooling        default         mean, whose head starts at zero
    lora.layers          all             the last

The values under DP are the ones found with simulations/experiments/privacy.toml, whose head says
what was tried; docs/results/privacy.md says what they are worth. Whatever an experiment sets stays.
"""

from fedlora.config.privacy_sections import PrivacyConfig
from fedlora.config.sections import LoraConfig, ModelConfig, TrainConfig
from fedlora.config.task_names import kind_of

AUTO = "auto"


def resolve_defaults(
    train: TrainConfig, model: ModelConfig, lora: LoraConfig, p: PrivacyConfig
) -> tuple[TrainConfig, ModelConfig, LoraConfig]:
    """The sections with these defaults filled in; what was set stays."""
    private, optimizer = p.by_example, train.optimizer
    if optimizer == AUTO:
        optimizer = "sgd" if private else "adamw"
    momentum = train.momentum
    if momentum < 0:
        momentum = 0.8 if private and optimizer == "sgd" else 0.0
    lr = train.lr or 2e-3
    if private and not train.lr:
        step = 1.0 if 0 < p.epsilon <= 1 else 3.0
        lr = step / p.clip_norm if optimizer == "sgd" else 1e-2
    pooling, layers = model.pooling, lora.layers
    if pooling == AUTO:
        own = model.path.startswith("py:")  # a whole model, with a head
        mean = private and kind_of(model.task).pooled and not own
        pooling = "mean" if mean else "default"
    if layers == (AUTO,):
        layers = ("-1",) if private else ()
    return (
        train.model_copy(update={"optimizer": optimizer, "momentum": momentum, "lr": lr}),
        model.model_copy(update={"pooling": pooling}),
        lora.model_copy(update={"layers": layers}),
    )
