"""After the last round: collect what clients kept, score, and write the adapter and the summary."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.errors import FedLoraError, UpdateError
from fedlora.federation.server.adapter import checked, hold, limited, write_card
from fedlora.federation.server.bounds import check_finite, within
from fedlora.federation.server.choice import chosen, keep_collected, told_of
from fedlora.federation.server.client_words import check_metrics, scores_of
from fedlora.federation.server.exchange import (
    Limits,
    check_count,
    tag_of,
)
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import (
    Session,
    Setting,
    answers,
    client,
    connected,
    keep_parts,
    load,
    message,
    score,
    seconds,
)
from fedlora.federation.wire.codes import Refusal
from fedlora.federation.wire.messages import (
    arrays_of,
    metrics_of,
    unpack_factors,
)
from fedlora.privacy.summary import summary as privacy
from fedlora.reports.outcome import LOSS, PERPLEXITY, judge, judged_by, said
from fedlora.strategies.base import Client, CollectsAtEnd, Effective, Round, Upload, collects
from fedlora.training.data.corpus import describe
from fedlora.training.evaluate import generation
from fedlora.training.export_certificate import certified, load_exported
from fedlora.training.model import peft_directory
from fedlora.training.model.peft_directory import beginning, save_peft


def finish(setting: Setting, session: Session, run: Saved, grid: Grid, stopped: str = "") -> Saved:
    """Collect, evaluate on every client, write adapter/, clients.jsonl and summary.json.

    `stopped` says why the run ended before its last round, if it did.
    """
    last = run
    if (run := chosen(setting.config, setting.strategy, run)) is not last:
        session.lacking |= {*run.members}  # whose base may be a later round's
    if collector := collects(setting.strategy):
        run = collect(setting, session, run, grid, collector)
        keep_collected(setting.config, run)
    if setting.config.evaluate.clients:
        run = final_scores(setting, session, run, grid)
    load(setting, session, run, run.state)
    effective = beginning(setting.strategy.effective(run.state), run.base_offset)
    written = write_adapter(setting, session, effective)
    load(setting, session, run, run.state)  # a limited adapter is checked by what was written
    write_records(setting, session, run, stopped, written)
    told = checked(written["truncation"], written["excess"])
    directory = setting.journal.directory
    write_card(directory, directory / "adapter", setting.model, told)
    return run


def write_adapter(setting: Setting, session: Session, effective: Effective) -> dict[str, Any]:
    """Write adapter/, limited in size: its largest rank, what was cut, and `certify`'s result."""
    directory = setting.journal.directory / "adapter"
    if setting.model.form.kind != "factors":
        save_peft(setting.model, effective, directory)
        return {"rank": None, "truncation": 0.0, "excess": certify(setting, session, directory)}
    adapter, lost = limited(peft_directory.whole(setting.model, effective))
    save_peft(setting.model, effective, directory, adapter)
    if lost:
        hold(setting.model, adapter, effective.factors)
        session.observer.note(
            f"{directory} is cut to the size of the weights that it changes, which leaves out "
            f"{lost:.2%} of the change; fedlora export writes all of it"
        )
    top = max((p.rank for p in adapter.values()), default=0)
    return {"rank": top, "truncation": lost, "excess": certify(setting, session, directory)}


def collect(
    setting: Setting, session: Session, run: Saved, grid: Grid, collector: CollectsAtEnd[Any]
) -> Saved:
    """Ask, once, for what the clients kept, for the strategy's exact average of it."""
    round = Round(setting.config.run.rounds, setting.config.run.seed)
    asked = [c for c in connected(setting, session, run) if c.has_memory]
    messages = (message(setting, session, run, c, round, "query.collect", bare=True) for c in asked)
    uploads = []
    for i, reply in answers(setting, session, grid, messages):
        try:
            here = client(setting, run, i)
            tag_of(reply, here, round, run.token, "collect")
            uploads.append(read_kept(setting, run, reply, here))
        except FedLoraError as e:
            session.observer.client_failed(i, Refusal.of(e).reason)
    uploads = within(setting, session, uploads)
    if not uploads:
        return run
    uploads.sort(key=lambda u: u.client.id)
    after = replace(run, state=collector.finish(run.state, uploads))
    check_finite(setting, after, round)
    return after


