"""One message's work on a client: what is asked, and all that is needed to answer it.

ClientJob.open(message, context)   config, job, strategy, memory and download of a message
.local_round()                     around one round of training: what is to leave, and its scores
.ready()                           the model loaded as the download and the memory say
.reply(records)                    the reply, tagged with round, run and client
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedlora.config.member_certificates import read_file
from fedlora.config.members import Members, private_key
from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.config.sites import COLUMNS
from fedlora.errors import ConfigError, ModelError, PrivacyError, TrainingCheckError
from fedlora.federation.client import error_feedback, secure_book, witness
from fedlora.federation.client.admit import admit, check, check_terms
from fedlora.federation.client.agreed_base import check_whole
from fedlora.federation.client.first_gradient import chosen_first
from fedlora.federation.client.limits import counted_anew
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.client.node_config import check_from_server, own_delta
from fedlora.federation.client.secure_client import SecureClient
from fedlora.federation.client.sent_sizes import check_download, check_modules
from fedlora.federation.secure.agreement import RoundName
from fedlora.federation.secure.signing import public_half
from fedlora.federation.secure.terms import Terms
from fedlora.federation.wire.job import Job, job_of
from fedlora.federation.wire.messages import unpack_download, unpack_pairs
from fedlora.lora.adapter import Delta, Factors
from fedlora.privacy.rehearsal import check_before_training
from fedlora.strategies.base import Client, Download, Round, Strategy, Version, travelling
from fedlora.strategies.chosen import Chosen, chooses, masked, picked
from fedlora.strategies.forms import moves_base
from fedlora.strategies.probing import begins_with_own
from fedlora.training import cache, user_code
from fedlora.training.begun_with import digest_of_rows
from fedlora.training.certificate import Numbers
from fedlora.training.data.batches import Encoded
from fedlora.training.evaluate import evaluate
from fedlora.training.model.model import Model
from fedlora.training.precision import computing
from fedlora.training.train import Fit, fit, threads


@dataclass(frozen=True)
class Trained:
    """The results of one round of local training."""

    sent: Factors
    keeps: bool
    examples: int
    fit: Fit
    scores: Mapping[str, float]
    numbers: tuple[Numbers, Numbers]
    """The certificate's, at the start and at the end."""
    chosen: Chosen | None = None
    """Which ranks `sent` has, where the client chooses them."""
    own: bool = False
    """Did it begin with something that it kept? Looked at for a secure sum."""


@dataclass
class LocalRound:
    """One round of local training, under way."""

    train: Callable[[], Fit]
    outcome: Fit = field(init=False)
    """What `train` gave."""
    done: Trained = field(init=False)


