"""The server's loop over the rounds, for any strategy.

    meet the clients -> check the strategy -> [first gradients] -> evaluate
    each round:  sample -> send -> take replies as they come, each checked -> aggregate
                 -> the stages close: proof, certificate, ... -> evaluate -> checkpoint
    collect what stays with the clients, if the strategy wants it once -> final evaluation

Flower's own `Strategy.start` has no resume, no seed, no deadline, and ends with any exception; so
this loop is its own, and `FederatedLora` no Flower strategy: Flower's loop would skip the stages.
What a client sends is checked before it counts, and whatever is wrong with one reply costs that
reply alone.
"""

import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any

from flwr.app import MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedlora.config.reader import Config
from fedlora.errors import BudgetSpent, DeviceMemoryError, NotFiniteError
from fedlora.federation.server import asynchronous, secure_rounds, synchronous
from fedlora.federation.server.bounds import check_finite, stricter
from fedlora.federation.server.choice import judged, over, validated
from fedlora.federation.server.chosen_places import with_places
from fedlora.federation.server.ends import told
from fedlora.federation.server.exchange import Received
from fedlora.federation.server.finish import finish
from fedlora.federation.server.journal import Member, Saved, state_types
from fedlora.federation.server.one_writer import only_writer
from fedlora.federation.server.roster import is_simulated
from fedlora.federation.server.run import (
    Session,
    Setting,
    base_number,
    clients,
    keep_parts,
    load,
    score,
    seconds,
    too_few,
    weighted,
)
from fedlora.federation.server.setup import begin, check_model, look, meet
from fedlora.federation.server.stages import Stage, stages
from fedlora.federation.wire.codes import FailureKind
from fedlora.federation.wire.messages import pack_factors
from fedlora.privacy.central import CentralPrivacy
from fedlora.reports.console import Observer, Silent
from fedlora.reports.observers import watched
from fedlora.strategies.base import Round, Upload, seeded
from fedlora.training.begun_with import begun_with, check_begun_with
from fedlora.training.devices import OutOfMemory, chosen, name_of

Record = dict[str, Any]


@contextmanager
def enough_memory(config: Config) -> Iterator[None]:
    """Raises DeviceMemoryError, with what to do, where the server's device runs out of memory.

    A client that does so begins again with half, and its error is no end of the run.
    """
    try:
        yield
    except OutOfMemory as e:
        raise DeviceMemoryError(
            f"the server: {name_of(chosen(config.simulate.devices))} is out of memory in an "
            "evaluation, a calibration or the check of its model; lower evaluate.batch-size, "
            "train.microbatch or data.max-length, or use a smaller base"
        ) from e


class FederatedLora:
    """Runs the config's federated LoRA algorithm on a Flower grid.

    The config is one that can run: `fedlora.launch.federation` checks it first. Results are in the
    run's directory; `Result.arrays` is the final adapter.
    """

    def __init__(
        self,
        config: Config,
        observer: Observer | None = None,
        changes: Mapping[str, Any] = {},
    ) -> None:
        self.setting = Setting.of(config, changes)
        self.observer: Observer = observer or Silent()
        self.session = Session.of(self.setting, self.observer)
        self.run = Saved("", None, {}, {}, 0.0)
        self.around: Sequence[Stage] = ()

    def start(self, grid: Grid) -> Result:
        """Run all the rounds that are left, and leave everything in the run's directory.

        Raises:
            StrategyError: the strategy cannot do what the config asks; before round 1.
            RoundError: fewer than round.min-replies answered; the checkpoint is intact. Where all
                others say that their privacy budget is spent, the run ends in good order instead.
            ProofError: an aggregation that promises to be exact was not.
            CheckpointError: the run's directory is another's, or another process writes it.
            DeviceMemoryError: the server's own work does not fit on its device.
        """
        config, directory = self.setting.config, self.setting.journal.directory
        with (
            only_writer(directory),
            enough_memory(config),
            watched(self.observer, config, directory) as observer,
        ):
            self.session = Session.of(self.setting, observer)
            done, result, stopped = self.begin(grid), Result(), ""
            for number in range(done + 1, config.run.rounds + 1):
                if ended := over(config, self.run.best, number - 1):
                    observer.note(f"ended {ended}")
                    break
                try:
                    self.run, record = play_round(
                        self.setting, self.session, self.run, self.around, grid, number
                    )
                except BudgetSpent as e:
                    stopped = f"before round {number}: {e}"
                    observer.note(f"stopped {stopped}")
                    break
                observer.round_done(record)
                _note(result, number, record)
            self.run = finish(self.setting, self.session, self.run, grid, stopped)
        effective = self.setting.strategy.effective(self.run.state)
        result.arrays = pack_factors(effective.factors, "float32")
        return result

    def begin(self, grid: Grid) -> int:
        """Begin or resume the run, and meet its clients; the last finished round."""
        setting, session = self.setting, self.session
        session.simulated = is_simulated(grid)
        done, self.run = begin_or_resume(setting, session)
        self.run = meet(setting, session, self.run, grid)
        if done < 0:
            self.setting = setting = with_places(setting, session, self.run, grid)
            self.run, record = round_zero(setting, session, self.run, grid)
            session.observer.round_done(record)
        elif done < setting.config.run.rounds:  # maybe on another machine than it began on
            check_model(setting, session, self.run, done + 1)
        self.around = stages(setting, session)
        return max(done, 0)

    def round(self, grid: Grid, number: int) -> Record:
        """Play one round by itself, once the run has begun; its line of rounds.jsonl."""
        self.run, record = play_round(
            self.setting, self.session, self.run, self.around, grid, number
        )
        self.session.observer.round_done(record)
        return record


