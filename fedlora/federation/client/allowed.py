"""What of a run's config a node with a policy takes from its server, and what it takes from itself.

Every key of the config is in exactly one of

    ALLOWED   the run's value, where its rule finds nothing against it
    OWN       the node's: what the run says of it is not looked at
    IGNORED   the server's affair, or a simulation's: it stays at its default

A key that is in none is a new one: a run that sets it is refused until somebody decides here.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from fedlora.config.policy import Policy
from fedlora.training.user_code import is_code

Rule = Callable[[Any, Policy], str]
"""What is wrong with a value under a policy; "" where nothing is."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
PATTERN = re.compile(r"[A-Za-z0-9_.\-\\^$|*+]{1,200}=\s*\d{1,5}")
PLACES = re.compile(r"[A-Za-z0-9_.\-]{1,200}=\d{1,9}( \d{1,9})*")
RANKS = ("r", "hybrid_r", "width")
"""Options of forms that are ranks."""
LARGEST_OPTION = 4096
OPTION = re.compile(r"[A-Za-z_]{1,60}=\s*(true|false|-?\d{1,9}(\.\d{1,9})?(e-?\d{1,2})?|\w{1,40})")


def _typed(_value: Any, _policy: Policy) -> str:
    """A choice among names, or a switch: the config itself takes no other."""
    return ""


def _within(low: float, high: float) -> Rule:
    def rule(value: Any, _policy: Policy) -> str:
        return "" if low <= value <= high else f"must be {low:g} to {high:g}"

    return rule


def _limited(limit: Callable[[Policy], float], key: str, low: float = 0) -> Rule:
    """Up to a number of the policy."""

    def rule(value: Any, policy: Policy) -> str:
        return "" if low <= value <= limit(policy) else f"must be at most {key} = {limit(policy)}"

    return rule


def _names(value: Any, _policy: Policy) -> str:
    """Plain names, which are no expressions: one that is may take for ever."""
    parts = [part.strip() for part in str(value).split(",") if part.strip()]
    bad = [p for p in parts if not NAME.fullmatch(p) and not re.fullmatch(r"-\d{1,4}", p)]
    return f"must be plain names, {bad[0][:40]!r} is none" if bad or len(parts) > 500 else ""


def _patterns(value: Any, _policy: Policy) -> str:
    """Expressions without groups and with few stars, which no module's name keeps busy."""
    parts = [part.strip() for part in str(value).split(",") if part.strip()]
    bad = [p for p in parts if not PATTERN.fullmatch(p) or p.count("*") + p.count("+") > 3]
    return "must be short expressions without groups" if bad or len(parts) > 50 else ""


def _options(value: Any, policy: Policy) -> str:
    """Small numbers: some are sizes of what a form makes, or how often it does something."""
    parts = [part.strip() for part in str(value).split(",") if part.strip()]
    bad = [part for part in parts if not OPTION.fullmatch(part)]
    if bad or len(parts) > 30:
        return "must be numbers, true, false or plain words"
    for name, _, text in (part.partition("=") for part in parts):
        most = policy.limits.rank if name in RANKS else LARGEST_OPTION
        if _number(text) > most and not re.search("seed|key", name):
            return f"{name}: must be at most {most}"
    return ""


def _places(value: Any, _policy: Policy) -> str:
    """A module and whole numbers each, of no more than models have."""
    parts = [part.strip() for part in str(value).split(",") if part.strip()]
    fine = len(str(value)) <= 2_000_000 and all(PLACES.fullmatch(part) for part in parts)
    return "" if fine else "must be modules and whole numbers"


def _number(text: str) -> float:
    """The size of what an option is set to; 0 of a word."""
    with suppress(ValueError):
        return abs(float(text))
    return 0.0


def _code(value: Any, policy: Policy) -> str:
    return "" if value in policy.trust.code else "not in trust.code"


def _metrics(value: Any, policy: Policy) -> str:
    """Names are the config's own; code must be listed."""
    parts = [part.strip() for part in str(value).split(",")]
    bad = [part for part in parts if is_code(part) and part not in policy.trust.code]
    return "not in trust.code" if bad else ""


def _model(value: Any, policy: Policy) -> str:
    listed = value in policy.trust.code if is_code(value) else value in policy.model.allowed
    return "" if listed else "not in model.allowed"


def _adapter(value: Any, policy: Policy) -> str:
    return "" if value in policy.model.adapters else "not in model.adapters"


def _revision(value: Any, _policy: Policy) -> str:
    """Held against the model's own in `admit`, which knows the model."""
    return "" if NAME.fullmatch(str(value)) else "must be a plain name"