@dataclass(frozen=True)
class ClientJob:
    """What one message asks of this client, and all that the client needs to do it."""

    config: Config
    job: Job
    strategy: Strategy[Any]
    memory: ClientMemory
    download: Download
    base_offset: Mapping[str, Delta]
    """What the run's initialisation subtracts from the base; in the first message only."""
    policy: Policy | None = None
    """The node's own, where it has one."""
    probes: str = ""
    """The key of the certificate's signs, where the members of a sum agreed on it."""
    shared: str = ""
    """The digest of the run's config, without what is this node's own."""

    @classmethod
    def open(cls, message: Message, context: Context) -> "ClientJob":
        """The job that a message brings, under this node's own settings."""
        job, policy = job_of(message.content), Policy.of(context.node_config)
        config = read_config(context, job, policy)
        root = Path(config.output.client_memory or Path(config.run.out, config.run.name, "clients"))
        memory = ClientMemory(root, job.client, job.token)
        config = with_microbatch(config, memory.microbatch() or job.microbatch)
        bare = "download" not in message.content
        download = Download(Factors(), frozenset()) if bare else unpack_download(message.content)
        check_download(policy, download)
        first = message.content.get("base-offset")
        base_offset = unpack_pairs(first) if isinstance(first, ArrayRecord) else {}
        strategy = config.build_strategy()
        shared = Config.read({**context.run_config, **job.changes})
        digest = shared.digest() if config.secure.aggregation else ""
        given = config, job, strategy, memory, download, base_offset, policy
        return cls(*given, shared=digest)

    @property
    def token(self) -> str:
        """The name of the run and of this start of the server; and of a secure sum's agreement,
        so that no base is gone on from that an earlier message left in this process."""
        return "/".join(filter(None, (self.job.token, self.job.incarnation, self.probes)))

    @property
    def round(self) -> Round:
        return Round(self.job.round, self.config.run.seed)

    def model(self) -> Model:
        """This process's model, checked to be the same as the server's.

        Raises:
            ModelError: the base differs, so nothing learned on it would add up; or the source of
                the user's own code does.
        """
        job = self.job
        if (mine := user_code.identity(self.config)) != job.code:
            named = ", ".join(value for _, value in user_code.named(self.config))
            raise ModelError.public(
                f"client {job.client}'s source of {named or 'no code at all'} is not the server's: "
                f"digest {mine or 'of nothing'}, must be {job.code or 'of nothing'}; use the same "
                "files"
            )
        model = cache.model(self.config, job.labels)
        check_modules(self.policy, len(model.shapes))
        here, there = (x.partition("+") for x in (model.fingerprint, job.fingerprint))
        if here[0] == there[0] and here != there:
            raise ModelError.public(
                f"client {job.client}'s adapter to start from (model.adapter) is not the server's: "
                f"digest {here[2] or 'of none'}, must be {there[2] or 'of none'}; use the same"
            )
        if model.fingerprint != job.fingerprint:
            raise ModelError.public(
                f"client {job.client}'s base model (model.path) is not the server's: "
                f"fingerprint {model.fingerprint}, must be {job.fingerprint}; use the same files"
            )
        return model

    @property
    def may_report_metrics(self) -> bool:
        """May counts, losses, scores and timings leave? Under DP no noise covers them."""
        if self.config.secure.aggregation:
            return False
        if self.policy and self.policy.privacy.metrics == "never":
            return False
        return not self.config.privacy.on or self.config.privacy.release_metrics

    def check_clear(self, what: str) -> None:
        """Raises PrivacyError where nothing of this client may leave but in a sum."""
        if self.config.secure.aggregation:
            raise PrivacyError.public(
                f"secure.aggregation is on: client {self.job.client} does not send {what} in the "
                "clear"
            )

    def terms(self, cohort: int) -> Terms:
        """The terms of a secure aggregation with a cohort of this size.

        Raises:
            PolicyError: they are not what the node's policy demands.
        """
        terms = Terms.of(self.config, cohort)
        return check_terms(self.policy, terms) if self.policy else terms

    def rows(self, part: str) -> Encoded:
        """This client's "train" or "test" rows, tokenised.

        Raises:
            PolicyError: it has fewer to train on than its policy demands.
        """
        config, job = self.config, self.job
        if self.policy:
            found = len(cache.client_rows(job.client, config, job.labels).train)
            if found < (least := self.policy.data.smallest):
                check([("so few rows", f"{found}, data.smallest = {least}")])
        return cache.encoded(part, job.client, config, job.labels)

    def secure_client(self) -> SecureClient:
        """This client as a party of this round's secure aggregation."""
        if not self.config.secure.aggregation:
            raise PrivacyError.public(
                "secure.aggregation is off on this client, and on at the server"
            )
        job = self.job
        name = RoundName(self.shared, job.token, job.round, job.incarnation, job.since)
        self.enter_secure_round("stage")
        own, directory = self.policy.secure if self.policy else None, self.memory.own / "secure"
        together = own.colluding + 2 if own else 0
        if own is None or not own.members:  # the server says whose each key is
            return SecureClient(directory, job.client, name, together=together)
        identity, members = private_key(Path(own.key)), Members.load(Path(own.members))
        certificate = read_file(Path(own.certificate))
        members.check(job.client, public_half(identity), certificate)
        signs = identity, members, together, certificate
        return SecureClient(directory, job.client, name, *signs)

    def enter_secure_round(self, step: secure_book.Step) -> None:
        """This step is on the node's disk, where it counts, when this returns.

        Raises:
            PolicyError: the policy allows no more rounds, or none of this start of the server.
        """
        if self.policy:
            secure_book.enter(self.policy, self.job.since, step)

    @contextmanager
    def local_round(self) -> Iterator[LocalRound]:
        """A context whose body trains the loaded, checked model; then `done` has what is sent.

        Around the body rather than under it: what trains stands on the stack of its message.
        """
        config, job = self.config, self.job
        if config.data.node_path:
            mine = cache.all_client_rows(job.client, config, job.labels)
            self.memory.check_rows(digest_of_rows(mine.parts))
        rows, test = self.rows("train"), self.rows("test")
        scores: dict[str, float] = {}
        with threads(config.train.threads), self.ready() as (model, kept):
            begins = self.strategy, self.download, kept, (me := self.as_client(model)), self.round
            own = config.secure.aggregation and begins_with_own(*begins)
            begun, chooser = self.numbers(model), chooses(self.strategy)
            before = model.read() if chooser else Factors()
            self.check(model, rows)
            chosen = chosen_first(model, rows, config, self.strategy, me, self.round)
            judged = config.evaluate.clients and self.may_report_metrics
            if judged:
                scores |= named("before", evaluate(model, test, config))
            columns, penalty = self.download.trainable, self.download.penalty
            args = (model, rows, columns, config, job.round, job.client, penalty)
            local = LocalRound(partial(self.trainer(), *args))
            counted_anew(config.train.gradient_accumulation_steps)
            yield local
            if judged:
                scores |= named("after", evaluate(model, test, config))
            trained = model.read()
            if chooser:
                chosen = chosen or chooser.choose(before, trained, me, self.round)
                trained = masked(before, trained, chosen)
                model.load(trained, self.download.block)
            if whole := error_feedback.carried(trained, self.strategy, self.memory, config, job):
                model.load(whole, self.download.block)
            numbers = begun, self.numbers(model)
        whole, keep = self.strategy.upload(trained, kept)
        sent = travelling(whole, self.download.trainable)
        sent = sent if chosen is None else picked(sent, chosen)
        if keeps := any(True for _ in keep.items()):
            self.memory.remember(job.round, keep)
        done = sent, keeps, len(rows), local.outcome, scores, numbers, chosen, own
        local.done = Trained(*done)

    def numbers(self, model: Model) -> Numbers:
        """The certificate's numbers of the model as it is now."""
        args = (model, self.strategy, self.download, self.config, self.job)
        return witness.numbers(*args, self.probes)

    def check(self, model: Model, rows: Encoded) -> None:
        """Does the loaded model train as it must? Once a run, processor and set of columns.

        Raises:
            TrainingCheckError: it does not. What was measured is told where losses are.
        """
        how = computing(self.config.train.precision, model.device)
        key = f"{sorted(self.download.trainable)} on {how}"
        if key in self.memory.checked():
            return
        args = (model, rows, self.download, self.config, self.job.round, self.job.client)
        try:
            check_before_training(*args)
        except TrainingCheckError as e:
            raise e if self.may_report_metrics else TrainingCheckError(e.what) from None
        self.memory.add_checked(key)

    def trainer(self) -> Callable[..., Fit]:
        """`train.fit`, or under example-level DP `private_fit` with this node's ledger."""
        config, job = self.config, self.job
        if not config.privacy.by_example:
            told = config.evaluate.steps and self.may_report_metrics
            return partial(fit, held=self.rows("validation")) if told else fit
        from fedlora.privacy.keeper import KeptLedger, Payer
        from fedlora.privacy.ledger import Acknowledged, Ledger
        from fedlora.privacy.training import Payments, private_fit
        from fedlora.privacy.units import Units

        units = Units.of(cache.client_rows(job.client, config, job.labels).train, config.data)
        root = Path(config.privacy.ledger) if config.privacy.ledger else self.memory.root
        ledger: Payer = Ledger(root, opens=self.policy is None)
        if self.policy and (place := self.policy.privacy.keeper):
            ledger = KeptLedger(Path(place))
        known = Acknowledged(job.ledger, job.charges)
        return partial(private_fit, payments=Payments(ledger, units, job.token, known))

    @contextmanager
    def ready(self, keep: bool = False) -> Iterator[tuple[Model, Factors]]:
        """A context: the model loaded as this client trains or scores it, and what it had kept.

        keep: what it had kept of other rounds too.
        """
        download, job = self.download, self.job
        model = self.model()
        kept = self.memory.recall(job.memory_round, keep)
        if self.base_offset:
            self.memory.add_base([Version(0, self.base_offset)])
        self.memory.add_base(download.base)
        init, stored = self.config.lora.init, self.config.model.quantization
        start = self.memory.base_offset() if moves_base(init, stored) else {}
        model.rebase(self.token, self.memory.base_to(job.base_number), start)
        factors = self.strategy.start(download, kept, self.as_client(model), self.round)
        with model.folded(download.fold):
            model.load(factors, download.block, self.strategy.needs().scaled_blocks)
            if self.probes:
                check_whole(factors, model)
            yield model, kept

    def as_client(self, model: Model) -> Client:
        """This client as its strategy sees it."""
        job = self.job
        return Client(job.client, model.layers(job.ranks), job.base_number, job.memory_round > 0)

    def reply(self, records: Mapping[str, Any], keeps: bool = False) -> RecordDict:
        """A reply of these records, with the tag that tells the server whose it is."""
        tag: dict[str, Any] = {"round": self.job.round, "token": self.job.token}
        tag |= {"client": self.job.client, "keeps": keeps}
        return RecordDict({"reply": ConfigRecord(tag), **records})