def _note(result: Result, number: int, record: Record) -> None:
    if (loss := record["train_loss"]) is not None:  # no client may tell it under DP
        result.train_metrics_clientapp[number] = MetricRecord({"loss": loss})
    if scores := record["evaluation"]:
        result.evaluate_metrics_serverapp[number] = MetricRecord(dict(scores))


def begin_or_resume(setting: Setting, session: Session) -> tuple[int, Saved]:
    """The last finished round, -1 for a fresh run, and what its checkpoint holds."""
    config, journal = setting.config, setting.journal
    done, saved = -1, None
    if config.run.resume:
        done, saved = journal.resume(Saved, Member, *state_types(setting.strategy))
    else:
        journal.open()
    run: Saved = saved or Saved(uuid.uuid4().hex, None, {}, {}, 0.0)
    session.central = CentralPrivacy.of(config, run.clip)
    if run.buffer:
        everyone = {c.id: c for c in clients(setting, run)}
        session.flights.restore(run.buffer, everyone, config.run.seed)
    here = begun_with(setting.model, setting.corpus)
    if saved:
        check_begun_with(journal.begun_with(), here, journal.directory)
        for line_ in (
            *(f"{e}; that round is made again" for e in journal.damaged),
            f"resuming {journal.directory} after round {done}",
            *journal.kept(),
            *told(config, done),
        ):
            session.observer.note(line_)
    else:
        journal.keep_begun_with(here)
    return done, run


def round_zero(setting: Setting, session: Session, run: Saved, grid: Grid) -> tuple[Saved, Record]:
    """Put round 0 on record: the first state, and the model's scores before any training."""
    begun = time.perf_counter()
    run = moved(begin(setting, session, run, grid), session.beforehand)
    run, *scores = scored(setting, session, run, grid, 0)
    if scores[0] and setting.model.task.answers:
        keep_parts(setting, "parts-before")
    record = line(0, session.received(), [], *scores)
    record |= {"strategy": setting.config.strategy.name, "proof": None, "certificate": None}
    record |= {"start": session.start} if session.start else {}
    down, up = (sum(x[way] for x in session.beforehand.values()) for way in (0, 1))
    record["bytes"] = {"down": down, "up": up}
    if session.central:
        record["privacy"] = session.central.record()
    record["seconds"] = {"total": time.perf_counter() - begun}
    commit(setting, session, run, 0, record)
    return run, record


def moved(run: Saved, beforehand: Mapping[int, tuple[int, int]]) -> Saved:
    """The run with these bytes down and up on its members' accounts."""
    members = dict(run.members)
    for i, (down, up) in beforehand.items():
        m = members[i]
        members[i] = replace(m, bytes_down=m.bytes_down + down, bytes_up=m.bytes_up + up)
    return replace(run, members=members)


