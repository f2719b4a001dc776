"""What a run cannot choose by: federation/server/choice.py."""

from collections.abc import Iterator
from typing import Any

from fedlora.config.reader import Config
from fedlora.config.sections import StopConfig
from fedlora.reports.outcome import JUDGED_BY, LOSS
from fedlora.strategies.base import Strategy

KNOWN = [metric.key for metric in (*JUDGED_BY, LOSS)]
"""Scores of which it is known whether more is better."""


def problems(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """Each reason why [stop] cannot do what it says, and what to do instead."""
    stop, name = config.stop, config.strategy.name
    if not stop.on:
        if stop != StopConfig():
            yield "stop.metric and stop.min-delta choose nothing: set stop.patience or stop.best"
        return
    if stop.metric and stop.metric[0] not in "+-" and stop.metric not in KNOWN:
        yield (
            f"stop.metric = {stop.metric!r}: write which way is better, '+{stop.metric}' for more "
            f"or '-{stop.metric}' for less; without a sign it must be {', '.join(KNOWN)}"
        )
    yield from _rows(config, strategy)
    needs = strategy.needs()
    if stop.best and (needs.client_memory or needs.collect_at_end):
        yield (
            f"stop.best = true: {name} keeps a part of the model on its clients, and of that only "
            "the last round's is there; set it to false"
        )


def _rows(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """Whose validation rows there are, and whether their scores may be told."""
    data, own = config.data, config.data.client_validation_fraction
    half = strategy.promise == "shared"
    if data.validates and not half:
        return
    if not own:
        yield (
            f"stop with strategy.name = {config.strategy.name!r}: it keeps a part of the model on "
            "its clients, so that only they can score it; set data.client-validation-fraction"
            if half and data.validates
            else "stop: there are no validation rows to choose by; set data.validation-size or "
            "data.validation-path, or data.client-validation-fraction"
        )
        return
    if config.round.buffer:
        yield (
            "stop with round.buffer: a client that still trains cannot say how its validation rows "
            "fare; set data.validation-size or data.validation-path, or round.buffer = 0"
        )
    if config.secure.aggregation:
        yield (
            "stop with secure.aggregation: the clients' scores on their own validation rows stay "
            "with them; set data.validation-size or data.validation-path"
        )
    if config.privacy.on and not config.privacy.release_metrics:
        yield (
            "stop with privacy: the clients' scores on their own validation rows stay with them, "
            "for no noise covers them; set data.validation-path to public rows of the server's"
        )
