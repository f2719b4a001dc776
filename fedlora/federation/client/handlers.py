"""How a client answers each kind of message: one function for each.

    train       load the download, evaluate it, train, evaluate, remember, reply
    evaluate    load the download, evaluate it, reply
    gradient    a sketch of the first gradient, where the strategy begins with one
    query       who am I: client number, rank if the node sets one, machine, versions
    collect     what I have kept, where the strategy asks for it once at the end
    secagg_...  the five stages of a secure aggregation, in place of train

Every handler answers every message: whatever goes wrong comes back as an error reply with its
reason, since without a reply the server waits until its deadline, or without end.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)

from fedlora.config.policy import Policy
from fedlora.errors import ConfigError, PrivacyError
from fedlora.federation.client import error_feedback, machine
from fedlora.federation.client.attempts import attempts
from fedlora.federation.client.first_gradient import sketch
from fedlora.federation.client.job import ClientJob, Trained, named, number_of
from fedlora.federation.client.limits import counted_anew
from fedlora.federation.client.personalize import alone, personalized
from fedlora.federation.client.sent_sizes import check_vector
from fedlora.federation.wire.certificate import pack_numbers, with_changes
from fedlora.federation.wire.messages import (
    configs_of,
    pack_chosen,
    pack_factors,
    seq,
)
from fedlora.federation.wire.sent_digest import digest_of
from fedlora.federation.wire.versions import here
from fedlora.strategies.forms import moves_base
from fedlora.training.certificate import public_scales
from fedlora.training.evaluate import evaluate
from fedlora.training.train import threads

Handler = Callable[[Message, Context], RecordDict]


def query(_: Message, context: Context) -> RecordDict:
    """A new node's own facts: its client id, its rank and layers, its hardware and versions."""
    node, policy = context.node_config, Policy.of(context.node_config)
    rank = policy.model.rank if policy else int(node.get("rank", 0))
    layers = policy.model.layers if policy else int(node.get("layers", 0))
    facts: dict[str, Any] = {
        "client": number_of(context),
        "rank": rank,  # 0: the server decides
        "layers": layers,  # the most it has memory to train; 0: all
        **machine.facts(),
        **here(),
    }
    return RecordDict({"facts": ConfigRecord(facts)})


def train(message: Message, context: Context, job: type[ClientJob] = ClientJob) -> RecordDict:
    """One round of local training. job: how it is done, by another's for experiments on harm."""
    begun = time.perf_counter()
    work = job.open(message, context)
    work.check_clear("an update")
    ((work, done),) = trained([work])
    metrics: dict[str, Any] = {
        "num-examples": done.examples if work.may_report_metrics else 1,
        "steps": done.fit.steps,
        **named("privacy", done.fit.privacy),
    }
    if work.may_report_metrics:
        metrics |= {
            "loss": done.fit.loss,
            "train-seconds": done.fit.seconds,
            "forward-seconds": done.fit.forward,
            "backward-seconds": done.fit.backward,
            "tokens": done.fit.tokens,
            **({"microbatch": n} if (n := work.memory.microbatch()) else {}),
            "seconds": time.perf_counter() - begun,
            **done.scores,
            **named("during", done.fit.during),
        }
    sent = error_feedback.send(done.sent, work.strategy, work.memory, work.config, work.job)
    records = {
        "sent": sent,
        "metrics": MetricRecord(metrics),
        "certificate": pack_numbers(*done.numbers),
    }
    if done.chosen is not None:
        records["chosen"] = pack_chosen(done.chosen)
    return work.reply(records, done.keeps)


def trained(works: Iterable[ClientJob]) -> Iterator[tuple[ClientJob, Trained]]:
    """A round of local training of each of these clients of one process: its job and its results.

    One after another; clients that are to share a batch on one base would be trained here.
    """
    for work in works:
        for attempt in attempts(work):
            with attempt as tried, tried.local_round() as local:
                local.outcome = local.train()
        yield tried, local.done


def gradient(message: Message, context: Context) -> RecordDict:
    """A sketch of the first gradient's sign, for a strategy that begins with it."""
    work = ClientJob.open(message, context)
    work.check_clear("a first gradient")
    if work.config.privacy.on:
        raise PrivacyError.public("a sketch of the first gradient has no noise; nothing was sent")
    found: Mapping[str, Any] = {}
    for attempt in attempts(work):
        with attempt as tried, threads(tried.config.train.threads):
            rows, model = tried.rows("train"), tried.model()
            model.rebase(tried.token, [])
            found = dict(sketch(model, rows, tried.config, message.content))
    return work.reply(found)


def score(message: Message, context: Context) -> RecordDict:
    """Evaluate the download on this client's own test rows, or on those that it validates on."""
    work = ClientJob.open(message, context)
    if "rows" in message.content:
        return _validated(work, str(configs_of(message.content, "rows").get("part")))
    counted_anew(work.config.train.gradient_accumulation_steps)  # of what trains for itself
    test = work.rows("test")
    if not work.may_report_metrics:
        return work.reply({"metrics": MetricRecord({"num-examples": 1})})
    with threads(work.config.train.threads), work.ready() as (model, _):
        scores = named("final", evaluate(model, test, work.config))
        wanted = work.config.personalize
        rows = work.rows("train")
        if wanted.epochs:
            trainable, kept = work.download.trainable, work.memory.own
            tuned = personalized(model, rows, test, work.config, work.job, trainable, kept)
            scores |= named("personalized", tuned)
    if wanted.alone:
        model = work.model()
        with threads(work.config.train.threads):
            found = alone(model, rows, test, work.config, work.job, work.token)
            scores |= named("alone", found)
    return work.reply({"metrics": MetricRecord({"num-examples": len(test), **scores})})