def read_kept(setting: Setting, run: Saved, reply: Message, client: Client) -> Upload:
    """What a client had kept, decoded and checked.

    Raises:
        UpdateError, WireError: what is wrong with it.
    """
    limits, held = Limits.of(setting.config), setting.strategy.effective(run.state).factors.other
    try:
        n = metrics_of(reply.content, "metrics")["num-examples"]
        record = arrays_of(reply.content, "sent")
    except KeyError as e:
        raise UpdateError(f"the reply lacks {e}") from None
    check_count(n, limits)
    scale = {m: layer.scale for m, layer in client.layers.items()}
    kept = unpack_factors(record, scale, dtype=limits.dtype)
    for column, name, x in kept.items():
        layer, shape = client.layers.get(name), tuple(held[name].shape) if name in held else None
        if layer and column in ("A", "B"):
            shape = (layer.rank, layer.k) if column == "A" else (layer.d, layer.rank)
        if tuple(x.shape) != shape:
            raise UpdateError(f"{column} of {name} has shape {tuple(x.shape)}, must be {shape}")
    return Upload(client, kept, int(n))  # type: ignore[arg-type]


def final_scores(setting: Setting, session: Session, run: Saved, grid: Grid) -> Saved:
    """The final model on every client's own test rows."""
    round = Round(setting.config.run.rounds + 1, setting.config.run.seed)
    everyone = connected(setting, session, run)
    messages = (message(setting, session, run, c, round, "evaluate") for c in everyone)
    members = dict(run.members)
    for i, reply in answers(setting, session, grid, messages):
        try:
            tag_of(reply, client(setting, run, i), round, run.token, "evaluate")
            said = metrics_of(reply.content, "metrics")
            check_metrics(said)
        except (KeyError, UpdateError) as e:
            session.observer.client_failed(i, Refusal.of(e).reason)
            continue
        members[i] = replace(
            members[i],
            final=scores_of(said, "final.") or {},
            personalized=scores_of(said, "personalized.") or {},
            alone=scores_of(said, "alone.") or {},
        )
    return replace(run, members=members)


