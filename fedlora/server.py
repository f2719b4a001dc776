"""The server's side: one loop over rounds that hosts any of our strategies in Flower.

    meet the clients -> check the strategy -> [first gradients] -> evaluate
    each round:  sample -> send -> take replies as they come, each checked -> aggregate
                 -> prove -> evaluate -> checkpoint
    collect what stays with the clients, if the strategy wants it once -> final evaluation

`Strategy.start` of Flower has no resume, no seed, no deadline, and ends with any exception; so
this one is its own. What a client sends is checked before it counts, and whatever is wrong with
one reply costs that reply alone.
"""

import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlora import site
from fedlora.adapter import Factors
from fedlora.config import Config
from fedlora.console import Observer, Silent
from fedlora.errors import FedLoraError, RoundError, StrategyError, UpdateError
from fedlora.evaluate import evaluate
from fedlora.export import save_peft
from fedlora.first_gradient import survey
from fedlora.journal import Journal, Member, Saved
from fedlora.proof import Proof, Target, model_deviation, probes, prove
from fedlora.strategies.base import Client, Effective, Round, Start, Upload, seeded, top_ranks
from fedlora.train import threads
from fedlora.wire import (
    Job,
    Shapes,
    count_bytes,
    pack_download,
    pack_factors,
    unpack_factors,
)

POLL = 0.05
"""Seconds between two looks for replies."""


@dataclass
class Gathered:
    """One round's replies as they come in."""

    accepted: list[int] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    clients: dict[int, dict[str, Any]] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    waited: float = 0.0


