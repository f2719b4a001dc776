"""The plan of an experiment, or what would stop it before round 1.

The data, the model and the clients' ranks are the run's own, and what it refuses is asked of the
functions that refuse it there. Only the clients' replies are missing: of a strategy or form that
begins with their first gradients, the state before those is judged.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, PrivacyError, StrategyError, TrainingCheckError
from fedlora.federation.client.machine import facts
from fedlora.federation.secure.rules import unsummable
from fedlora.federation.secure.terms import Terms
from fedlora.federation.secure.vector import Kind, Layout, kinds_of
from fedlora.federation.server import asynchronous
from fedlora.federation.server.bounds import MAJORITY, MOST, capped
from fedlora.federation.server.exchange import Schemas
from fedlora.federation.server.journal import Journal, Member
from fedlora.federation.server.places import check_place
from fedlora.federation.server.planning import Planner
from fedlora.federation.server.run import with_kept_places
from fedlora.federation.server.setup import check_begins, check_head
from fedlora.federation.wire.messages import count_bytes, pack_download, pack_factors
from fedlora.launch.doctor.finding import Finding
from fedlora.launch.doctor.the_memory import crew
from fedlora.launch.doctor.the_plan import few, plan
from fedlora.launch.doctor.the_rows import claims, lengths, rows_read, unanswerable
from fedlora.lora.adapter import Factors
from fedlora.privacy import central
from fedlora.privacy.rehearsal import check_first
from fedlora.privacy.training import PrivacyPlan
from fedlora.reports import observers
from fedlora.strategies.base import Client, Round, Start, Strategy
from fedlora.training import cache, named_metrics
from fedlora.training.begun_with import begun_with, check_begun_with
from fedlora.training.calibration import first_factors
from fedlora.training.data.batches import collate, local_steps
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.seam import end_mark, pieces
from fedlora.training.devices import is_host
from fedlora.training.model.agreement import trained_for
from fedlora.training.model.layers import taken_out
from fedlora.training.model.model import Model
from fedlora.training.model.stacks import owners
from fedlora.training.model.targets import left_out, stacks, tail
from fedlora.training.precision import described, resolved, slowdown


def experiment(config: Config) -> tuple[list[Finding], Table]:
    """Load the data and the model, ask the strategy, and lay out the plan.

    Raises:
        FedLoraError: what would stop the run before its first round.
    """
    corpus = cache.corpus(config := with_kept_places(config))
    named_metrics.check(config, corpus)
    findings = [*rows_read(config, corpus), *crew(config)]
    model = cache.model(config, corpus.labels)
    config = config.for_modules(len(model.shapes))
    findings += _model(config, model)
    findings += _responses(config, model, corpus)
    findings += lengths(config, corpus, model)
    findings += unanswerable(config, corpus, model)
    findings += claims(config, corpus)
    planner = Planner(config, model)
    members = expected(planner, config)
    clients = [Client(i, model.layers(planner.ranks(m))) for i, m in members.items()]
    findings += [Finding("problem", p) for p in preflight.problems(config, clients)]
    beside = [*_here(config, model, corpus)]
    if any(f.level == "problem" for f in findings):
        return [*findings, *beside], Table()
    strategy = config.build_strategy()
    widest = planner.widest([*members.values()])
    state, factors = _begun(config, model, strategy, widest, clients, corpus)
    findings += [Finding("problem", p) for p in measured(config, strategy, state, clients, factors)]
    findings += _budget(config, corpus)
    if any(f.level == "problem" for f in findings):
        return [*findings, *beside], Table()
    findings += [
        _precision(config, model),
        _training(config, model, strategy, state, clients[0], corpus),
    ]
    findings += _secure(config, strategy, state, clients)
    findings += _bounds(config, clients, corpus)
    table, largest = _plan(config, strategy, state, clients, corpus)
    findings += [*plan(config, model, strategy, largest), *few(config, strategy, state, clients)]
    return [*findings, *beside], table


def expected(planner: Planner, config: Config) -> dict[int, Member]:
    """The first round's members: at the ranks that ranks.policy gives nodes like this one."""
    mine = facts()
    return planner.replan({i: planner.welcome(i, mine) for i in range(config.clients.count)})