def read_config(context: Context, job: Job, policy: Policy | None = None) -> Config:
    """The run config, with this node's own settings (data path, memory, devices) in place.

    With a policy, only what that admits.

    Raises:
        ConfigError: it is not the server's, or asks for what this node does not allow.
        PolicyError: the policy does not allow it.
    """
    shared = {**context.run_config, **job.changes}
    theirs = Config.read(shared)
    if (mine := theirs.identity()) != job.config:
        raise ConfigError.public(
            [
                f"client {job.client}'s run config has digest {mine}, must be the server's, "
                f"{job.config}: give `Federation` the config of context.run_config, changes as its "
                "arguments or in the run config, and use one version of fedlora everywhere"
            ]
        )
    node = context.node_config
    if policy:
        if job.client != number_of(context):
            check([("another client's number", f"{job.client}, this is {number_of(context)}")])
        return admit(policy, context.run_config, job)
    check_from_server(theirs, node)
    own: dict[str, Any] = {
        "data.node-path": node.get("data-path"),
        **{f"data.{key}": node.get(key) for key in COLUMNS},
        "output.client-memory": node.get("memory"),
        "simulate.devices": node.get("devices"),
        "model.adapter": node.get("adapter") if theirs.model.adapter else None,
        "privacy.max-epsilon": float(node.get("max-epsilon", 0)),
        "privacy.delta": own_delta(node),
        "secure.aggregation": node.get("secure-aggregation"),
    }
    given = {**shared, **{key: value for key, value in own.items() if value}}
    return Config.read(given)


def number_of(context: Context) -> int:
    """Which client this node is."""
    return int(context.node_config.get("partition-id", context.node_id % 2**31))


def with_microbatch(config: Config, n: int) -> Config:
    """The config with at most n examples in memory at once; 0: as it is."""
    if not n:
        return config
    most = min(n, config.train.microbatch or n)
    train = config.train.model_copy(update={"microbatch": most})
    return config.model_copy(update={"train": train})


def named(prefix: str, scores: Mapping[str, float] | None) -> dict[str, float]:
    """The scores, each under "prefix.name"."""
    return {f"{prefix}.{key}": float(value) for key, value in (scores or {}).items()}