class FederatedLora(FlowerStrategy):
    """A Flower strategy that runs the config's federated LoRA algorithm.

    In a ServerApp of your own: `FederatedLora(Config.read(context.run_config)).start(grid)`.
    Results are in the run's directory; `Result.arrays` is the final adapter.
    """

    def __init__(self, config: Config, observer: Observer | None = None) -> None:
        self.config = config
        self.observer: Observer = observer or Silent()
        self.strategy = config.build_strategy()
        self.journal = Journal(config)
        self.corpus = site.corpus(config)
        self.labels = self.corpus.labels
        self.model = site.model(config, self.labels)
        self.incarnation = uuid.uuid4().hex[:8]
        self.token = ""
        self.state: Any = None
        self.members: dict[int, Member] = {}
        self.nodes: dict[int, int] = {}  # client id -> Flower node id, of this connection
        self.baselines: dict[str, Mapping[str, float]] = {}
        self.before = 0.0  # seconds of the run's earlier starts
        self.begun = time.perf_counter()
        self._schemas: dict[Any, tuple[Shapes, Mapping[str, float]]] = {}

    # -- the run ----------------------------------------------------------------------------

    def start(self, grid: Grid, *_: Any, **__: Any) -> Result:
        """Run all the rounds that are left, and leave everything in the run's directory.

        Raises:
            StrategyError: the strategy cannot do what the config asks; before round 1.
            RoundError: fewer than round.min-replies answered; the checkpoint is intact.
            ProofError: an aggregation that promises to be exact was not.
        """
        done = self._open()
        self._meet(grid)
        if done < 0:
            self._begin(grid)
            done = 0
        result = Result()
        for number in range(done + 1, self.config.run.rounds + 1):
            record = self.round(grid, number)
            self.observer.round_done(record)
            result.train_metrics_clientapp[number] = MetricRecord({"loss": record["train_loss"]})
            if scores := record["evaluation"]:
                result.evaluate_metrics_serverapp[number] = MetricRecord(dict(scores))
        self._finish(grid)
        result.arrays = pack_factors(self.strategy.effective(self.state).factors, "float32")
        return result

    def round(self, grid: Grid, number: int) -> dict[str, Any]:
        """One round, from sampling to checkpoint; its line of rounds.jsonl."""
        begun = time.perf_counter()
        round = Round(number, self.config.run.seed)
        cohort = self.sample(round)
        self.observer.round_started(number, cohort)
        clients = [self.client(i) for i in cohort]
        target = Target(probes(clients, self.config.proof.probes, round.seed, number))
        base = self._base_outputs(target)
        gathered = Gathered()
        version = self._base_number()

        uploads = self._uploads(grid, clients, round, target, gathered)
        state = self._aggregate(uploads, round, gathered)
        aggregated = time.perf_counter()
        kinds = [c for c in clients if c.id in gathered.accepted]
        proof = prove(self.strategy, state, version, kinds, target, round, self.config.wire.dtype)
        proved = time.perf_counter()
        self._load(self.strategy.effective(state))
        if proof.promise == "exact":
            deviation = model_deviation(base, self.model.probe(target.x), target)
            proof = replace(proof, model_deviation=deviation)
        if self.config.proof.enforce:
            proof.enforce(self.config.strategy.name, number)
        scores = self._evaluate(number)
        evaluated = time.perf_counter()

        self.state = state
        self._credit(gathered, number, version)
        record = self._record(number, gathered, cohort, proof, scores)
        record["seconds"] = {
            "clients": gathered.waited,
            "aggregate": aggregated - begun - gathered.waited,
            "proof": proved - aggregated,
            "evaluate": evaluated - proved,
            "total": time.perf_counter() - begun,
        }
        self._commit(number, record)
        return record

    def sample(self, round: Round) -> list[int]:
        """The round's cohort, from (seed, round) and the clients that are connected."""
        there = sorted(i for i in self.members if i in self.nodes)
        n = self.config.clients.per_round
        if not n or n >= len(there):
            return there
        chance = random.Random(seeded(round.seed, round.number, 0, "sample").initial_seed())
        return sorted(chance.sample(there, n))

    def client(self, i: int) -> Client:
        """A client as the strategy sees it now."""
        m = self.members[i]
        layers = self.model.layers(dict.fromkeys(self.model.shapes, m.rank))
        return Client(i, layers, m.base_version, m.memory_round > 0)

    # -- Flower's own protocol --------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a client of the round's cohort; none shares a mutable record."""
        round = Round(server_round, self.config.run.seed)
        for i in self.sample(round):
            yield self.message(self.client(i), round, "train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, aggregate and keep; for drivers that bring their own loop."""
        round = Round(server_round, self.config.run.seed)
        target = Target(probes([self.client(i) for i in self.members], 1, round.seed, 0))
        gathered = Gathered()
        good = (self._accept(reply, round, target, gathered) for reply in replies)
        self.state = self._aggregate((u for u in good if u), round, gathered)
        self._credit(gathered, server_round, self._base_number())
        loss = _weighted(gathered.clients.values(), "train_loss")
        effective = self.strategy.effective(self.state)
        return pack_factors(effective.factors, "float32"), MetricRecord({"loss": loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: clients evaluate within the train message, the server on its test set."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        """Say what is about to run."""
        c = self.config
        self.observer.note(
            f"{c.strategy.name} ({self.strategy.promise}), {len(self.members)} clients of ranks "
            f"{sorted({m.rank for m in self.members.values()})}, {c.run.rounds} rounds"
        )

    # -- before round 1 and after the last ----------------------------------------------------

    def _open(self) -> int:
        """Begin or resume the run's directory; the last finished round, -1 for a fresh run."""
        if not self.config.run.resume:
            self.journal.open()
            done = -1
        else:
            name = type(self.strategy).__module__
            types = [
                t for t in vars(__import__(name, fromlist=["_"])).values() if isinstance(t, type)
            ]
            done, saved = self.journal.resume(Saved, Member, *types)
            if saved is not None:
                self.token, self.state = saved.token, saved.state
                self.members = dict(saved.members)
                self.baselines = dict(saved.baselines)
                self.before = saved.seconds
                self.observer.note(f"resuming {self.journal.directory} after round {done}")
        self.token = self.token or uuid.uuid4().hex
        return done

    def _meet(self, grid: Grid) -> None:
        """Ask every node who it is, until the clients the config counts on are there."""
        want = self.config.clients.count
        until = time.monotonic() + self.config.round.wait_for_clients
        asked: set[int] = set()
        while True:
            new = [n for n in grid.get_node_ids() if n not in asked]
            messages = [Message(RecordDict(), n, "query", ttl=self._ttl()) for n in new]
            asked |= set(new)
            for reply in self.replies(grid, messages, self.config.round.wait_for_clients):
                if not reply.has_error():
                    facts = reply.content.config_records["facts"]
                    self._welcome(int(facts["client"]), int(facts["rank"]), reply)  # type: ignore[arg-type]
            if len(self.nodes) >= want:
                break
            if time.monotonic() > until:
                raise RoundError(
                    f"{len(self.nodes)} of clients.count = {want} nodes are connected after "
                    f"{self.config.round.wait_for_clients:g} s; start more nodes (with `flwr run`: "
                    f"--federation-config 'num-supernodes={want}'), or lower clients.count"
                )
            time.sleep(POLL)
        problems = list(self.strategy.problems([self.client(i) for i in sorted(self.members)]))
        if problems:
            raise StrategyError("\n".join(problems))
        self.summary()

    def _welcome(self, i: int, rank: int, reply: Message) -> None:
        ranks = self.config.clients.ranks
        self.nodes[i] = reply.metadata.src_node_id
        if i not in self.members:
            self.members[i] = Member(i, rank or ranks[i % len(ranks)])

    def _begin(self, grid: Grid) -> None:
        """The first state, the baselines, and the model before any training: round 0."""
        begun = time.perf_counter()
        clients = [self.client(i) for i in sorted(self.members)]
        whole = Client(-1, self.model.layers(top_ranks(clients)))
        factors = self.model.init_factors(whole, self.config.run.seed)
        start = Start(factors, clients, self.model.weights(), self.config.run.seed)
        self.state = self.strategy.init(start)
        if getattr(self.strategy, "wants_gradient", False):
            self.state = self.strategy.from_gradient(self.state, survey(self, grid, clients))  # type: ignore[attr-defined]
        if self.config.evaluate.baselines:
            self._baselines()
        self._load(self.strategy.effective(self.state))
        record = self._record(0, Gathered(), [], None, self._evaluate(0))
        record["seconds"] = {"total": time.perf_counter() - begun}
        self._commit(0, record)
        self.observer.round_done(record)

    def _baselines(self) -> None:
        from fedlora import baselines

        if self.config.model.task != "classification":
            return
        found: dict[str, Callable[[], Mapping[str, float]]] = {
            "majority class": lambda: baselines.majority(self.corpus),
            "TF-IDF + logistic regression": lambda: baselines.tfidf(self.corpus),
            "trained head only": lambda: baselines.trained_head(self.corpus, self._features),
        }
        for name, compute in found.items():
            self.baselines[name] = compute()
            self.observer.baseline(name, self.baselines[name])

    def _features(self, texts: Sequence[str]) -> Any:
        from fedlora.features import frozen_features

        return frozen_features(self.model, texts, self.config)

    def _finish(self, grid: Grid) -> None:
        """What follows the last round: collection, final evaluation, adapter, summary."""
        if getattr(self.strategy, "average_at_end", False):
            self._collect(grid)
        effective = self.strategy.effective(self.state)
        self._load(effective)
        if self.config.evaluate.clients:
            self._final_scores(grid)
        self._load(effective)
        save_peft(self.model, effective, self.journal.directory / "adapter")
        self._write_summary("")

    def _collect(self, grid: Grid) -> None:
        """Once: what the clients kept, for a strategy's exact average of it."""
        round = Round(self.config.run.rounds, self.config.run.seed)
        uploads = []
        clients = [self.client(i) for i in sorted(self.members) if i in self.nodes]
        messages = [
            self.message(c, round, "query.collect", bare=True) for c in clients if c.has_memory
        ]
        for reply in self.replies(grid, messages):
            if reply.has_error():
                self.observer.client_failed(None, str(reply.error.reason))
                continue
            i = int(reply.content.config_records["reply"]["client"])  # type: ignore[arg-type]
            client = self.client(i)
            kept = unpack_factors(
                reply.content.array_records["sent"], {m: x.scale for m, x in client.layers.items()}
            )
            n = int(reply.content.metric_records["metrics"]["num-examples"])  # type: ignore[arg-type]
            uploads.append(Upload(client, kept, n))
        uploads.sort(key=lambda u: u.client.id)
        if uploads:
            self.state = self.strategy.finish(self.state, uploads)  # type: ignore[attr-defined]

    def _final_scores(self, grid: Grid) -> None:
        round = Round(self.config.run.rounds + 1, self.config.run.seed)
        there = [self.client(i) for i in sorted(self.members) if i in self.nodes]
        messages = [self.message(c, round, "evaluate") for c in there]
        for reply in self.replies(grid, messages):
            if reply.has_error():
                self.observer.client_failed(None, str(reply.error.reason))
                continue
            i = int(reply.content.config_records["reply"]["client"])  # type: ignore[arg-type]
            metrics = reply.content.metric_records["metrics"]
            self.members[i] = replace(self.members[i], final=_part(metrics, "final.") or {})

    # -- one round's messages -----------------------------------------------------------------

    def message(self, client: Client, round: Round, kind: str, bare: bool = False) -> Message:
        member = self.members[client.id]
        job = Job(
            round=round.number,
            token=self.token,
            incarnation=self.incarnation,
            client=client.id,
            ranks={m: layer.rank for m, layer in client.layers.items()},
            memory_round=member.memory_round,
            base_number=self._base_number(),
            fingerprint=self.model.fingerprint,
            labels=self.labels,
        )
        content = RecordDict()
        if not bare:
            download = self.strategy.download(self.state, client, round)
            content = pack_download(download, self.config.wire.dtype)
        content["job"] = job.record()
        group = str(round.number)
        return Message(content, self.nodes[client.id], kind, ttl=self._ttl(), group_id=group)

    def _uploads(
        self,
        grid: Grid,
        clients: Sequence[Client],
        round: Round,
        target: Target,
        gathered: Gathered,
    ) -> Iterator[Upload]:
        """The round's accepted updates in the cohort's order, each as soon as its turn has come.

        Sums depend on their order, so a reply that overtakes another waits for it here.
        """

        def messages() -> Iterator[Message]:
            for client in clients:
                message = self.message(client, round, "train")
                gathered.down[client.id] = count_bytes(message.content)
                yield message

        order = [c.id for c in clients]
        by_node = {self.nodes[i]: i for i in order}
        waiting: dict[int, Upload | None] = {}
        replies = self.replies(grid, messages())
        turn = 0
        while turn < len(order):
            begun = time.perf_counter()
            reply = next(replies, None)
            gathered.waited += time.perf_counter() - begun
            if reply is None:
                break
            i = by_node.get(_dst(reply), -1)
            if i not in waiting:
                waiting[i] = self._accept(reply, round, target, gathered, i)
            while turn < len(order) and order[turn] in waiting:
                if upload := waiting.pop(order[turn]):
                    yield upload
                waiting[order[turn]] = None
                turn += 1
        late = [i for i in order if i not in waiting]
        for i in late:
            self._refuse(i, round, f"no reply within {self._ttl():g} s", gathered)
        for i in order[turn:]:
            if upload := waiting.get(i):
                yield upload

    def _accept(
        self,
        reply: Message,
        round: Round,
        target: Target,
        gathered: Gathered,
        expected: int | None = None,
    ) -> Upload | None:
        """A reply as an upload, or None with the reason on record."""
        i = expected if expected is not None else self._sender(reply)
        try:
            if i not in self.members:
                raise UpdateError("it comes from a node that is none of this round's clients")
            upload, facts = self.read_reply(reply, i, round)
            target.add(self.strategy.trained(self.state, upload, round), upload.num_examples)
        except FedLoraError as e:
            self._refuse(i, round, str(e), gathered)
            return None
        facts["bytes_down"] = gathered.down.get(i, 0)
        gathered.accepted.append(i)
        gathered.clients[i] = facts
        if self.config.output.keep_updates:
            self.journal.update(round.number, upload)
        self.observer.client_done(i, facts)
        return upload

    def read_reply(self, reply: Message, i: int, round: Round) -> tuple[Upload, dict[str, Any]]:
        """Check everything about a reply and decode it.

        Raises:
            UpdateError, WireError: what is wrong with it.
        """
        if reply.has_error():
            raise UpdateError(reply.error.reason)
        content = reply.content
        try:
            tag: Mapping[str, Any] = content.config_records["reply"]
            metrics: Mapping[str, Any] = content.metric_records["metrics"]
            record = content.array_records["sent"]
            said = (tag["round"], tag["token"], tag["client"])
            tag["keeps"]
            n = metrics["num-examples"]
        except KeyError as e:
            raise UpdateError(f"the reply lacks {e}") from None
        if said != (round.number, self.token, i):
            raise UpdateError(
                f"the reply is client {said[2]}'s of round {said[0]}"
                + ("" if said[1] == self.token else " of another run")
                + f", not client {i}'s of round {round.number}"
            )
        if not isinstance(n, int) or n < 1:
            raise UpdateError(f"num-examples = {n}: must be a positive whole number")
        client = self.client(i)
        shapes, scale = self.schema(client, round)
        sent = unpack_factors(record, scale, shapes)
        for column, name, x in sent.items():
            if not torch.isfinite(x).all():
                raise UpdateError(f"{column} of {name} holds NaN or Inf")
        facts = {
            "rank": self.members[i].rank,
            "keeps": bool(tag["keeps"]),
            "examples": n,
            "steps": metrics.get("steps"),
            "train_loss": metrics.get("loss"),
            "seconds": metrics.get("seconds"),
            "train_seconds": metrics.get("train-seconds"),
            "bytes_up": count_bytes(content),
            "before": _part(metrics, "before."),
            "after": _part(metrics, "after."),
        }
        return Upload(client, sent, n), facts

    def schema(self, client: Client, round: Round) -> tuple[Shapes, Mapping[str, float]]:
        """The exact tensors a client of these layers must send, and their scales.

        Found by running the client's half on a newcomer's download: no second list to keep.
        """
        key = tuple((m, layer.rank) for m, layer in client.layers.items())
        phase = self.strategy.download(self.state, client, round).trainable
        if (key, phase) not in self._schemas:
            new = replace(client, has_memory=False, base_version=self._base_number())
            came = self.strategy.download(self.state, new, round)
            started = self.strategy.start(came, Factors(), new, round)
            sent, _ = self.strategy.upload(started, Factors())
            shapes = {(column, name): tuple(x.shape) for column, name, x in sent.items()}
            self._schemas[key, phase] = shapes, sent.scale
        return self._schemas[key, phase]

    def replies(
        self, grid: Grid, messages: Iterable[Message], timeout: float = 0.0
    ) -> Iterator[Message]:
        """Send one by one, and give back each reply as it comes, until the deadline."""
        until = time.monotonic() + (timeout or self._ttl())
        pending: dict[str, int] = {}
        for message in messages:
            for mid in grid.push_messages([message]):
                pending[mid] = message.metadata.dst_node_id
            yield from self._pull(grid, pending)
        while pending and time.monotonic() < until:
            found = False
            for reply in self._pull(grid, pending):
                found = True
                yield reply
            if pending and not found:
                time.sleep(POLL)

    def _pull(self, grid: Grid, pending: dict[str, int]) -> Iterator[Message]:
        for mid in list(pending):
            for reply in grid.pull_messages([mid]):
                node = pending.pop(mid, None)
                if node is not None:
                    reply.__dict__["fedlora_node"] = node
                    yield reply

    # -- aggregation --------------------------------------------------------------------------

    def _aggregate(self, uploads: Iterator[Upload], round: Round, gathered: Gathered) -> Any:
        """The next state. The strategy draws the uploads, and so drives the round's replies."""
        first = next(uploads, None)
        if first is not None:
            state = self.strategy.aggregate(self.state, chain([first], uploads), round)
            for _ in uploads:  # a strategy that stopped early: nothing is left unread
                pass
        if first is None or len(gathered.accepted) < self.config.round.min_replies:
            reasons = "; ".join(f"client {f['client']}: {f['reason']}" for f in gathered.failures)
            raise RoundError(
                f"round {round.number}: {len(gathered.accepted)} updates were accepted, "
                f"round.min-replies = {self.config.round.min_replies}. {reasons}. The state before "
                f"it is in {self.journal.directory / 'checkpoint'}; mend the cause and resume."
            )
        return state

    def _refuse(self, i: int, round: Round, reason: str, gathered: Gathered) -> None:
        gathered.failures.append({"client": i, "round": round.number, "reason": reason})
        if i in self.members:
            m = self.members[i]
            self.members[i] = replace(m, failures=m.failures + 1)
        self.observer.client_failed(i, reason)

    def _credit(self, gathered: Gathered, number: int, version: int) -> None:
        """Note what each client has now: only an accepted reply moves its memory on."""
        for i, facts in gathered.clients.items():
            m = self.members[i]
            self.members[i] = replace(
                m,
                memory_round=number if facts["keeps"] else 0,
                base_version=version,
                rounds=m.rounds + 1,
                bytes_down=m.bytes_down + facts["bytes_down"],
                bytes_up=m.bytes_up + facts["bytes_up"],
                examples=facts["examples"],
                first=m.first or facts["before"] or {},
                personal=facts["after"] or {},
            )

    def _load(self, effective: Effective) -> None:
        """Make the server's own model what the strategy says it is."""
        self.model.rebase(f"{self.token}/{self.incarnation}", effective.base)
        self.model.load(effective.factors)

    def _base_outputs(self, target: Target) -> dict[str, torch.Tensor]:
        """W x of the base as it is before the round, through the model's own layers."""
        effective = self.strategy.effective(self.state)
        bare = {m: torch.zeros_like(B) for m, B in effective.factors.B.items()}
        self._load(replace(effective, factors=replace(effective.factors, B=bare)))
        return self.model.probe(target.x)

    def _base_number(self) -> int:
        base = self.strategy.effective(self.state).base
        return base[-1].number if base else 0

    def _evaluate(self, number: int) -> dict[str, float] | None:
        every, last = self.config.evaluate.every, number == self.config.run.rounds
        if not every or (number % every and not last):
            return None
        rows = site.encoded("central", -1, self.config, self.labels)
        with threads(torch.get_num_threads()):
            scores = evaluate(self.model, rows, self.config, generate=True)
        return scores and {**scores, "examples": len(rows)}

    # -- records ------------------------------------------------------------------------------

    def _record(
        self,
        number: int,
        gathered: Gathered,
        cohort: list[int],
        proof: Proof | None,
        scores: Mapping[str, float] | None,
    ) -> dict[str, Any]:
        clients = {i: gathered.clients[i] for i in sorted(gathered.clients)}
        return {
            "round": number,
            "time": _now(),
            "strategy": self.config.strategy.name,
            "train_loss": _weighted(clients.values(), "train_loss"),
            "evaluation": scores,
            "cohort": cohort,
            "accepted": sorted(gathered.accepted),
            "failures": gathered.failures,
            "clients": clients,
            "bytes": {
                "down": sum(gathered.down.values()),
                "up": sum(c["bytes_up"] for c in clients.values()),
            },
            "proof": proof and proof.record(),
        }

    def _commit(self, number: int, record: Mapping[str, Any]) -> None:
        self.journal.commit(number, self._saved(), record)

    def _saved(self) -> Saved:
        spent = self.before + time.perf_counter() - self.begun
        return Saved(self.token, self.state, self.members, self.baselines, spent)

    def _write_summary(self, stopped: str) -> None:
        from fedlora.data import describe

        labels = describe(self.corpus)
        lines = []
        for i, m in sorted(self.members.items()):
            rows = self.corpus.client(i) if i < len(self.corpus.clients) else None
            lines.append(
                {
                    "client": i,
                    "node": self.nodes.get(i),
                    "rank": m.rank,
                    "train_examples": m.examples,
                    "test_examples": len(rows.test) if rows else None,
                    "labels": labels.get(i, {}),
                    "rounds": m.rounds,
                    "failures": m.failures,
                    "bytes_down": m.bytes_down,
                    "bytes_up": m.bytes_up,
                    "first": m.first or None,
                    "final": m.final or None,
                    "personal": m.personal or None,
                }
            )
        self.journal.clients(lines)
        c = self.config
        final = self._evaluate(c.run.rounds)
        self.journal.summary(
            {
                "name": c.run.name,
                "strategy": c.strategy.name,
                "promise": self.strategy.promise,
                "rounds": c.run.rounds,
                "seconds": self._saved().seconds,
                "model": c.model.path,
                "data": c.data.path,
                "seed": c.run.seed,
                "final": final,
                "baselines": self.baselines,
                "bytes": {
                    "down": sum(m.bytes_down for m in self.members.values()),
                    "up": sum(m.bytes_up for m in self.members.values()),
                },
                "failures": sum(m.failures for m in self.members.values()),
                "stopped": stopped,
            }
        )

    def _sender(self, reply: Message) -> int:
        by_node = {node: i for i, node in self.nodes.items()}
        return by_node.get(_dst(reply), -1)

    def _ttl(self) -> float:
        return self.config.round.deadline


def _dst(reply: Message) -> int:
    """The node a reply stands for: an error made on its behalf has another sender."""
    return int(reply.__dict__.get("fedlora_node", reply.metadata.src_node_id))


def _part(metrics: Mapping[str, Any], prefix: str) -> dict[str, float] | None:
    return {
        key.removeprefix(prefix): float(value)
        for key, value in metrics.items()
        if key.startswith(prefix)
    } or None


def _weighted(clients: Iterable[Mapping[str, Any]], key: str) -> float:
    rows = [(c["examples"], c[key]) for c in clients if c.get(key) is not None]
    total = sum(n for n, _ in rows)
    return sum(n * x for n, x in rows) / total if total else float("nan")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
