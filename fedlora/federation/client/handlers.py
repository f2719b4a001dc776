"""The client's side of a round: take what came, train, send back what the strategy says.

    train       load the download, evaluate it, train, evaluate, remember, reply
    evaluate    load the download, evaluate it, reply
    gradient    a sketch of the first gradient, where the strategy begins with one
    query       who am I: client number, rank if the node sets one, what this machine has
    collect     what I have kept, where the strategy asks for it once at the end
    secagg_...  the four stages of a secure aggregation, in place of train

Every handler answers every message: whatever goes wrong comes back as an error reply with its
reason, since a node that gets no reply waits for it for ever.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

from fedlora.config.reader import Config
from fedlora.errors import FedLoraError, ModelError, PrivacyError, TrainingCheckError
from fedlora.federation.client import error_feedback as feedback
from fedlora.federation.client import machine as capability
from fedlora.federation.client import witness
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.client.personalize import alone, personalized
from fedlora.federation.client.secure_client import Member
from fedlora.federation.secure.terms import Terms
from fedlora.federation.server.certifier import pack_numbers, with_changes
from fedlora.federation.server.first_gradient import sketch
from fedlora.federation.wire.codes import code_of
from fedlora.federation.wire.messages import Job, pack_factors, seq, unpack_download, unpack_pairs
from fedlora.lora.adapter import Delta, Factors
from fedlora.privacy.rehearsal import check_before_training
from fedlora.strategies.base import Client, Download, Round, Strategy, Version, travelling
from fedlora.strategies.forms import moves_base
from fedlora.training import cache as site
from fedlora.training.certificate import Numbers, public_scales
from fedlora.training.data.batches import Encoded
from fedlora.training.evaluate import evaluate
from fedlora.training.model.model import Model
from fedlora.training.precision import computing
from fedlora.training.train import Fit, fit, threads

Handler = Callable[[Message, Context], RecordDict]


def answer(handler: Handler, message: Message, context: Context) -> Message:
    """The handler's reply, or an error reply that says what went wrong. Never nothing."""
    try:
        return Message(handler(message, context), reply_to=message)
    except Exception as e:  # whatever it is, the server must hear of it
        return Message(Error(code_of(e), _told(e)), reply_to=message)


def _told(error: Exception) -> str:
    """An error in words; of one that is not meant for a user also where it was raised."""
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, FedLoraError):
        return told
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{told} ({Path(where.filename).name}:{where.lineno})"


def query(_: Message, context: Context) -> RecordDict:
    """What the server asks of a node it has not met."""
    node = context.node_config
    facts: dict[str, Any] = {
        "client": int(node.get("partition-id", context.node_id % 2**31)),
        "rank": int(node.get("rank", 0)),  # 0: the server decides
        "layers": int(node.get("layers", 0)),  # the most it has memory to train; 0: all
        **capability.facts(),
    }
    return RecordDict({"facts": ConfigRecord(facts)})


def train(message: Message, context: Context) -> RecordDict:
    """One round of local training."""
    begun = time.perf_counter()
    desk = Desk.open(message, context)
    desk.check_clear("an update")
    done = desk.train()
    metrics: dict[str, Any] = {
        "num-examples": done.examples if desk.tells else 1,
        "steps": done.fit.steps,
        **_named("privacy", done.fit.privacy),
    }
    if desk.tells:
        metrics |= {
            "loss": done.fit.loss,
            "train-seconds": done.fit.seconds,
            "forward-seconds": done.fit.forward,
            "backward-seconds": done.fit.backward,
            "tokens": done.fit.tokens,
            "seconds": time.perf_counter() - begun,
            **done.scores,
        }
    sent = feedback.send(desk, done.sent)
    records = {
        "sent": sent,
        "metrics": MetricRecord(metrics),
        "certificate": pack_numbers(*done.numbers),
    }
    return desk.reply(records, done.keeps)


