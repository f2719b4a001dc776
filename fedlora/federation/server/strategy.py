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
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlora.config.reader import Config
from fedlora.errors import BudgetSpent, FedLoraError, RoundError, StrategyError, TrainingCheckError
from fedlora.federation.server import asynchronous as buffered
from fedlora.federation.server import certifier, honesty
from fedlora.federation.server import options as compose
from fedlora.federation.server import proof_by_model as measured
from fedlora.federation.server.certifier import Certifier
from fedlora.federation.server.exchange import Gathered, Schemas
from fedlora.federation.server.finish import close
from fedlora.federation.server.journal import Journal, Member, Saved, state_types
from fedlora.federation.server.planning import Planner
from fedlora.federation.server.proof import WEIGHTS, Proof, Target, model_deviation, probes, prove
from fedlora.federation.server.roster import Roster, is_simulated
from fedlora.federation.server.secure_rounds import uploads as secure_uploads
from fedlora.federation.server.setup import begin, check_model, look, meet
from fedlora.federation.server.synchronous import one as accepted
from fedlora.federation.server.synchronous import uploads as ordered_uploads
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.federation.wire.messages import Job, pack_download, pack_factors, pack_pairs
from fedlora.lora.adapter import Delta
from fedlora.privacy.central import CentralPrivacy
from fedlora.reports.console import Observer, Silent
from fedlora.reports.observers import watched
from fedlora.strategies import forms
from fedlora.strategies.base import Client, Effective, Round, Upload, seeded, whole_download
from fedlora.strategies.server_optimizers import Moments
from fedlora.training import cache as site
from fedlora.training.evaluate import evaluate
from fedlora.training.precision import described