def _validated(work: ClientJob, part: str) -> RecordDict:
    """Scores of the download on the rows that this client validates on; of no other part."""
    if part != "validation":
        raise ConfigError.public([f"rows of the part {part[:40]!r} are not scored by themselves"])
    metrics: dict[str, Any] = {"num-examples": 1}
    if work.may_report_metrics:
        rows = work.rows(part)
        with threads(work.config.train.threads), work.ready(keep=True) as (model, _):
            metrics = named(part, evaluate(model, rows, work.config))
        metrics["num-examples"] = len(rows)
    return work.reply({"metrics": MetricRecord(metrics)})


def collect(message: Message, context: Context) -> RecordDict:
    """What this client has kept, for a strategy that averages it once at the end."""
    work = ClientJob.open(message, context)
    work.check_clear("what it kept")
    kept = work.memory.recall(work.job.memory_round)
    rows = work.rows("train")
    return work.reply(
        {
            "sent": pack_factors(kept, work.config.wire.dtype),
            "metrics": MetricRecord({"num-examples": len(rows) if work.may_report_metrics else 1}),
        }
    )


# -- secure aggregation: see secure_client.py -------------------------------------------------


def secagg_setup(message: Message, context: Context) -> RecordDict:
    """Two fresh public keys for this round, signed with what all its members agree on."""
    from fedlora.federation.secure.agreement import Agreement

    work, asked = ClientJob.open(message, context), configs_of(message.content, "secagg")
    agreement = Agreement.read(str(asked["agreement"]))
    check_vector(work.policy, agreement.table)
    work.enter_secure_round("begin")
    keys = work.secure_client().setup(agreement, work.terms)
    return work.reply({"secagg": ConfigRecord({"keys": [*keys]})})


def secagg_share(message: Message, context: Context) -> RecordDict:
    """Shares of this client's secrets, each for one neighbour to read."""
    from fedlora.federation.secure.signing import RoundKeys

    work, asked = ClientJob.open(message, context), configs_of(message.content, "secagg")
    of, flat = seq(asked, "clients"), seq(asked, "keys")
    size = len(RoundKeys._fields)
    keys = {i: RoundKeys(*flat[size * n : size * (n + 1)]) for n, i in enumerate(of)}
    boxes = work.secure_client().share(keys, work.terms)
    record = ConfigRecord({"clients": list(boxes), "boxes": list(boxes.values())})
    return work.reply({"secagg": record})


def secagg_collect(message: Message, context: Context) -> RecordDict:
    """One round of local training, of which only a masked vector leaves."""
    from fedlora.federation.client.agreed_base import check_base
    from fedlora.federation.secure.agreement import same_shapes
    from fedlora.federation.secure.vector import encode, folded

    work, asked = ClientJob.open(message, context), configs_of(message.content, "secagg")
    boxes = dict(zip(seq(asked, "clients"), seq(asked, "boxes"), strict=True))
    masker = work.secure_client().open(boxes, work.terms)
    agreement = masker.agreement
    masker.check_sent(digest_of(message.content))
    moves = moves_base(work.config.lora.init, work.config.model.quantization)
    check_base(work.download.base, work.job.base_number, bool(work.base_offset) or not moves)
    work.enter_secure_round("count")  # why nothing is sent is an answer, too
    ((work, done),) = trained([replace(work, probes=agreement.probes)])
    private = work.config.privacy.on
    n, loss = (1, 0.0) if private else (done.examples, done.fit.loss)
    start, end = done.numbers
    sent = with_changes(done.sent, start, end, public_scales(work.model(), start))
    kind = masker.kind(same_shapes(folded(sent)), work.download.trainable, done.own)
    layout = agreement.table.layout
    vector = encode(sent, n, loss, kind, layout, agreement.terms)
    x = masker.masked(vector)
    array = Array(x.dtype.name, tuple(x.shape), "fedlora.masked", x.tobytes())
    records = {"masked": ArrayRecord({"vector": array})}
    if not (work.job.cuts or done.own):  # what follows from what the server sent, and that alone
        records["start"] = pack_numbers(start)
    return work.reply(records, done.keeps)


def secagg_agree(message: Message, context: Context) -> RecordDict:
    """A signature under whose updates the sum is to be of."""
    work, asked = ClientJob.open(message, context), configs_of(message.content, "secagg")
    signature = work.secure_client().agree(seq(asked, "survivors"), work.terms)
    return work.reply({"secagg": ConfigRecord({"signature": signature})})


def secagg_unmask(message: Message, context: Context) -> RecordDict:
    """The shares with which the server can unmask the sum, and nothing else."""
    work, asked = ClientJob.open(message, context), configs_of(message.content, "secagg")
    signatures = dict(zip(seq(asked, "clients"), seq(asked, "signatures"), strict=True))
    shares = work.secure_client().unmask(signatures, work.terms)
    found = sorted(shares.items())
    record = ConfigRecord({"clients": [i for i, _ in found], "shares": [x for _, x in found]})
    return work.reply({"secagg": record})
