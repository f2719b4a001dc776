"""Options that conflict with the strategy, or with another option.

docs/extend/composing.md has the table.
"""

from collections.abc import Iterator
from typing import Any

from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.federation.server.devices import parse_classes
from fedlora.federation.server.ranks import BY_MODULE, GROWTH, parse_pattern, parse_shares
from fedlora.strategies import server_optimizers
from fedlora.strategies.base import Client, Layer, Strategy
from fedlora.training.user_code import is_code


def problems(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """Each option that conflicts with another setting, and what to do instead."""
    yield from _named(config)
    yield from _validation(config)
    yield from _sites(config)
    yield from _long_texts(config)
    yield from _ranks(config, strategy)
    yield from _buffer(config)
    least, most = config.round.min_replies, config.clients.per_round or config.clients.count
    if least > most:
        yield (
            f"round.min-replies = {least}: no more than {most} clients train in a round "
            "(clients.per-round, or clients.count); lower it"
        )
    yield from _robust(config, strategy)
    chosen = config.server.optimizer
    if chosen != "none" and (reason := server_optimizers.problem(strategy)):
        yield f"server.optimizer = '{chosen}': {reason}"
    yield from _personalize(config)


def _named(config: Config) -> Iterator[str]:
    """The model and the data, which no default stands for."""
    if not config.model.path:
        yield "model.path is not set: name the base, a hub id or a directory"
    if not (config.data.path or config.data.clients or config.data.test_path):
        yield (
            "data.path is not set: name the rows, a file, a directory or a hub id; where every "
            "node brings its own, data.test-path"
        )


def _validation(config: Config) -> Iterator[str]:
    """Where there is nothing to draw central validation rows from."""
    data = config.data
    if not data.validation_size:
        return
    if data.validation_path:
        yield "data.validation-path with data.validation-size: it is the rows; leave out the size"
    elif is_code(data.path) or not (data.path or data.clients):
        yield (
            f"data.validation-size = {data.validation_size:g}: the server has no rows but its test "
            "to draw them from; name some in data.validation-path"
        )


def _sites(config: Config) -> Iterator[str]:
    """What does not go with data.clients."""
    data, policy = config.data, config.ranks.policy
    if data.clients and data.path:
        yield "data.clients with data.path: each client has its own file; leave out data.path"
    if any(site.rank for site in data.clients) and policy not in ("list", "capability"):
        yield (
            f"ranks.policy = {policy!r}: gives the ranks, and so does data.clients; leave out each "
            "site's rank, or set ranks.policy = 'list'"
        )


def _long_texts(config: Config) -> Iterator[str]:
    """What windows of a text do not go with: training/data/batches.py."""
    data, windows = config.data, "data.long-texts = 'windows'"
    if data.long_texts != "windows":
        return
    if config.model.task != "causal-lm":
        yield (
            f"{windows}: a label is of a whole text, and no part need show it; set 'cut', or write "
            "the parts that have the label as rows"
        )
    elif data.prompt or data.chats or any(site.prompt for site in data.clients):
        yield (
            f"{windows}: a response is learned behind its prompt, and a later part of it would "
            "have none; leave out data.prompt, data.chat-template and data.messages, or set 'cut'"
        )
    if config.privacy.by_example:
        yield (
            f"{windows} with privacy.level = 'example': it protects a row, and a row of several "
            "examples would weigh as many times; set 'cut', or privacy.level = 'client'"
        )
    if data.max_length < 2:
        yield f"{windows} with data.max-length = {data.max_length}: must be 2 or more"


def _ranks(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """Ranks by module, rank policies and device classes: federation/server/planning.py."""
    try:
        parse_pattern(config.lora.rank_pattern)
        if config.ranks.policy == "share":
            parse_shares(config.ranks.shares)
        devices = parse_classes(config.devices.classes)
    except ConfigError as e:
        yield from e.problems
        return
    legend = config.ranks.policy == "legend"
    if not legend and any(d.layers for d in devices):
        yield (
            "devices.classes limits how many layers a class trains, and only ranks.policy = "
            "'legend' gives clients different layers; leave out the limit, or set that policy"
        )
    keeps = strategy.needs().client_memory
    if config.ranks.policy == "adaptive":
        yield from _adaptive(config, strategy)
    if legend and keeps:
        yield (
            "ranks.policy = 'legend' changes a client's layers from round to round, and "
            f"{config.strategy.name} keeps a part of each on the client; use fedavg, fedex, flora "
            "or rolora"
        )
    if legend and config.privacy.on and not devices:
        yield (
            "ranks.policy = 'legend' lives on times that clients report, and no noise covers "
            "those; set devices.classes to plan by a device model, or another policy"
        )


def _adaptive(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """What ranks by module that change do not go with: federation/server/adaptive.py."""
    form, needs, top = config.lora.form, strategy.needs(), GROWTH * max(config.clients.ranks)
    if needs.client_memory or needs.beside_factors:
        yield (
            "ranks.policy = 'adaptive': gives modules ranks that change from round to round, and "
            f"{config.strategy.name} keeps more than A and B; use fedex, flexlora or hetlora"
        )
    elif needs.client_choice:
        yield (
            "ranks.policy = 'adaptive': the server says which ranks a client trains, and with "
            f"{config.strategy.name} each chooses its own; use fedex, flexlora or hetlora"
        )
    two = [Client(i, {"m": Layer(top, top, r, 1.0)}) for i, r in enumerate((1, top))]
    for reason in strategy.problems(two):
        yield f"ranks.policy = 'adaptive' gives modules ranks from 1 to {top}: {reason}"
    if form != "lora":
        yield f"ranks.policy = 'adaptive' with lora.form = {form!r}: its ranks are LoRA's; use lora"
    if config.privacy.by_client:
        yield (
            "ranks.policy = 'adaptive' with privacy.level = 'client': its noise is calibrated to "
            "what clients train at the start; use another policy"
        )


def _buffer(config: Config) -> Iterator[str]:
    """What a round that ends early does not go with: federation/server/asynchronous.py."""
    size = config.round.buffer
    if not size:
        return
    most = config.clients.per_round or config.clients.count
    if size > most:
        yield (
            f"round.buffer = {size}: must be at most {most}, the clients that train at a time "
            "(clients.per-round, or clients.count)"
        )
    if config.secure.aggregation:
        yield (
            "round.buffer with secure.aggregation: a masked sum needs all of its clients in one "
            "round; set round.buffer = 0"
        )
    if config.privacy.by_client:
        yield (
            "round.buffer with privacy.level = 'client': who is in a round then depends on how "
            "fast it is, which the accounting does not cover; set round.buffer = 0"
        )
    if (policy := config.ranks.policy) in BY_MODULE:
        yield (
            f"round.buffer with ranks.policy = {policy!r}: it changes a client's layers while the "
            "client still trains others; choose another policy"
        )


def _robust(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """What judging single updates does not go with: federation/server/screening.py."""
    method = config.robust.method
    if method == "none":
        return
    if strategy.promise == "shared":
        yield (
            f"robust.method = '{method}': {config.strategy.name} keeps a factor on its clients, so "
            "the server never sees what an update does, and the other factor alone can be made "
            "any length without changing the model; use fedavg, fedex or ffa"
        )
    if method in ("krum", "multi-krum"):
        n = config.clients.per_round or config.clients.count
        need = 2 * config.robust.byzantine + 3
        if n < need:
            yield (
                f"robust.method = '{method}' with robust.byzantine = {config.robust.byzantine} "
                f"needs at least {need} clients a round, and there are {n}"
            )


def _personalize(config: Config) -> Iterator[str]:
    """What each client's own model needs: federation/client/personalize.py."""
    p = config.personalize
    if (p.epochs or p.alone) and not config.evaluate.clients:
        yield "personalize: its result is the clients' own scores; set evaluate.clients = true"
    if (p.epochs or p.alone) and config.privacy.on and not config.privacy.release_metrics:
        yield (
            "personalize: its result is the clients' own scores, which privacy keeps on the "
            "clients; set privacy.release-metrics = true where they may leave without noise"
        )