def _begun(
    config: Config,
    model: Model,
    strategy: Strategy[Any],
    widest: Mapping[str, int],
    clients: Sequence[Client],
    corpus: Corpus,
) -> tuple[Any, Factors]:
    """The strategy's first state, and the factors that it was made of.

    The model is left on the base that clients begin on.
    """
    factors = first_factors(model, Client(-1, model.layers(widest)), config, corpus)
    state = strategy.init(Start(factors, clients, model.weights(), config.run.seed))
    base_offset = taken_out(config, factors, model.weights())
    model.rebase("doctor", strategy.effective(state).base, base_offset)
    return state, factors


def measured(
    config: Config, strategy: Strategy[Any], state: Any, clients: Sequence[Client], factors: Factors
) -> Iterator[str]:
    """What the run finds before anything is sent, by measuring its strategy on its own state."""
    round = Round(1, config.run.seed)
    try:
        check_head(strategy, state, clients, factors, round)
        if factors.adapter() and config.lora.init != "default":
            check_begins(config, strategy, state, clients, factors)
        if private := central.CentralPrivacy.of(config):
            central.check(strategy, state, clients, round)
            private.afford()
        if config.round.buffer:
            asynchronous.check(strategy, state, clients, round)
    except (StrategyError, PrivacyError) as e:
        yield str(e)
    if config.secure.aggregation:
        kinds = _kinds(strategy, state, clients, round)
        if problem := unsummable(strategy, state, kinds, round):
            yield problem


def _here(config: Config, model: Model, corpus: Corpus) -> Iterator[Finding]:
    """What else stands in the way: a run of this name, files that it did not begin with, a taken
    port, a tracker that is not here."""
    journal = Journal(config)
    kept = {"output.client-memory": config.output.client_memory,
            "privacy.ledger": config.privacy.ledger}  # fmt: skip
    for key, path in kept.items():
        try:
            if path:
                check_place(key, Path(path))
        except CheckpointError as e:
            yield Finding("problem", str(e))
    try:
        journal.check()
        if config.run.resume:
            here = begun_with(model, corpus)
            check_begun_with(journal.begun_with(), here, journal.directory)
    except CheckpointError as e:
        yield Finding("problem", str(e))
    yield from (Finding("problem", p) for p in observers.problems(config))


def _budget(config: Config, corpus: Corpus) -> Iterator[Finding]:
    """Whether the clients whose rows are here could train under privacy.level = 'example'.

    Each refuses for itself, so it is a problem where all of them would.
    """
    sizes = sorted({len(c.train) for c in corpus.clients} - {0})
    if not config.privacy.by_example or config.data.node_path or not sizes:
        return
    refusals = []
    for n in {sizes[0], sizes[-1]}:
        try:
            PrivacyPlan.of(config, n)
        except PrivacyError as e:
            refusals.append(str(e))
    if refusals:
        every = len(refusals) == len({sizes[0], sizes[-1]})
        yield Finding("problem" if every else "note", refusals[-1])


def _model(config: Config, model: Model) -> Iterator[Finding]:
    """What of the model is adapted, and which weights are not, by their kind."""
    base = model.peft.get_base_model()
    total = sum(p.numel() for p in base.parameters()) / 1e6
    modules = {m: shape for m, shape in model.shapes.items() if not shape.stack}
    kinds = Counter(m.rpartition(".")[2] for m in modules)
    names = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    size = sum(s.d * s.k for s in modules.values()) / 1e6
    yield Finding(
        "ok",
        f"model: {total:.1f} M parameters, {len(modules)} adapted modules ({names}), "
        f"{size:.1f} M weights"
        + (f"; trained whole: {', '.join(model.heads)}" if model.heads else ""),
    )
    still = left_out(base, model.heads, owners(model.shapes))
    left = sorted(still.items(), key=lambda kind: -kind[1])
    if left:
        shown = ", ".join(f"{n / 1e6:.1f} M {kind}" for kind, n in left[:6])
        more = f" and {len(left) - 6} more kinds" if len(left) > 6 else ""
        yield Finding("ok", f"weights that stay as they are: {shown}{more}")
    yield from _experts(base, model)
    if model.task.pictured:
        sample = model.task.made_up(model.tokenizer, model.labels, (1,))
        shape = " x ".join(
            map(str, collate(sample, torch.zeros(1).long())["pixel_values"].shape[1:])
        )
        maker = type(model.tokenizer).__name__
        yield Finding("ok", f"pictures: each becomes {shape} numbers, by {maker}")
    if (longest := model.longest(config.data.max_length)) < config.data.max_length:
        text = f"texts are cut at {longest} tokens, which the model has positions for"
        yield Finding("note", text, f"data.max-length is {config.data.max_length}")
    elif (known := trained_for(base)) and longest > known:
        text = f"data.max-length = {longest} is beyond the {known} positions of the model's config"
        yield Finding("note", f"{text}: it can read such texts, and was not trained on any")


