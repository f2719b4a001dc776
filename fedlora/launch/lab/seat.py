"""A federation seen from the server's seat: what each client is sent, and what it sends back.

The strategy's two halves and the clients' own training, without messages between them: what the
server gets here is what the wire would carry, column by column, so attacks on it are attacks on a
run. `fedlora.federation.server.loop` stays the only place where a run is made.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.federation.client.first_gradient import chosen_first
from fedlora.federation.server.ranks import patterned
from fedlora.lora.adapter import COLUMNS, Factors
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.training import Payments, private_fit
from fedlora.strategies.base import Client, Download, Round, Start, Upload, travelling
from fedlora.strategies.chosen import chooses, masked
from fedlora.training import cache
from fedlora.training.data.batches import Encoded
from fedlora.training.model.model import Model
from fedlora.training.train import fit

Change = dict[str, dict[str, Tensor]]
"""By column and name: what a client sent, less what it had been sent."""


@dataclass
class Seat:
    """A server in the middle of a run, with one client of its own making for each id."""

    config: Config
    clients: int = 3
    kept: dict[int, Factors] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        self.strategy: Any = self.config.build_strategy()
        self.model: Model = cache.model(self.config, cache.corpus(self.config).labels)
        top, pattern = max(self.config.clients.ranks), self.config.lora.rank_pattern
        self.layers = self.model.layers(patterned(self.model.shapes, top, pattern))
        first = self.model.init_factors(Client(-1, self.layers), self.config.run.seed)
        everyone = [self.client(i) for i in range(self.clients)]
        start = Start(first, everyone, self.model.weights(), self.config.run.seed)
        self.state: Any = self.strategy.init(start)

    def client(self, i: int) -> Client:
        return Client(i, self.layers, self.versions.get(i, 0), i in self.kept)

    def warm(self, rows: Sequence[Encoded]) -> None:
        """One round of training by every client, so that B is no longer zero anywhere."""
        self.number += 1
        uploads = []
        version = self.base_version()
        for i, mine in enumerate(rows):
            sent, keep = self.send(i, mine, self.config)
            uploads.append(Upload(self.client(i), sent, len(mine)))
            self.kept |= {i: keep} if any(True for _ in keep.items()) else {}
        self.state = self.strategy.aggregate(self.state, uploads, self.round)
        self.versions = dict.fromkeys(range(self.clients), version)
        self.number += 1

    @property
    def round(self) -> Round:
        return Round(self.number, self.config.run.seed)

    def base_version(self) -> int:
        base = self.strategy.effective(self.state).base
        return base[-1].number if base else 0

    @contextmanager
    def received(self, i: int) -> Iterator[tuple[Download, Factors]]:
        """Within it, the model is what client i is about to train; and the factors of that."""
        client = self.client(i)
        came = self.strategy.download(self.state, client, self.round)
        self.model.rebase(f"seat-{id(self)}", self.strategy.effective(self.state).base)
        factors = self.strategy.start(came, self.kept.get(i, Factors()), client, self.round)
        with self.model.folded(came.fold):
            self.model.load(factors, came.block)
            yield came, factors

    def send(self, i: int, rows: Encoded, config: Config) -> tuple[Factors, Factors]:
        """One client's round on these rows by this config: what it sends, and what it keeps."""
        chooser, me = chooses(self.strategy), self.client(i)
        with self.received(i) as (came, began):
            chosen = chosen_first(self.model, rows, config, self.strategy, me, self.round)
            train(self.model, rows, came.trainable, config, self.number, i)
            trained = self.model.read()
        if chooser:
            chosen = chosen or chooser.choose(began, trained, me, self.round)
            trained = masked(began, trained, chosen)
        sent, keep = self.strategy.upload(trained, self.kept.get(i, Factors()))
        return travelling(sent, came.trainable), keep

    def change(self, i: int, sent: Factors) -> Change:
        """What the server reads off an upload: it knows what each client began with."""
        with self.received(i) as (_, began):
            columns = {c: (getattr(sent, c), getattr(began, c)) for c in COLUMNS}
        return {
            c: {name: (x - before[name]).double() for name, x in after.items()}
            for c, (after, before) in columns.items()
            if after
        }


def train(
    model: Model, rows: Encoded, columns: frozenset[str], config: Config, round: int, client: int
) -> None:
    """Local training by the config, with a ledger that is thrown away: these rows are no one's."""
    if not config.privacy.by_example:
        fit(model, rows, columns, config, round, client)
        return
    with tempfile.TemporaryDirectory() as root:
        ledger = Ledger(Path(root), "audit")
        private_fit(model, rows, columns, config, round, client, None, Payments(ledger))


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The examples of all the parts, one part after the other."""
    ends = torch.tensor([0, *(len(p.ids) for p in parts)]).cumsum(0)
    starts = [p.starts[:-1] + ends[n] for n, p in enumerate(parts)]

    def column(name: str) -> Tensor | None:
        found = [getattr(p, name) for p in parts]
        return None if found[0] is None else torch.cat(found)

    return replace(
        parts[0],
        ids=torch.cat([p.ids for p in parts]),
        starts=torch.cat([*starts, ends[-1:]]),
        rows=torch.arange(sum(map(len, parts))),
        classes=column("classes"),
        prompts=column("prompts"),
        types=column("types"),
    )