def gradient(message: Message, context: Context) -> RecordDict:
    """A sketch of the first gradient's sign, for a strategy that begins with it."""
    desk = Desk.open(message, context)
    desk.check_clear("a first gradient")
    if desk.config.privacy.on:
        raise PrivacyError("a sketch of the first gradient has no noise; nothing was sent")
    rows = site.encoded("train", desk.job.client, desk.config, desk.job.labels)
    model = desk.model()
    model.rebase(desk.token, [])
    with threads(desk.config.train.threads):
        found = sketch(model, rows, desk.config, message.content)
    return desk.reply(dict(found))


def score(message: Message, context: Context) -> RecordDict:
    """Evaluate the download on this client's own test rows."""
    desk = Desk.open(message, context)
    test = site.encoded("test", desk.job.client, desk.config, desk.job.labels)
    if not desk.tells:
        return desk.reply({"metrics": MetricRecord({"num-examples": 1})})
    with threads(desk.config.train.threads), desk.ready() as (model, _):
        scores = _named("final", evaluate(model, test, desk.config))
        wanted = desk.config.personalize
        rows = site.encoded("train", desk.job.client, desk.config, desk.job.labels)
        if wanted.epochs:
            scores |= _named("personalized", personalized(desk, model, rows, test))
    if wanted.alone:
        with threads(desk.config.train.threads):
            scores |= _named("alone", alone(desk, rows, test))
    return desk.reply({"metrics": MetricRecord({"num-examples": len(test), **scores})})


def collect(message: Message, context: Context) -> RecordDict:
    """What this client has kept, for a strategy that averages it once at the end."""
    desk = Desk.open(message, context)
    desk.check_clear("what it kept")
    kept = desk.memory.recall(desk.job.memory_round)
    rows = site.encoded("train", desk.job.client, desk.config, desk.job.labels)
    return desk.reply(
        {
            "sent": pack_factors(kept, desk.config.wire.dtype),
            "metrics": MetricRecord({"num-examples": len(rows) if desk.tells else 1}),
        }
    )


# -- secure aggregation: see secure_client.py -------------------------------------------------


def secagg_setup(message: Message, context: Context) -> RecordDict:
    """Two fresh public keys for this round."""
    desk, asked = Desk.open(message, context), message.content.config_records["secagg"]
    keys = desk.member().setup(desk.terms(asked["cohort"]))  # type: ignore[arg-type]
    return desk.reply({"secagg": ConfigRecord({"keys": list(keys)})})


def secagg_share(message: Message, context: Context) -> RecordDict:
    """Shares of this client's secrets, each for one neighbour to read."""
    desk, asked = Desk.open(message, context), message.content.config_records["secagg"]
    of, flat = seq(asked, "clients"), seq(asked, "keys")
    keys = {i: (flat[2 * n], flat[2 * n + 1]) for n, i in enumerate(of)}
    boxes = desk.member().share(keys, desk.terms)
    record = ConfigRecord({"clients": list(boxes), "boxes": list(boxes.values())})
    return desk.reply({"secagg": record})


def secagg_collect(message: Message, context: Context) -> RecordDict:
    """One round of local training, of which only a masked vector leaves."""
    from fedlora.federation.secure.vector import Layout, encode

    desk, asked = Desk.open(message, context), message.content.config_records["secagg"]
    boxes = dict(zip(seq(asked, "clients"), seq(asked, "boxes"), strict=True))
    masker = desk.member().open(boxes, desk.terms)
    done, private = desk.train(), desk.config.privacy.on
    n, loss = (1, 0.0) if private else (done.examples, done.fit.loss)
    layout = Layout.read(asked)
    start, end = done.numbers
    sent = with_changes(done.sent, start, end, public_scales(desk.model(), start))
    vector = encode(sent, n, loss, int(asked["kind"]), layout, masker.terms)  # type: ignore[arg-type]
    x = masker.masked(vector)
    array = Array(x.dtype.name, tuple(x.shape), "fedlora.masked", x.tobytes())
    records = {"masked": ArrayRecord({"vector": array})}
    if (
        not desk.job.cuts
    ):  # they follow from what the server sent; with a B of one's own they do not
        records["start"] = pack_numbers(start)
    return desk.reply(records, done.keeps)


