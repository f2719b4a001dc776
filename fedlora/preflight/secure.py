"""Settings that secure aggregation conflicts with: docs/privacy/index.md."""

from collections.abc import Iterator
from typing import Any

from fedlora.config.reader import Config
from fedlora.federation.secure.terms import SMALLEST, Terms
from fedlora.strategies.base import Strategy


def problems(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """Each setting that needs what the server no longer sees, and what to do instead."""
    s = config.secure
    if not s.aggregation:
        return
    yield from _numbers(config)
    p = config.privacy
    if p.by_client:
        yield (
            "privacy.level = 'client' with secure.aggregation: the server clips each client's "
            "update, which it no longer sees; use privacy.level = 'example', which the clients add"
        )
    if p.release_metrics:
        yield "privacy.release-metrics = true: secure.aggregation keeps those on the clients"
    if config.robust.method != "none":
        yield (
            f"robust.method = {config.robust.method!r}: it judges single updates, and with "
            "secure.aggregation the server has none; set it to 'none'"
        )
    if config.round.max_norm:
        yield (
            "round.max-norm: with secure.aggregation the server cannot take the norm of one "
            "update; set it to 0. Each client checks its own against secure.clipping-range"
        )
    if config.output.keep_updates:
        yield "output.keep-updates = true: with secure.aggregation no update reaches the server"
    if config.ranks.policy == "adaptive":
        yield (
            "ranks.policy = 'adaptive': it follows each client's own change, module by module, "
            "which secure.aggregation keeps back; choose another policy"
        )
    if config.ranks.policy == "legend" or config.devices.classes:
        what = "ranks.policy = 'legend'" if config.ranks.policy == "legend" else "devices.classes"
        yield f"{what}: it needs each client's steps and times, which secure.aggregation keeps back"
    if strategy.needs().collect_at_end:
        yield (
            f"strategy.name = {config.strategy.name!r}: it collects at the end what clients kept, "
            "in the clear; turn that off, as by strategy.fedsa.average-at-end = false"
        )
    if strategy.needs().first_gradient:
        yield (
            f"strategy.name = {config.strategy.name!r}: this initialisation sends each client's "
            "first gradient in the clear; choose another, such as 'orthogonal'"
        )
    if config.lora.by_gradient:
        yield (
            f"lora.form = {config.lora.form!r} with choice=gradient: sends each client's first "
            "gradient in the clear; use choice=weight in lora.options"
        )


def _numbers(config: Config) -> Iterator[str]:
    s, n = config.secure, config.clients.per_round or config.clients.count
    if n >= SMALLEST and s.num_shares:
        if s.num_shares > n or s.num_shares < SMALLEST:
            yield f"secure.num-shares = {s.num_shares}: must be {SMALLEST} to {n}, or 0 for all"
        elif s.num_shares < n and s.num_shares % 2 == 0:
            yield (
                f"secure.num-shares = {s.num_shares}: must be odd, one's own and as many on either "
                f"side, unless it is all {n}"
            )
    terms = Terms.of(config, n)
    if reason := terms.problem():
        yield f"secure.aggregation: {reason}"
    if n * terms.weight >= 2 ** (terms.bits - 1):
        yield (
            f"secure.max-weight = {terms.weight}: the sum over {n} clients does not fit into "
            f"secure.modulus-bits = {terms.bits}; lower it, or set 64"
        )
