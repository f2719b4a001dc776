"""What follows the last round: what stayed with the clients, their scores, adapter and summary."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.federation.server.exchange import error_of, exchange, part_of
from fedlora.federation.wire.codes import Refusal
from fedlora.federation.wire.messages import unpack_factors
from fedlora.privacy.summary import summary as privacy
from fedlora.reports.outcome import judge, said
from fedlora.strategies.base import Client, Round, Upload
from fedlora.training.data.corpus import describe
from fedlora.training.export_certificate import certified, load_exported
from fedlora.training.model.peft_directory import beginning, save_peft

if TYPE_CHECKING:
    from fedlora.federation.server.strategy import FederatedLora


def close(server: "FederatedLora", grid: Grid, stopped: str = "") -> None:
    """Collect, evaluate on every client, write adapter/, clients.jsonl and summary.json.

    `stopped` says why the run ended before its last round, if it did.
    """
    if getattr(server.strategy, "average_at_end", False):
        collect(server, grid)
    effective = server.strategy.effective(server.state)
    if server.config.evaluate.clients:
        final_scores(server, grid)
    server.load(effective)
    effective = beginning(effective, server.origin)
    save_peft(server.model, effective, server.journal.directory / "adapter")
    write_records(server, stopped, certify(server, server.journal.directory / "adapter"))


def collect(server: "FederatedLora", grid: Grid) -> None:
    """Once: what the clients kept, for a strategy's exact average of it."""
    round = Round(server.config.run.rounds, server.config.run.seed)
    asked = [c for c in _connected(server) if c.has_memory]
    messages = (server.message(c, round, "query.collect", bare=True) for c in asked)
    uploads = []
    for i, reply in _answers(server, grid, messages):
        client = server.client(i)
        scale = {m: layer.scale for m, layer in client.layers.items()}
        kept = unpack_factors(reply.content.array_records["sent"], scale)
        n = int(reply.content.metric_records["metrics"]["num-examples"])  # type: ignore[arg-type]
        uploads.append(Upload(client, kept, n))
    if uploads:
        uploads.sort(key=lambda u: u.client.id)
        server.state = server.strategy.finish(server.state, uploads)  # type: ignore[attr-defined]


def final_scores(server: "FederatedLora", grid: Grid) -> None:
    """The final model on every client's own test rows."""
    round = Round(server.config.run.rounds + 1, server.config.run.seed)
    messages = (server.message(c, round, "evaluate") for c in _connected(server))
    for i, reply in _answers(server, grid, messages):
        said = reply.content.metric_records["metrics"]
        server.members[i] = replace(
            server.members[i],
            final=part_of(said, "final.") or {},
            personalized=part_of(said, "personalized.") or {},
            alone=part_of(said, "alone.") or {},
        )


def _connected(server: "FederatedLora") -> list[Client]:
    return [server.client(i) for i in sorted(server.members) if i in server.nodes]


def _answers(
    server: "FederatedLora", grid: Grid, messages: Iterable[Message]
) -> Iterable[tuple[int, Message]]:
    """(client, reply) of those that answered; the others are noted."""
    of_node = {node: i for i, node in server.nodes.items()}
    for node, reply in exchange(grid, messages, server.config.round.deadline):
        if error := error_of(reply):
            server.observer.client_failed(of_node[node], Refusal.of(error).reason)
        else:
            yield of_node[node], reply


def spread(scores: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """The clients' mean accuracy (or loss, where they have none), and of the worst tenth of them.

    A tenth is at least one client. None where no client was scored.
    """
    key = "accuracy" if any("accuracy" in s for s in scores) else "loss"
    found = sorted((s[key] for s in scores if key in s), reverse=key == "loss")
    if not found:
        return None
    worst = found[: math.ceil(len(found) / 10)]
    return {key: sum(found) / len(found), f"worst_tenth_{key}": sum(worst) / len(worst)}


def client_lines(server: "FederatedLora") -> Iterator[dict[str, Any]]:
    """The lines of clients.jsonl."""
    corpus = server.corpus
    labels = describe(corpus)
    for i, m in sorted(server.members.items()):
        simulated = i < len(corpus.clients)
        yield {
            "client": i,
            "node": server.nodes.get(i),
            "rank": m.rank,
            "modules": len(m.plan) or len(server.model.shapes),
            "train_examples": m.examples,
            "test_examples": len(corpus.client(i).test) if simulated else None,
            "labels": labels.get(i, {}),
            "rounds": m.rounds,
            "failures": m.failures,
            "bytes_down": m.bytes_down,
            "bytes_up": m.bytes_up,
            "first": m.first or None,
            "final": m.final or None,
            "personal": m.personal or None,
            "personalized": m.personalized or None,
            "alone": m.alone or None,
        }


ROOM = 1.5
"""How many times the base must fit into the memory that is free, to load it once more."""


def certify(server: "FederatedLora", adapter: Path) -> float | None:
    """How far adapter/, loaded as anyone loads it, is from the model, over what rounding explains.

    None where there is no memory for a second base: `fedlora export` checks it as well.

    Raises:
        ModelError: by more than rounding.
    """
    base = sum(p.numel() * p.element_size() for p in server.model.peft.parameters())
    if psutil.virtual_memory().available < ROOM * base:
        server.observer.note(f"{adapter} is not certified: no memory for a second base")
        return None
    loaded = load_exported(server.config, server.labels, adapter, merged=False)
    return certified(server.model, loaded, adapter)


def write_records(
    server: "FederatedLora", stopped: str = "", exported: float | None = None
) -> None:
    """clients.jsonl and summary.json; and one line to the observer, if there is cause for it.

    `stopped` says why the run ended early, if it did.
    """
    c = server.config
    server.journal.clients(client_lines(server))
    members = server.members.values()
    rounds = server.journal.lines()
    final = server.score() if c.evaluate.every else None
    warnings = judge(rounds, server.baselines, final if has_one_model(server) else None)
    server.journal.summary(
        {
            "name": c.run.name,
            "strategy": c.strategy.name,
            "promise": server.promise,
            "export_excess": exported,
            "rounds": c.run.rounds,
            "seconds": server.seconds(),
            "model": c.model.path,
            "data": c.data.path,
            "seed": c.run.seed,
            "final": final,
            "baselines": server.baselines,
            "bytes": {
                "down": sum(m.bytes_down for m in members),
                "up": sum(m.bytes_up for m in members),
            },
            "failures": sum(m.failures for m in members),
            "clients": {
                kind: spread([getattr(m, kind) for m in members])
                for kind in ("final", "personalized", "alone")
            },
            "virtual_seconds": server.clock or None,
            "sent": server.schemas.columns(),
            "privacy": privacy(c, rounds),
            "stopped": stopped,
            "warnings": warnings,
        }
    )
    if warnings:
        server.observer.note(said(warnings))


def has_one_model(server: "FederatedLora") -> bool:
    """Not where what the clients keep was never averaged: then the server's is half of a model."""
    return server.promise != "shared" or getattr(server.strategy, "average_at_end", False)