def _experts(base: Any, model: Model) -> Iterator[Finding]:
    """How many experts of a mixture are adapted, and how to adapt those that are not."""
    here = stacks(base)
    if mine := [p for n, p in here.items() if n in model.stacks]:
        count, size = sum(len(p) for p in mine), sum(p.numel() for p in mine) / 1e6
        text = f"{count} adapted experts in {len(mine)} stacked tensors, {size:.1f} M weights"
        yield Finding("ok", text)
    if rest := {n: p for n, p in here.items() if n not in model.stacks}:
        size = sum(p.numel() for p in rest.values()) / 1e6
        text = f"{size:.1f} M weights are experts in {len(rest)} stacked tensors, not adapted"
        names = ", ".join(dict.fromkeys(tail(n) for n in rest))
        yield Finding("note", text, f'lora.target-parameters = "{names}" would adapt them')


def _responses(config: Config, model: Model, corpus: Corpus) -> Iterator[Finding]:
    """Where a language model learns to stop, and where prompt and response share a token."""
    if not model.task.generates:
        return
    if (mark := end_mark(model.tokenizer, config.data.chats)) is None:
        hint = "name a model.tokenizer with an eos token"
        yield Finding("note", "the model learns no end: its tokenizer has no eos token", hint)
    else:
        stop = model.tokenizer.convert_ids_to_tokens(mark)
        yield Finding("ok", f"the model learns to stop at {stop!r}")
    parts = [*(part for c in corpus.clients for part in c.parts), *corpus.held]
    chat = config.data.chat_template
    if config.data.messages or not model.task.shifted:  # which have no seams of ours
        parts = []
    shared = [p.straddled for rows in parts for p in pieces(rows, model.tokenizer, chat)]
    if any(shared):
        text = f"{sum(shared)} of {len(shared)} rows: a token would lie in both prompt and response"
        spaced = not chat and any(x.endswith(" ") for rows in parts for x in rows.text)
        hint = "end data.prompt without a space: one is put between prompt and response"
        text = f"{text}; the response is trained without it, as generation will see it"
        yield Finding("note", text, hint if spaced else "")


def _precision(config: Config, model: Model) -> Finding:
    """What train.precision comes to here, and whether that is a good idea."""
    said = described(config.train.precision, model.device)
    if resolved(config.train.precision, model.device) == "float32" or not is_host(model.device):
        return Finding("ok", said)
    ratio = slowdown()
    said = f"{said}; a bfloat16 product takes {ratio:.2g} of a float32 one's time"
    if ratio < 1:
        return Finding("ok", said)
    return Finding("note", said, "train.precision = 'float32' is faster on this machine")


def _training(
    config: Config, model: Any, strategy: Any, state: Any, client: Any, corpus: Any
) -> Finding:
    """The training check, on the first client's rows where they are here."""
    here = not config.data.node_path and any(len(c.train) for c in corpus.clients)
    rows = cache.encoded("train", client.id, config, corpus.labels) if here else None
    try:
        check_first(model, strategy, state, client, rows, config, 1)
    except TrainingCheckError as e:
        means = "docs/use/training-check.md says what each finding means"
        return Finding("problem", f"training check: {e}", means)
    whose = "client 0's rows" if here and not config.privacy.by_example else "synthetic rows"
    return Finding("ok", f"training check: losses, gradients and a step are right on {whose}")


def _kinds(
    strategy: Strategy[Any], state: Any, clients: Sequence[Client], round: Round
) -> list[Kind]:
    """The clients by what each sends in this round."""
    schemas = Schemas(strategy)
    return kinds_of((c, *schemas.of(state, c, 0, round)) for c in clients)