def play_round(
    setting: Setting,
    session: Session,
    run: Saved,
    around: Sequence[Stage],
    grid: Grid,
    number: int,
    again: str = "",
) -> tuple[Saved, Record]:
    """One round, from sampling to checkpoint; the run after it, and its line of rounds.jsonl.

    again: why it is not the first attempt, for the record. Else `play_again` follows one whose new
    state is not finite.
    """
    begun = time.perf_counter()
    round, config = Round(number, setting.config.run.seed), setting.config
    run = gather(setting, session, run, grid)
    cohort = clients(setting, run, sample(setting, session, run, round))
    seen = clients(setting, run) if config.round.buffer or not cohort else cohort
    for stage in around:
        stage.open(run, seen, round)
    session.observer.round_started(number, [c.id for c in cohort])
    received = session.received()
    uploads = collected(setting)(setting, session, run, grid, cohort, round, received)
    for stage in around:
        uploads = stage.uploads(uploads, run, round, received)
    some, uploads = peeked(uploads)  # the strategy draws them, and so drives the replies
    state = setting.strategy.aggregate(run.state, uploads, round) if some else run.state
    check_enough(setting, session, uploads, round, received, some)
    after, aggregated = replace(run, state=state), time.perf_counter()
    try:
        check_finite(setting, after, round)  # first: a proof of it would fail for another reason
        for stage in around:
            after = stage.close(run, after, round, received)
        check_finite(setting, after, round)
    except NotFiniteError as e:
        if again:
            raise
        return play_again(setting, session, run, grid, number, e)
    closed = time.perf_counter()
    after = credit(setting, session, after, received, base_number(setting, run.state))
    after, *scores = scored(setting, session, after, grid, number)
    done = time.perf_counter()
    record = line(number, received, [c.id for c in cohort], *scores)
    record["strategy"] = config.strategy.name
    if again:
        record["again"] = again
    for stage in around:
        record |= stage.record()
    record["seconds"] = {
        "clients": received.waited,
        "aggregate": aggregated - begun - received.waited,
        "proof": closed - aggregated,
        "evaluate": done - closed,
        "total": time.perf_counter() - begun,
    }
    commit(setting, session, after, number, record)
    return after, record


def play_again(
    setting: Setting, session: Session, run: Saved, grid: Grid, number: int, why: NotFiniteError
) -> tuple[Saved, Record]:
    """A round whose new state is not finite, from its beginning, without those who stand out.

    Raises:
        NotFiniteError: nobody does, or it is not finite without them either.
    """
    if not (bound := stricter(setting, session)):
        raise why
    again = f"{why}. It is played again from there, under round.norm-bound = {bound:g}"
    session.observer.note(again)
    around = stages(setting, session, bound)
    return play_round(setting, session, run, around, grid, number, again)


def gather(setting: Setting, session: Session, run: Saved, grid: Grid) -> Saved:
    """Meet the connected clients, wait for those that left, and plan this round's ranks."""
    run = look(setting, session, run, grid)
    for _ in session.roster.wait(setting.config.round.wait_for_clients):
        run = look(setting, session, run, grid)
    return replace(run, members=setting.planner.replan(run.members))


def sample(setting: Setting, session: Session, run: Saved, round: Round) -> list[int]:
    """The round's cohort, from (seed, round) and the clients that are connected."""
    most = setting.config.round.quarantine_after or float("inf")
    busy, n = session.flights.of, setting.config.clients.per_round
    there = sorted(
        i
        for i, m in run.members.items()
        if i in session.nodes and i not in busy and m.offences < most
    )
    if session.central and session.central.poisson:
        return session.central.cohort(there, round)
    if not n or n - len(busy) >= len(there):
        return there
    chance = random.Random(seeded(round.seed, round.number, 0, "sample").initial_seed())
    return sorted(chance.sample(there, max(0, n - len(busy))))


def collected(setting: Setting) -> Callable[..., Iterator[Upload]]:
    """How a round's updates come in."""
    if setting.config.secure.aggregation:
        return secure_rounds.uploads
    return asynchronous.uploads if setting.config.round.buffer else synchronous.uploads


def peeked(uploads: Iterator[Upload]) -> tuple[bool, Iterator[Upload]]:
    """Whether there is any, and all of them; none is held once it is handed over."""
    first = list(islice(uploads, 1))
    return bool(first), chain((first.pop() for _ in range(len(first))), uploads)