def spread(scores: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """The clients' mean of what the run is judged by, and that of the worst tenth of them.

    A tenth is at least one client. A name counts that more than half of the scored clients tell:
    what a run is judged by is not for one of them to say. None where no client was scored.
    """
    told = Counter(name for s in scores for name in s)
    most = sum(map(bool, scores)) / 2
    scores = [{name: x for name, x in s.items() if told[name] > most} for s in scores]
    metric = judged_by(scores)
    metric = LOSS if metric is PERPLEXITY else metric
    key = metric.key
    found = sorted((s[key] for s in scores if key in s), reverse=not metric.more)
    if not found:
        return None
    worst = found[: math.ceil(len(found) / 10)]
    return {key: sum(found) / len(found), f"worst_tenth_{key}": sum(worst) / len(worst)}


def client_lines(setting: Setting, session: Session, run: Saved) -> Iterator[dict[str, Any]]:
    """The lines of clients.jsonl."""
    corpus = setting.corpus
    labels = describe(corpus)
    for i, m in sorted(run.members.items()):
        simulated = i < len(corpus.clients)
        yield {
            "client": i,
            "node": session.nodes.get(i),
            "rank": m.rank,
            "modules": len(m.plan) or len(setting.model.shapes),
            "train_examples": m.examples,
            "test_examples": len(corpus.client(i).test) if simulated else None,
            "labels": labels.get(i, {}),
            "untokenised": _untokenised(setting, i, m.examples) if simulated else None,
            "test_labels": setting.corpus.account.held[i] if simulated else {},
            "rounds": m.rounds,
            "failures": m.failures,
            "bytes_down": m.bytes_down,
            "bytes_up": m.bytes_up,
            "first": m.first or None,
            "final": m.final or None,
            "personal": m.personal or None,
            "personalized": m.personalized or None,
            "alone": m.alone or None,
            **({"microbatch": m.microbatch} if m.microbatch else {}),
        }


def _untokenised(setting: Setting, client: int, trained: int) -> int | None:
    """How many of its training rows a client's tokenizer left out; None where it does not say.

    None, too, where it trained on more rows than the server dealt it: they are its node's own.
    """
    c = setting.config
    told = trained and not c.secure.aggregation and not c.privacy.on
    told = told and c.data.long_texts == "cut"  # else a row may be several examples
    dealt = len(setting.corpus.client(client).train)
    return dealt - trained if told and trained <= dealt else None


def validation_of(setting: Setting) -> dict[str, float] | None:
    """The loaded model, which is the run's result, on the central validation rows."""
    return score(setting, "central validation") if len(setting.corpus.validation) else None


ROOM = 1.5
"""How many times the base must fit into the memory that is free, to load it once more."""


def certify(setting: Setting, session: Session, adapter: Path) -> float | None:
    """How far adapter/, loaded with plain PEFT, is from the model, in units of rounding.

    None where there is no memory for a second base: `fedlora export` checks it as well.

    Raises:
        ModelError: by more than rounding.
    """
    base = sum(p.numel() * p.element_size() for p in setting.model.peft.parameters())
    if psutil.virtual_memory().available < ROOM * base:
        session.observer.note(f"{adapter} is not certified: no memory for a second base")
        return None
    loaded = load_exported(setting.config, setting.labels, adapter, merged=False)
    return certified(setting.model, loaded, adapter)


def write_records(
    setting: Setting,
    session: Session,
    run: Saved,
    stopped: str = "",
    written: Mapping[str, Any] = {},
) -> None:
    """Write clients.jsonl and summary.json, and tell the observer of warnings.

    `stopped` says why the run ended early, if it did.
    """
    c = setting.config
    setting.journal.clients(client_lines(setting, session, run))
    members = run.members.values()
    rounds = setting.journal.lines()
    final = score(setting) if c.evaluate.every else None
    picked = told_of(c, run, rounds[-1]["round"] if rounds else 0)
    warnings = judge(rounds, run.baselines, final if has_one_model(setting) else None)
    warnings = [*setting.corpus.account.warnings(), *warnings]
    setting.journal.summary(
        {
            "name": c.run.name,
            "strategy": c.strategy.name,
            "promise": setting.guarantee,
            "export_excess": written.get("excess"),
            "adapter": {key: written.get(key) for key in ("rank", "truncation")},
            "rounds": picked["chosen"]["last_round"] if picked else c.run.rounds,
            "seconds": seconds(session, run),
            "model": c.model.path,
            "data": " ".join(site.path for site in c.data.clients) or c.data.path,
            "rows": setting.corpus.account.record(),
            "seed": c.run.seed,
            "final": final,
            **picked,
            **({"validation": last} if (last := validation_of(setting)) else {}),
            "generation": generation(setting.model.tokenizer, c),
            "baselines": run.baselines,
            "bytes": {
                "down": sum(m.bytes_down for m in members),
                "up": sum(m.bytes_up for m in members),
            },
            "failures": sum(m.failures for m in members),
            "clients": {
                kind: spread([getattr(m, kind) for m in members])
                for kind in ("final", "personalized", "alone")
            },
            "virtual_seconds": run.clock or None,
            "sent": session.schemas.columns(),
            "privacy": privacy(c, rounds),
            "stopped": stopped,
            "warnings": warnings,
        }
    )
    if final:
        keep_parts(setting, "parts")
    if warnings:
        session.observer.note(said(warnings))


def has_one_model(setting: Setting) -> bool:
    """False where what clients keep was never averaged: then the server has half of a model."""
    return setting.guarantee != "shared" or setting.strategy.needs().collect_at_end