def _remote_code(_value: Any, policy: Policy) -> str:
    return "" if policy.trust.remote_code else "trust.remote-code is false"


def _whole(value: Any, policy: Policy) -> str:
    parts = [part.strip() for part in str(value).split(",") if part.strip()]
    bad = [part for part in parts if part not in policy.limits.whole_modules]
    return f"{bad[0][:40]!r} is not in limits.whole-modules" if bad else ""


def _strategy(value: Any, policy: Policy) -> str:
    from fedlora.strategies import STRATEGIES

    known = policy.limits.strategies or STRATEGIES
    return "" if value in known else "not in limits.strategies"


def _shared(value: Any, policy: Policy) -> str:
    return "" if value in policy.data.shared else "not in data.shared"


def _release(_value: Any, policy: Policy) -> str:
    return "" if policy.privacy.metrics == "always" else "privacy.metrics is not always"


def _never(_value: Any, _policy: Policy) -> str:
    return "must be left at its default"


COUNT, FRACTION, WEIGHT = _within(0, 1_000_000), _within(0, 1), _within(0, 1e6)
OF_A_SHARED_CORPUS: Mapping[str, Rule] = {
    "data.path": _shared,
    "data.clients": _shared,
    "data.test-path": _shared,
    "data.validation-path": _shared,
    "data.split": _names,
    "data.subset": _names,
    "data.labels": lambda value, _: "" if len(value) <= 100_000 else "must be shorter",
    "data.test-size": COUNT,
    "data.validation-size": COUNT,
    "data.partition": _typed,
    "data.alpha": WEIGHT,
    "data.classes-per-client": COUNT,
    "data.natural-column": _names,
}
"""Of these a node with rows of its own has no need; they count where data.shared names a corpus."""