def check_enough(
    setting: Setting,
    session: Session,
    uploads: Iterator[Upload],
    round: Round,
    received: Received,
    some: bool,
) -> None:
    """Read the uploads that the strategy left unread, and check that enough counted.

    Raises:
        RoundError, BudgetSpent: too few updates count.
    """
    for _ in uploads:
        pass
    least = setting.config.round.min_replies
    enough = 0 if session.central and session.central.poisson else least
    if not some or len(received.accepted) < enough:
        what = f"{len(received.accepted)} updates were accepted, round.min-replies = {least}"
        raise too_few(setting, what, round, received)


def credit(
    setting: Setting, session: Session, run: Saved, received: Received, version: int
) -> Saved:
    """Note what each client has now: only an accepted reply moves its memory on.

    version: of the base that was sent.
    """
    members, most = dict(run.members), setting.config.round.quarantine_after
    for failure in received.failures:
        if (m := members.get(failure["client"])) is None:
            continue
        if failure["kind"] == FailureKind.LACKS_BASE:
            session.lacking.add(m.id)
        offence = failure["kind"] == FailureKind.BAD
        members[m.id] = m = replace(m, failures=m.failures + 1, offences=m.offences + int(offence))
        if offence and m.offences == most:
            session.observer.note(f"client {m.id} is asked no more: {most} bad updates")
    for i, facts in received.clients.items():
        session.lacking.discard(i)
        m = setting.planner.learned(members[i], facts, received.virtual.get(i))
        members[i] = _credited(m, facts, version)
    return replace(run, members=members)


def _credited(m: Member, facts: Mapping[str, Any], version: int) -> Member:
    return replace(
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
        microbatch=facts.get("microbatch", m.microbatch),
        ledger=_number(facts, "ledger") or m.ledger,
        charges=_number(facts, "charges") or m.charges,
    )


def _number(facts: Mapping[str, Any], key: str) -> int:
    """What a client says of its privacy ledger; 0 of anything that is no whole number."""
    x = (facts["privacy"] or {}).get(key, 0.0)
    return int(x) if 0 < x < 2**31 else 0


def evaluated(setting: Setting, number: int) -> dict[str, float] | None:
    """The loaded model on the central test rows, in the rounds that the config asks for.

    Where clients keep a part to themselves there is no one model to evaluate in a round.
    """
    every, last = setting.config.evaluate.every, number >= setting.config.run.rounds
    if not every or (number % every and not last):
        return None
    if number and setting.guarantee == "shared":
        return None
    return score(setting)


Scores = Mapping[str, float] | None


def scored(
    setting: Setting, session: Session, run: Saved, grid: Grid, number: int
) -> tuple[Saved, Scores, Scores]:
    """The run, with its best round, and its model's scores on the test and validation rows."""
    load(setting, session, run, run.state)
    test = evaluated(setting, number)
    validation = validated(setting, session, run, grid, number)
    best = judged(setting.config, run.best, number, validation)
    return replace(run, best=best), test, validation


def line(
    number: int,
    received: Received,
    cohort: list[int],
    scores: Scores,
    validation: Scores = None,
) -> Record:
    """A round's line of rounds.jsonl, without what its stages add."""
    told = {i: received.clients[i] for i in sorted(received.clients)}
    mean = weighted(told.values(), "train_loss")
    found: Record = {
        "round": number,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "train_loss": mean if received.loss is None else received.loss,
        "evaluation": scores,
        "cohort": cohort,
        "accepted": sorted(received.accepted),
        "failures": received.failures,
        "clients": told,
        "bytes": {
            "down": sum(received.down.values()),
            "up": sum(c["bytes_up"] for c in told.values()),
        },
    }
    if validation:
        found["validation"] = validation
    if received.secure:
        found["secure"] = received.secure
    if received.stale:
        found["staleness"] = received.stale
    if received.diverged:
        found["loss_not_finite"] = sorted(received.diverged)
    return found


def commit(
    setting: Setting, session: Session, run: Saved, number: int, record: Mapping[str, Any]
) -> None:
    """Put a round on record: the checkpoint, then its line."""
    buffer = session.flights.saved() if setting.config.round.buffer else {}
    saved = replace(run, seconds=seconds(session, run), buffer=buffer)
    keep = int(run.best.get("round", 0)) if setting.config.stop.best else number
    setting.journal.commit(number, saved, record, keep)