def _secure(config: Config, strategy: Any, state: Any, clients: Any) -> Iterator[Finding]:
    """What secure aggregation hides, and what it costs."""
    if not config.secure.aggregation:
        return
    kinds = _kinds(strategy, state, clients, Round(1, config.run.seed))
    K = config.clients.per_round or config.clients.count
    terms, numbers = Terms.of(config, K), len(Layout.over([kind.shapes for kind in kinds]))
    size = terms.bits // 8
    yield Finding(
        "ok",
        f"secure aggregation: the server learns sums over {terms.fewest} to {K} clients; up to "
        f"{K - terms.fewest} of {K} may drop out" + (
            "" if terms.shares >= K else f" (of each client's {terms.shares} neighbours, "
            f"{terms.shares - terms.threshold})"
        ),
    )  # fmt: skip
    yield Finding(
        "ok",
        f"secure aggregation costs 5 messages a client and round in place of 1, and up {numbers} "
        f"numbers of {size} bytes ({numbers * size / 1e3:.0f} kB), whatever wire.dtype; it moves "
        f"a mean over clients of {terms.weight if terms.weight == 1 else 100} examples by at most "
        f"{terms.error(K, K * min(terms.weight, 100)):.1g}",
    )
    if terms.ring:
        yield Finding(
            "note",
            "secure aggregation on a ring (secure.num-shares) holds against an honest but curious "
            "server alone: no stories are compared beyond a client's neighbours",
            "against a server that lies set secure.num-shares = 0",
        )
    yield Finding(
        "note",
        f"secure aggregation: the server may have {terms.colluding} clients that help it "
        "(secure.colluding); whose each key is the server says, and it is believed, where a node "
        "has no list of members: docs/privacy/secure-aggregation.md",
    )
    yield Finding(
        "note",
        "secure aggregation: no bound on a single client can be enforced, so one of them can "
        "spoil the model; the sum's own weight, values and norm are checked before it is committed",
        "where clients are not trusted, use round.norm-bound and robust.method without it",
    )


def _bounds(config: Config, clients: Sequence[Client], corpus: Corpus) -> Iterator[Finding]:
    """Where the bounds would judge without a majority, or judge honest clients."""
    times, train = config.round.norm_bound, config.train
    if config.secure.aggregation or config.privacy.by_client:
        return
    rows = [len(corpus.client(c.id).train) for c in clients]
    if config.robust.method == "none" and not config.privacy.on:
        yield from _capped({c.id: r for c, r in zip(clients, rows, strict=True)}, config)
    if not times:
        return
    n = config.clients.per_round or config.clients.count
    if n < MAJORITY:
        yield Finding(
            "note",
            f"{n} client{'s' if n > 1 else ''} a round: round.norm-bound has no majority to judge "
            f"by, and refuses only a change of {MOST:g} times the weights' own norm",
        )
    steps = [local_steps(r, train) for r in rows]
    usual = statistics.median(steps) if n >= MAJORITY and all(rows) else 0
    if usual and (many := [c.id for c, s in zip(clients, steps, strict=True) if s > times * usual]):
        yield Finding(
            "note",
            f"client {', '.join(map(str, many[:5]))} trains more than {times:g} times the steps of "
            "the median client, so an honest change may be too long for round.norm-bound",
            "raise round.norm-bound, or set train.steps, which all clients share",
        )


def _capped(rows: Mapping[int, int], config: Config) -> Iterator[Finding]:
    """Clients whose honest counts round.count-bound would cap."""
    times = config.round.count_bound
    for i, n in capped(rows, times).items():
        yield Finding(
            "note",
            f"client {i} has {rows[i]} training rows and will count as {n}, round.count-bound = "
            f"{times:g} times the median: (E) then holds for the weights that count",
            "where its count is to be trusted, raise round.count-bound",
        )


def _plan(
    config: Config, strategy: Any, state: Any, clients: Any, corpus: Any
) -> tuple[Table, int]:
    """What each client does in a round, and the most bytes one client's messages take."""
    round = Round(1, config.run.seed)
    table = Table("client", "rank", "rows", "test", "steps a round", "down", "up", title="Plan")
    largest = 0
    for c in clients:
        sent = strategy.download(state, c, round)
        begun = strategy.start(sent, Factors(), c, round)
        back = pack_factors(strategy.upload(begun, begun)[0], config.wire.dtype)
        down, up = count_bytes(pack_download(sent, config.wire.dtype)), back.count_bytes()
        largest = max(largest, up + down)
        rows = corpus.client(c.id)
        n = len(cache.encoded("train", c.id, config, corpus.labels)) if len(rows.train) else 0
        steps = local_steps(n, config.train)
        rank = max(layer.rank for layer in c.layers.values())
        table.add_row(
            str(c.id), str(rank), str(len(rows.train)), str(len(rows.test)), str(steps),
            f"{down / 1e3:.0f} kB", f"{up / 1e3:.0f} kB",
        )  # fmt: skip
    return table, largest
