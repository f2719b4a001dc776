"""Defaults that depend on other keys: on the strategy, and on example-level DP.

DP wants few trained numbers and few large steps.

    key                without DP          under example-level DP
    train.optimizer    adamw               sgd
    train.momentum     0                   0.8
    train.lr           the strategy's      3 / clip-norm, 1 / clip-norm at epsilon <= 1;
                                           1e-2 with adamw
    model.pooling      default             mean, whose head starts at zero
    lora.layers        all                 the last
    lora.init          the strategy's      the strategy's
    lora.alpha         the strategy's      the strategy's

The values under DP are the ones found with simulations/experiments/privacy.toml, whose head says
what was tried; docs/results/privacy.md says what they are worth. A strategy's are its `defaults`
(fedlora/strategies/defaults.py). No rate was searched with sgd without DP: there it is the task's.

model.dropout is 0 of a task that compares with a reference, which knows none; else the model's own.
Whatever an experiment sets stays; fedlora/config/origins.py records what it did not.
"""

from fedlora.config.privacy_sections import PrivacyConfig
from fedlora.config.sections import LoraConfig, ModelConfig, TrainConfig
from fedlora.config.task_names import kind_of
from fedlora.strategies.defaults import FAMILIES, FEW_MODULES, Defaults, rate

AUTO = "auto"
NONE = Defaults()
"""Of a strategy that declares none."""


def rate_of(train: TrainConfig, model: ModelConfig, lora: LoraConfig, p: PrivacyConfig,
            defaults: Defaults, modules: int | None = None) -> tuple[float, str]:  # fmt: skip
    """train.lr where nothing sets it, and the rule that it follows; the optimizer is chosen.

    modules: how many are adapted; None: not known, so maybe many. Of a strategy's own rate the rule
    is one of fedlora/strategies/defaults.py's.
    """
    if p.by_example:
        step = 1.0 if 0 < p.epsilon <= 1 else 3.0
        return (step / p.clip_norm if train.optimizer == "sgd" else 1e-2), "by the clip"
    family = "classification" if kind_of(model.task).pooled else "causal-lm"
    if train.optimizer == "sgd":
        return FAMILIES[family], "not searched with sgd"
    few = modules is not None and modules <= FEW_MODULES
    return rate(defaults, model.task, lora.form, family, few)


def resolve_defaults(
    train: TrainConfig,
    model: ModelConfig,
    lora: LoraConfig,
    p: PrivacyConfig,
    defaults: Defaults = NONE,
) -> tuple[TrainConfig, ModelConfig, LoraConfig]:
    """The sections with these defaults filled in; what was set stays."""
    private, optimizer = p.by_example, train.optimizer
    if optimizer == AUTO:
        optimizer = "sgd" if private else "adamw"
    momentum = train.momentum
    if momentum < 0:
        momentum = 0.8 if private and optimizer == "sgd" else 0.0
    train = train.model_copy(update={"optimizer": optimizer, "momentum": momentum})
    if not train.lr:
        lr, _ = rate_of(train, model, lora, p, defaults)
        train = train.model_copy(update={"lr": lr})
    pooling, layers = model.pooling, lora.layers
    if pooling == AUTO:
        own = model.path.startswith("py:")  # a whole model, with a head
        mean = private and kind_of(model.task).pooled and not own
        pooling = "mean" if mean else "default"
    if layers == (AUTO,):
        layers = ("-1",) if private else ()
    changes = {"layers": layers, "alpha": lora.alpha or defaults.alpha,
               "init": defaults.init if lora.init == AUTO else lora.init}  # fmt: skip
    dropout = 0.0 if model.dropout < 0 and kind_of(model.task).refers else model.dropout
    return (
        train,
        model.model_copy(update={"pooling": pooling, "dropout": dropout}),
        lora.model_copy(update=changes),
    )