ALLOWED: Mapping[str, Rule] = {
    "run.seed": _within(0, 2**63 - 1),
    "run.rounds": _within(1, 1_000_000),
    "run.extended": _typed,
    "model.path": _model,
    "model.revision": _revision,
    "model.adapter": _adapter,
    "model.tokenizer": _code,
    "model.task": _typed,
    "model.pooling": _typed,
    "model.dtype": _typed,
    "model.quantization": _typed,
    "model.merge": _typed,
    "model.attention": _typed,
    "model.liger": _typed,
    "model.device-map": _typed,
    "model.dropout": _within(-1, 1),
    "model.trust-remote-code": _remote_code,
    **OF_A_SHARED_CORPUS,
    "data.chat-template": _typed,
    "data.max-length": _within(1, 131_072),
    "data.long-texts": _typed,
    "clients.count": _within(1, 1_000_000),
    "clients.per-round": COUNT,
    "clients.ranks": lambda value, _: "" if len(str(value)) <= 10_000 else "must be shorter",
    "lora.alpha": WEIGHT,
    "lora.target-modules": _names,
    "lora.target-parameters": _names,
    "lora.layers": _names,
    "lora.dropout": FRACTION,
    "lora.use-rslora": _typed,
    "lora.modules-to-save": _whole,
    "lora.init": _names,
    "lora.rank-pattern": _patterns,
    "lora.form": _names,
    "lora.invocation": lambda value, _: "" if len(value) <= 1000 else "must be shorter",
    "lora.options": _options,
    "lora.places": _places,
    "strategy.name": _strategy,
    "strategy.fedex.rank": COUNT,
    "strategy.flora.reinit": _typed,
    "strategy.fedsa.average-at-end": _typed,
    "strategy.fedsb.init-from": _typed,
    "strategy.fedsb.eta": WEIGHT,
    "strategy.fedsb.signs": _typed,
    "strategy.fslora.normalize": _typed,
    "strategy.hetlora.gamma": WEIGHT,
    "strategy.hetlora.penalty": WEIGHT,
    "strategy.hetlora.normalize": _typed,
    "strategy.hetlora.rounding": _typed,
    "strategy.flexlora.max-rank": COUNT,
    "strategy.raflora.max-rank": COUNT,
    "strategy.florist.energy": FRACTION,
    "strategy.lora-a2.choice": _typed,
    "strategy.lora-fair.mode": _typed,
    "strategy.lora-fair.lambda-rel": WEIGHT,
    "strategy.fedsvd.head": _typed,
    "strategy.ravan.average": _typed,
    "strategy.ravan.choice": _typed,
    "strategy.ravan.head-scales": _typed,
    "strategy.ravan.head-rank": _limited(lambda p: p.limits.rank, "limits.rank", 1),
    "train.loss": _code,
    "train.epochs": _within(0, 1000),
    "train.steps": _limited(lambda p: p.limits.steps, "limits.steps"),
    "train.max-steps": COUNT,
    "train.gradient-accumulation-steps": _limited(lambda p: p.limits.steps, "limits.steps", 1),
    "train.label-smoothing": FRACTION,
    "train.packing": _typed,
    "train.neftune-noise-alpha": _within(0, 1000),
    "train.batch-size": _limited(lambda p: p.limits.batch, "limits.batch", 1),
    "train.microbatch": _limited(lambda p: p.limits.batch, "limits.batch"),
    "train.lr": WEIGHT,
    "train.lr-schedule": _typed,
    "train.lr-per": _typed,
    "train.warmup-steps": WEIGHT,
    "train.lr-ratio-b": WEIGHT,
    "train.dpo-beta": WEIGHT,
    "train.optimizer": _typed,
    "train.rule": _typed,
    "train.momentum": _within(-1, 1),
    "train.weight-decay": WEIGHT,
    "train.grad-clip": WEIGHT,
    "train.prox": WEIGHT,
    "train.precision": _typed,
    "train.threads": _limited(lambda p: p.limits.threads, "limits.threads", 1),
    "train.gradient-checkpointing": _typed,
    "train.deterministic": _typed,
    "train.prefix-cache": _within(0, 4096),
    "round.min-replies": _within(1, 1_000_000),
    "round.buffer": COUNT,
    "evaluate.clients": _typed,
    "evaluate.steps": FRACTION,
    "evaluate.batch-size": _limited(lambda p: p.limits.batch, "limits.batch", 1),
    "evaluate.metrics": _metrics,
    "evaluate.rouge-tokenizer": _typed,
    "evaluate.bleu-tokenizer": _typed,
    "evaluate.generate-tokens": _within(-1, 4096),
    "wire.dtype": _typed,
    "wire.error-feedback": _typed,
    "privacy.level": _typed,
    "privacy.epsilon": _within(0, 200),
    "privacy.noise-multiplier": WEIGHT,
    "privacy.clip-norm": WEIGHT,
    "privacy.sample-rate": FRACTION,
    "privacy.microbatch": _limited(lambda p: p.limits.batch, "limits.batch"),
    "privacy.clip-quantile": FRACTION,
    "privacy.clip-rate": WEIGHT,
    "privacy.release-metrics": _release,
    "privacy.insecure-reproducible-noise": _never,
    "ranks.policy": _typed,
    "ranks.absent": _typed,
    "personalize.epochs": _within(0, 1000),
    "personalize.lr": WEIGHT,
    "personalize.alone": _typed,
    "secure.aggregation": _typed,
    "secure.num-shares": COUNT,
    "secure.reconstruction-threshold": COUNT,
    "secure.colluding": COUNT,
    "secure.clipping-range": WEIGHT,
    "secure.max-weight": _within(1, 10**9),
    "secure.modulus-bits": _typed,
}

OWN = frozenset(
    f"data.{key}"
    for key in (
        "text", "text-pair", "image", "label", "label-separator", "prompt", "response", "rejected",
        "messages", "map",
        "separator", "encoding", "line-pattern", "limit", "dedupe", "client-test-fraction",
        "client-validation-fraction", "node-path", "unit-column", "withdrawn",
    )
) | {
    "output.client-memory", "privacy.ledger", "privacy.max-epsilon", "privacy.delta",
    "simulate.devices", "train.compile",
    "lora.calibration",
}  # fmt: skip

IGNORED = frozenset(
    {
        "run.name", "run.out", "run.resume", "run.defaults", "simulate.workers",
        "round.deadline", "round.wait-for-clients", "round.max-examples", "round.max-norm",
        "round.norm-bound", "round.count-bound", "round.max-staleness", "round.staleness-exponent",
        "round.quarantine-after", "evaluate.every", "evaluate.baselines", "proof.probes",
        "proof.enforce", "output.keep-updates", "output.plots", "output.log",
        "output.metrics-port", "output.tracker", "ranks.shares", "ranks.per-core", "ranks.cap",
        "ranks.low", "ranks.step", "ranks.budget", "ranks.memory", "ranks.quantile",
        "devices.classes", "devices.gflops", "devices.jitter", "devices.deadline",
        "server.optimizer", "server.lr", "server.beta1", "server.beta2", "server.tau",
        "stop.patience", "stop.min-delta", "stop.metric", "stop.best",
        "secure.stage-deadline", "robust.method", "robust.bound", "robust.byzantine",
        "robust.share",
    }
)  # fmt: skip