def secagg_unmask(message: Message, context: Context) -> RecordDict:
    """The shares that take the masks off the sum, and off nothing else."""
    desk, asked = Desk.open(message, context), message.content.config_records["secagg"]
    shares = desk.member().unmask(seq(asked, "active"), seq(asked, "dead"), desk.terms)
    found = sorted(shares.items())
    record = ConfigRecord({"clients": [i for i, _ in found], "shares": [x for _, x in found]})
    return desk.reply({"secagg": record})


@dataclass(frozen=True)
class Trained:
    """What a round of local training came to."""

    sent: Factors
    keeps: bool
    examples: int
    fit: Fit
    scores: Mapping[str, float]
    numbers: tuple[Numbers, Numbers]
    """The certificate's, at the start and at the end."""


@dataclass(frozen=True)
class Desk:
    """One message's work: what it says, and what this client has to do it with."""

    config: Config
    job: Job
    strategy: Strategy[Any]
    memory: ClientMemory
    download: Download
    origin: Mapping[str, Delta]
    """What the run's initialisation takes out of the base, in the first message."""

    @classmethod
    def open(cls, message: Message, context: Context) -> "Desk":
        config = read_config(context)
        job = Job.read(message.content.config_records["job"])
        root = Path(config.output.client_memory or Path(config.run.out, config.run.name, "clients"))
        memory = ClientMemory(root, job.client, job.token)
        bare = "download" not in message.content.config_records
        download = Download(Factors(), frozenset()) if bare else unpack_download(message.content)
        first = message.content.get("origin")
        origin = unpack_pairs(first) if isinstance(first, ArrayRecord) else {}
        return cls(config, job, config.build_strategy(), memory, download, origin)

    @property
    def token(self) -> str:
        return f"{self.job.token}/{self.job.incarnation}"

    def model(self) -> Model:
        """This process's model, if it is the server's.

        Raises:
            ModelError: the base differs, so nothing learned on it would add up.
        """
        model, job = site.model(self.config, self.job.labels), self.job
        if model.fingerprint != job.fingerprint:
            raise ModelError(
                f"client {job.client}'s base model ({self.config.model.path}) is not the server's: "
                f"fingerprint {model.fingerprint}, must be {job.fingerprint}; use the same files"
            )
        return model

    @property
    def tells(self) -> bool:
        """May counts, losses, scores and timings leave? Under DP no noise covers them."""
        if self.config.secure.aggregation:
            return False
        return not self.config.privacy.on or self.config.privacy.release_metrics

    def check_clear(self, what: str) -> None:
        """Raises PrivacyError where nothing of this client may leave but in a sum."""
        if self.config.secure.aggregation:
            raise PrivacyError(
                f"secure.aggregation is on: client {self.job.client} does not send {what} in the "
                "clear"
            )

    def terms(self, cohort: int) -> Terms:
        """A secure aggregation's, for a cohort of this size."""
        return Terms.of(self.config, cohort)

    def member(self) -> Member:
        """This client in this round's secure aggregation."""
        if not self.config.secure.aggregation:
            raise PrivacyError("secure.aggregation is off on this client, and on at the server")
        job = self.job
        return Member(self.memory.own / "secure", job.client, job.round, job.incarnation)

    def train(self) -> Trained:
        """Train the download on this client's rows, remember, and give what is to leave."""
        config, job = self.config, self.job
        rows = site.encoded("train", job.client, config, job.labels)
        test = site.encoded("test", job.client, config, job.labels)
        scores: dict[str, float] = {}
        with threads(config.train.threads), self.ready() as (model, kept):
            begun = witness.numbers(self, model)
            self.check(model, rows)
            judged = config.evaluate.clients and self.tells
            if judged:
                scores |= _named("before", evaluate(model, test, config))
            outcome = self.fit(model, rows)
            if judged:
                scores |= _named("after", evaluate(model, test, config))
            trained = model.read()
            if whole := feedback.carried(self, trained):
                model.load(whole, self.download.block)
            numbers = begun, witness.numbers(self, model)
        whole, keep = self.strategy.upload(trained, kept)
        sent = travelling(whole, self.download.trainable)
        keeps = any(True for _ in keep.items())
        if keeps:
            self.memory.remember(job.round, keep)
        return Trained(sent, keeps, len(rows), outcome, scores, numbers)

    def check(self, model: Model, rows: Encoded) -> None:
        """Does the loaded model train as it must? Once a run, processor and set of columns.

        Raises:
            TrainingCheckError: it does not. What was measured is told where losses are.
        """
        key = f"{sorted(self.download.trainable)} on {computing(self.config.train.precision)}"
        if key in self.memory.checked():
            return
        args = (model, rows, self.download, self.config, self.job.round, self.job.client)
        try:
            check_before_training(*args)
        except TrainingCheckError as e:
            raise e if self.tells else TrainingCheckError(e.what) from None
        self.memory.add_checked(key)

    def fit(self, model: Model, rows: Encoded) -> Fit:
        """Train on these rows: under example-level DP, paid for in this data set's ledger."""
        config, job, download = self.config, self.job, self.download
        args = (model, rows, download.trainable, config, job.round, job.client, download.penalty)
        if not config.privacy.by_example:
            return fit(*args)
        from fedlora.privacy.ledger import Ledger, fingerprint
        from fedlora.privacy.training import private_fit

        raw = site.client_rows(job.client, config, job.labels).train
        data = fingerprint(zip_longest(raw.text, raw.label, raw.response, fillvalue=""))
        root = Path(config.privacy.ledger) if config.privacy.ledger else self.memory.root
        return private_fit(*args, Ledger(root, data), job.token)

    @contextmanager
    def ready(self) -> Iterator[tuple[Model, Factors]]:
        """The model as this client is to train or judge it, and what the client had kept."""
        download, job = self.download, self.job
        model = self.model()
        kept = self.memory.recall(job.memory_round)
        if self.origin:
            self.memory.add_base([Version(0, self.origin)])
        self.memory.add_base(download.base)
        init, stored = self.config.lora.init, self.config.model.quantization
        start = self.memory.origin() if moves_base(init, stored) else {}
        model.rebase(self.token, self.memory.base_to(job.base_number), start)
        me = Client(job.client, model.layers(job.ranks), job.base_number, job.memory_round > 0)
        round = Round(job.round, self.config.run.seed)
        factors = self.strategy.start(download, kept, me, round)
        with model.folded(download.fold):
            model.load(factors, download.block)
            yield model, kept

    def reply(self, records: Mapping[str, Any], keeps: bool = False) -> RecordDict:
        tag: dict[str, Any] = {"round": self.job.round, "token": self.job.token}
        tag |= {"client": self.job.client, "keeps": keeps}
        return RecordDict({"reply": ConfigRecord(tag), **records})


def read_config(context: Context) -> Config:
    """The run config, with this node's own settings (data path, memory directory) in place."""
    own = {
        "data.node-path": context.node_config.get("data-path"),
        "output.client-memory": context.node_config.get("memory"),
        "privacy.max-epsilon": float(context.node_config.get("max-epsilon", 0)),
        "secure.aggregation": context.node_config.get("secure-aggregation"),
    }
    given = {**context.run_config, **{key: value for key, value in own.items() if value}}
    return Config.read(given)


def _named(prefix: str, scores: Mapping[str, float] | None) -> dict[str, float]:
    return {f"{prefix}.{key}": float(value) for key, value in (scores or {}).items()}
