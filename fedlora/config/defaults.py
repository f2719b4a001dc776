"""What a key left at its default comes to, where that depends on others: training in the clear, and
under example-level DP, which wants few trained numbers and few large steps.

    key                  in the clear    under example-level DP
    train.optimizer      adamw           sgd
    train.momentum       0               0.8
    train.lr             2e-3            3 / clip-norm, 1 / clip-norm at epsilon <= 1; adamw 1e-2
    model.pooling        default         mean, whose head starts at zero
    lora.layers          all             the last

The values under DP are the ones found with simulations/experiments/privacy.toml, whose head says
what was tried; docs/results/privacy.md says what they are worth. Whatever an experiment sets stays.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.config.reader import Config

AUTO = "auto"


def settled(config: "Config") -> "Config":
    """The config with a value for each of those keys; itself where there is nothing to settle."""
    private, train, p = config.privacy.by_example, config.train, config.privacy
    optimizer = train.optimizer
    if optimizer == AUTO:
        optimizer = "sgd" if private else "adamw"
    momentum = train.momentum
    if momentum < 0:
        momentum = 0.8 if private and optimizer == "sgd" else 0.0
    lr = train.lr or 2e-3
    if private and not train.lr:
        step = 1.0 if 0 < p.epsilon <= 1 else 3.0
        lr = step / p.clip_norm if optimizer == "sgd" else 1e-2
    pooling, layers = config.model.pooling, config.lora.layers
    if pooling == AUTO:
        pooling = "mean" if private and config.model.task == "classification" else "default"
    if layers == (AUTO,):
        layers = ("-1",) if private else ()
    return config.model_copy(
        update={
            "train": train.model_copy(
                update={"optimizer": optimizer, "momentum": momentum, "lr": lr}
            ),
            "model": config.model.model_copy(update={"pooling": pooling}),
            "lora": config.lora.model_copy(update={"layers": layers}),
        }
    )