class FederatedLora(FlowerStrategy):
    """A Flower strategy that runs the config's federated LoRA algorithm.

    In a ServerApp of your own: `FederatedLora(preflight.read(context.run_config)).start(grid)`;
    preflight is what refuses a config that cannot run (fedlora/preflight).
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
        self.promise = forms.promise(self.model.form, self.strategy)
        self.measured = measured.measures(self)
        self.certifier = Certifier(config, self.model, self.promise)
        self.incarnation = uuid.uuid4().hex[:8]
        self.token = ""
        self.state: Any = None
        self.origin: Mapping[str, Delta] = {}  # what lora.init took out of the base
        self.members: dict[int, Member] = {}
        self.nodes: dict[int, int] = {}  # client id -> Flower node id, of this connection
        self.baselines: dict[str, Mapping[str, float]] = {}
        self.before = 0.0  # seconds of the run's earlier starts
        self.begun = time.perf_counter()
        self.schemas = Schemas(self.strategy)
        self.roster = Roster(lambda text: self.observer.note(text))
        self.planner = Planner(config, self.model)
        self.central = CentralPrivacy.of(config)
        self.secure = config.secure.aggregation
        self.summable: set[Any] = set()  # what secure aggregation was found to go with
        self.clock = 0.0  # virtual seconds
        self.simulated = False
        self.buffer = buffered.Buffer()
        self.moments = Moments()

    # -- the run ----------------------------------------------------------------------------

    def start(self, grid: Grid, *_: Any, **__: Any) -> Result:
        """Run all the rounds that are left, and leave everything in the run's directory.

        Raises:
            StrategyError: the strategy cannot do what the config asks; before round 1.
            RoundError: fewer than round.min-replies answered; the checkpoint is intact. Where all
                others say that their privacy budget is spent, the run ends in good order instead.
            ProofError: an aggregation that promises to be exact was not.
        """
        self.simulated = is_simulated(grid)
        with watched(self.observer, self.config, self.journal.directory) as self.observer:
            return self._run(grid)

    def _run(self, grid: Grid) -> Result:
        done = self._open()
        meet(self, grid)
        if done < 0:
            begin(self, grid)
            done = 0
        elif done < self.config.run.rounds:  # it may be another machine than the one it began on
            check_model(self, done + 1)
        result, stopped = Result(), ""
        for number in range(done + 1, self.config.run.rounds + 1):
            try:
                record = self.round(grid, number)
            except BudgetSpent as e:
                stopped = f"before round {number}: {e}"
                self.observer.note(f"stopped {stopped}")
                break
            self.observer.round_done(record)
            if (loss := record["train_loss"]) is not None:  # no client may tell it under DP
                result.train_metrics_clientapp[number] = MetricRecord({"loss": loss})
            if scores := record["evaluation"]:
                result.evaluate_metrics_serverapp[number] = MetricRecord(dict(scores))
        close(self, grid, stopped)
        result.arrays = pack_factors(self.strategy.effective(self.state).factors, "float32")
        return result

    def round(self, grid: Grid, number: int) -> dict[str, Any]:
        """One round, from sampling to checkpoint; its line of rounds.jsonl."""
        begun = time.perf_counter()
        round = Round(number, self.config.run.seed)
        look(self, grid)
        self.roster.wait(lambda: look(self, grid), self.config.round.wait_for_clients)
        self.members = self.planner.replan(self.members)
        if self.central:
            everyone = [self.client(i) for i in self.members]
            self.central.open_round(
                self.strategy, self.state, everyone, round, self.token, self.observer.note
            )
        cohort = self.sample(round)
        self.observer.round_started(number, cohort)
        clients = [self.client(i) for i in cohort]
        seen = clients
        if self.config.round.buffer or not clients:
            seen = [self.client(i) for i in self.members]
        certifier.begin(self, number, self.state)
        target = self._target(seen, round)
        through_model = self.promise == "exact" and not self.measured
        base = self._base_outputs(target) if through_model else {}
        gathered = Gathered()
        version = self.base_number()
        uploads = self._gather()(self, grid, clients, round, gathered)
        uploads = honesty.believed(self, uploads, round, gathered)
        uploads = compose.screened(self, uploads, round, gathered)
        if self.central:
            uploads = self.central.mean(uploads, round)
        state = self._aggregate(self._noted(uploads, round, target), round, gathered)
        aggregated = time.perf_counter()
        kinds = [self.client(i) for i in sorted(gathered.accepted)]
        proof = None
        if not self.secure or self.promise != "approximate":  # from a sum, one cannot tell
            proof = self._proved(state, version, kinds, target, round)
        proved = time.perf_counter()
        self.load(self.strategy.effective(state))
        if proof and through_model:
            deviation = model_deviation(base, self.model.probe(target.x), target)
            rounding = 0.0 if self.model.base.beside else WEIGHTS[self.config.model.dtype]
            proof = replace(proof, model_deviation=deviation, model_bound=rounding)
        if proof and self.config.proof.enforce:
            proof.enforce(self.config.strategy.name, number)
        certifier.end(self, gathered, number)
        state = compose.stepped(self, state, seen, round)
        scores = self.evaluate(number)
        evaluated = time.perf_counter()

        self.state = state
        self._credit(gathered, number, version)
        record = self.record(number, gathered, cohort, proof, scores)
        record["seconds"] = {
            "clients": gathered.waited,
            "aggregate": aggregated - begun - gathered.waited,
            "proof": proved - aggregated,
            "evaluate": evaluated - proved,
            "total": time.perf_counter() - begun,
        }
        self.commit(number, record)
        return record

    def sample(self, round: Round) -> list[int]:
        """The round's cohort, from (seed, round) and the clients that are connected."""
        most = self.config.round.quarantine_after or float("inf")
        busy, n = self.buffer.flights, self.config.clients.per_round
        there = sorted(
            i
            for i, m in self.members.items()
            if i in self.nodes and i not in busy and m.offences < most
        )
        if self.central and self.central.poisson:
            return self.central.cohort(there, round)
        if not n or n - len(busy) >= len(there):
            return there
        chance = random.Random(seeded(round.seed, round.number, 0, "sample").initial_seed())
        return sorted(chance.sample(there, max(0, n - len(busy))))

    def client(self, i: int) -> Client:
        """A client as the strategy sees it now."""
        m = self.members[i]
        layers = self.model.layers(self.planner.ranks(m))
        return Client(i, layers, m.base_version, m.memory_round > 0)

    # -- Flower's own protocol --------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a client of the round's cohort; none shares a mutable record."""
        if self.secure:
            raise StrategyError(
                "secure.aggregation takes four messages a round, so it needs this strategy's own "
                "loop: call start(grid), or set it to false"
            )
        round = Round(server_round, self.config.run.seed)
        for i in self.sample(round):
            yield self.message(self.client(i), round, "train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, aggregate and keep; for drivers that bring their own loop."""
        round = Round(server_round, self.config.run.seed)
        gathered = Gathered()
        of_node = {node: self.client(i) for i, node in self.nodes.items()}
        good = (
            accepted(self, reply, of_node[reply.metadata.src_node_id], round, gathered)
            for reply in replies
            if reply.metadata.src_node_id in of_node
        )
        self.state = self._aggregate((u for u in good if u), round, gathered)
        self._credit(gathered, server_round, self.base_number())
        loss = _weighted(gathered.clients.values(), "train_loss")
        effective = self.strategy.effective(self.state)
        metrics = MetricRecord({} if loss is None else {"loss": loss})
        return pack_factors(effective.factors, "float32"), metrics

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
            f"{c.strategy.name} ({self.promise}), {len(self.members)} clients of ranks "
            f"{sorted({m.rank for m in self.members.values()})}, {c.run.rounds} rounds"
        )
        self.observer.note(described(c.train.precision))

    # -- before round 1 and after the last ----------------------------------------------------

    def _open(self) -> int:
        """Begin or resume the run's directory; the last finished round, -1 for a fresh run."""
        if not self.config.run.resume:
            self.journal.open()
            done = -1
        else:
            done, saved = self.journal.resume(Saved, Member, *state_types(self.strategy))
            if saved is not None:
                self.token, self.state, self.origin = saved.token, saved.state, saved.origin
                self.members = dict(saved.members)
                self.baselines = dict(saved.baselines)
                self.before, self.clock = saved.seconds, saved.clock
                self.moments = saved.moments or Moments()
                if saved.buffer:
                    self.buffer.restore(self, saved.buffer)
                self.central = CentralPrivacy.of(self.config, saved.clip)
                self.observer.note(f"resuming {self.journal.directory} after round {done}")
        self.token = self.token or uuid.uuid4().hex
        return done

    # -- one round's messages -----------------------------------------------------------------

    def _gather(self) -> Callable[..., Iterator[Upload]]:
        """How a round's updates come in."""
        if self.secure:
            return secure_uploads
        return buffered.uploads if self.config.round.buffer else ordered_uploads

    def message(
        self,
        client: Client,
        round: Round,
        kind: str,
        bare: bool = False,
        seconds: float | None = None,
        state: Any = None,
    ) -> Message:
        """One client's message: its job and, unless it is bare, its download of `state`.

        state: by default the server's newest.
        """
        member = self.members[client.id]
        job = Job(
            round=round.number,
            token=self.token,
            incarnation=self.incarnation,
            client=client.id,
            ranks={m: layer.rank for m, layer in client.layers.items()},
            memory_round=member.memory_round,
            base_number=self.base_number(),
            fingerprint=self.model.fingerprint,
            labels=self.labels,
            last_round=member.last_round,
            cuts=certifier.cuts(self),
        )
        content = RecordDict()
        if not bare:
            given = self.state if state is None else state
            download = whole_download(self.strategy, given, client, round, self._folds)
            content = pack_download(download, self.config.wire.dtype)
            if self.origin and not member.last_round:  # once: it keeps it
                content["origin"] = pack_pairs(self.origin, "float32")
        content["job"] = job.record()
        ttl = seconds or self.config.round.deadline
        group = str(round.number)
        return Message(content, self.nodes[client.id], kind, ttl=ttl, group_id=group)

    # -- the proof ----------------------------------------------------------------------------

    def _target(self, clients: Sequence[Client], round: Round) -> Target:
        if self.measured:
            return measured.target(self, round)
        return Target(probes(clients, self.config.proof.probes, round.seed, round.number))

    def _proved(
        self, state: Any, before: int, kinds: Sequence[Client], target: Target, round: Round
    ) -> Proof:
        if self.measured:
            return measured.prove(self, state, kinds, target, round)
        dtype, folds = self.config.wire.dtype, self._folds
        return prove(self.strategy, state, before, kinds, target, round, dtype, folds)

    # -- aggregation --------------------------------------------------------------------------

    def _noted(self, uploads: Iterator[Upload], round: Round, target: Target) -> Iterator[Upload]:
        """The uploads, each added to the proof's target as it passes."""
        for upload in uploads:
            if self.measured:
                measured.add(self, target, upload, round)
            else:
                target.add(self.strategy.trained(self.state, upload, round), upload.num_examples)
            yield upload
            del upload  # before the next is asked for

    def _aggregate(self, uploads: Iterator[Upload], round: Round, gathered: Gathered) -> Any:
        """The next state. The strategy draws the uploads, and so drives the round's replies."""
        first = list(islice(uploads, 1))
        if some := bool(first):
            given = chain((first.pop() for _ in (1,)), uploads)  # let go as it is handed over
            state = self.strategy.aggregate(self.state, given, round)
            for _ in uploads:  # a strategy that stopped early: nothing is left unread
                pass
        enough = 0 if self.central and self.central.poisson else self.config.round.min_replies
        if not some or len(gathered.accepted) < enough:
            told = f"{len(gathered.accepted)} updates were accepted, round.min-replies = "
            raise self.too_few(f"{told}{self.config.round.min_replies}", round, gathered)
        return state

    @property
    def _folds(self) -> bool:
        return self.config.ranks.absent == "fold"

    def too_few(self, what: str, round: Round, gathered: Gathered) -> FedLoraError:
        """The error of a round in which too few counted: BudgetSpent where that is the only cause.

        Only under example-level DP has a client a budget; elsewhere one that says so lies.
        """
        ends = self.config.privacy.by_example and gathered.spent
        return (BudgetSpent if ends else RoundError)(self.told(what, round, gathered))

    def told(self, what: str, round: Round, gathered: Gathered) -> str:
        """What went wrong with a round, all its failures, and what to do."""
        reasons = "; ".join(f"client {f['client']}: {f['reason']}" for f in gathered.failures)
        return (
            f"round {round.number}: {what}. {reasons}. The state before it is in "
            f"{self.journal.directory / 'checkpoint'}; mend the cause and resume."
        )

    def refuse(self, i: int, round: Round, refusal: Refusal, gathered: Gathered) -> None:
        """Put on record why a client's reply does not count.

        Raises:
            TrainingCheckError: in a simulation, where every client is this machine: nothing that
                it computes can be believed.
        """
        if self.simulated and refusal.kind == FailureKind.UNTRAINED:
            raise TrainingCheckError(f"round {round.number}, client {i}: {refusal.reason}")
        kind, reason, offence = refusal.kind, refusal.reason, refusal.kind == FailureKind.BAD
        entry = {"client": i, "round": round.number, "kind": kind.value, "reason": reason}
        gathered.failures.append(entry)
        if i in self.members:
            m = self.members[i]
            self.members[i] = replace(
                m, failures=m.failures + 1, offences=m.offences + int(offence)
            )
            if offence and m.offences + 1 == self.config.round.quarantine_after:
                self.observer.note(f"client {i} is asked no more: {m.offences + 1} bad updates")
        self.observer.client_failed(i, reason)

    def _credit(self, gathered: Gathered, number: int, version: int) -> None:
        """Note what each client has now: only an accepted reply moves its memory on."""
        for i, facts in gathered.clients.items():
            m = self.members[i]
            m = self.planner.learned(m, facts, gathered.virtual.get(i))
            self.members[i] = replace(
                m,
                memory_round=facts["round"] if facts["keeps"] else 0,
                last_round=facts["round"],
                offences=0,
                base_version=version,
                rounds=m.rounds + 1,
                bytes_down=m.bytes_down + facts["bytes_down"],
                bytes_up=m.bytes_up + facts["bytes_up"],
                examples=facts["examples"],
                first=m.first or facts["before"] or {},
                personal=facts["after"] or {},
            )

    def load(self, effective: Effective) -> None:
        """Make the server's own model what the strategy says it is."""
        self.model.rebase(f"{self.token}/{self.incarnation}", effective.base, self.origin)
        self.model.load(effective.factors)

    def _base_outputs(self, target: Target) -> dict[str, torch.Tensor]:
        """W x of the base as it is before the round, through the model's own layers."""
        effective = self.strategy.effective(self.state)
        bare = {m: torch.zeros_like(B) for m, B in effective.factors.B.items()}
        self.load(replace(effective, factors=replace(effective.factors, B=bare)))
        return self.model.probe(target.x)

    def base_number(self) -> int:
        base = self.strategy.effective(self.state).base
        return base[-1].number if base else 0

    def evaluate(self, number: int) -> dict[str, float] | None:
        """The loaded model on the central test rows, in the rounds that the config asks for.

        Where clients keep a part to themselves there is no one model to evaluate in a round.
        """
        every, last = self.config.evaluate.every, number >= self.config.run.rounds
        if not every or (number % every and not last):
            return None
        if number and self.promise == "shared":
            return None
        return self.score()

    def score(self) -> dict[str, float] | None:
        """The loaded model on the central test rows."""
        rows = site.encoded("central", -1, self.config, self.labels)
        scores = evaluate(self.model, rows, self.config, generate=True)
        return scores and {**scores, "examples": len(rows)}

    # -- records ------------------------------------------------------------------------------

    def record(
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
            "train_loss": _weighted(clients.values(), "train_loss")
            if gathered.loss is None
            else gathered.loss,
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
            "certificate": gathered.certificate and gathered.certificate.record(),
            **compose.virtual(self, gathered),
            **({"robust": asdict(gathered.verdict)} if gathered.verdict else {}),
            **({"privacy": self.central.record()} if self.central else {}),
            **({"secure": gathered.secure} if gathered.secure else {}),
            **({"staleness": gathered.stale} if self.config.round.buffer else {}),
            **({"loss_not_finite": sorted(gathered.diverged)} if gathered.diverged else {}),
        }

    def commit(self, number: int, record: Mapping[str, Any]) -> None:
        self.journal.commit(number, self._saved(), record)

    def _saved(self) -> Saved:
        return Saved(
            self.token,
            self.state,
            self.members,
            self.baselines,
            self.seconds(),
            clock=self.clock,
            moments=self.moments,
            clip=self.central.C if self.central else 0.0,
            origin=self.origin,
            buffer=self.buffer.saved() if self.config.round.buffer else {},
        )

    def seconds(self) -> float:
        """Wall time the run has taken, over all its starts."""
        return self.before + time.perf_counter() - self.begun


def _weighted(clients: Iterable[Mapping[str, Any]], key: str) -> float | None:
    rows = [(c["examples"], c[key]) for c in clients if c.get(key) is not None]
    total = sum(n for n, _ in rows)
    return sum(n * x for n, x in rows) / total if total else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
