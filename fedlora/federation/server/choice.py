"""What a run chooses by: scores on validation rows, never on test rows.

    after every round, 0 too:  scores on the central validation rows; where there are none, the
                               median of what the clients say of their own
    better                     by more than stop.min-delta; not a number is never better
    best round                 the last that was better than the best before it
    the run ends               after stop.patience rounds without a better one

The best round's checkpoint is kept beside the newest ones, and is the run's result with stop.best.
So a run that was killed goes on with what it had chosen, which `Saved.best` says.

The clients' scores are asked for in messages of their own after each round, and only where `[stop]`
needs them. They are a client's word: so of three or more it is the median, which fewer than half
that lie move no further than the others' scores go. It is not weighted by rows, which are a
client's word too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from flwr.serverapp import Grid

from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, StrategyError, UpdateError
from fedlora.federation.server.client_words import check_metrics, scores_of
from fedlora.federation.server.exchange import tag_of
from fedlora.federation.server.journal import OLDER, Journal, Member, Saved, state_types
from fedlora.federation.server.run import (
    Session,
    Setting,
    answers,
    client,
    connected,
    message,
    score,
)
from fedlora.federation.wire.codes import Refusal
from fedlora.federation.wire.messages import metrics_of
from fedlora.lora import tree_file
from fedlora.reports.outcome import JUDGED_BY, LOSS, PERPLEXITY, Metric, finite, judged_by
from fedlora.strategies.base import Round, Strategy, collects

Scores = Mapping[str, float]


def validated(
    setting: Setting, session: Session, run: Saved, grid: Grid, number: int
) -> dict[str, float] | None:
    """The run's model on the validation rows, after this round; None where there is none.

    The server's model is loaded with it. Where clients keep a part to themselves there is no one
    model for the central rows.

    Raises:
        StrategyError: after round 0, where the scores have not what stop.metric names.
    """
    config, found = setting.config, None
    if len(setting.corpus.validation) and not (number and setting.guarantee == "shared"):
        found = score(setting, "central validation")
    if config.stop.on and asks_clients(config, setting.guarantee):
        found = _of_clients(setting, session, run, grid, number)
    if config.stop.on and not number:
        check_metric(config, found)
    return found


def asks_clients(config: Config, guarantee: str) -> bool:
    """Are the clients' own rows what the run chooses by?"""
    own = bool(config.data.client_validation_fraction)
    return own and (guarantee == "shared" or not config.data.validates)


def _of_clients(
    setting: Setting, session: Session, run: Saved, grid: Grid, number: int
) -> dict[str, float] | None:
    """The median of the connected clients' scores on their own validation rows."""
    round = Round(number + 1, setting.config.run.seed)
    everyone = connected(setting, session, run)
    messages = (
        message(setting, session, run, c, round, "evaluate", rows="validation") for c in everyone
    )
    told = []
    for i, reply in answers(setting, session, grid, messages):
        try:
            tag_of(reply, client(setting, run, i), round, run.token, "evaluate")
            said = metrics_of(reply.content, "metrics")
            check_metrics(said)
        except (KeyError, UpdateError) as e:
            session.observer.client_failed(i, Refusal.of(e).reason)
            continue
        told += [scores] if (scores := scores_of(said, "validation.")) else []
    if not told:
        session.observer.note(f"round {number}: no client told how its validation rows fare")
        return None
    return {**middle(told), "clients": len(told)}


def middle(told: Sequence[Scores]) -> dict[str, float]:
    """The median of each score that more than half of the clients tell: no word of one client."""
    count = Counter(name for scores in told for name in scores)
    names = [name for name, n in count.items() if n > len(told) / 2]
    return {name: median([scores[name] for scores in told if name in scores]) for name in names}


# -- which round is best ---------------------------------------------------------------------------


def metric_of(config: Config, scores: Scores | None) -> Metric:
    """What these scores are compared by; a mean of perplexities is none, so there the loss."""
    name = config.stop.metric.lstrip("+-")
    if not name:
        found = judged_by([scores])
        return LOSS if found is PERPLEXITY else found
    known = {metric.key: metric for metric in (*JUDGED_BY, LOSS)}
    rising = config.stop.metric.startswith("+")
    return known.get(name) or Metric(name, name, share=False, rising=rising)


def check_metric(config: Config, scores: Scores | None) -> None:
    """Raises StrategyError where the scores lack what stop.metric names; before round 1."""
    metric = metric_of(config, scores)
    if scores and metric.key not in scores:
        there = ", ".join(key for key in scores if key not in ("examples", "clients"))
        raise StrategyError(
            f"stop.metric = {config.stop.metric!r}: validation rows are not scored so; there are "
            f"{there}"
        )


def judged(config: Config, best: Scores, number: int, scores: Scores | None) -> Scores:
    """`Saved.best` after a round: {"round", "value"} of the best one; empty where none was scored.

    best: that of the round before.
    """
    metric = metric_of(config, scores)
    value = finite(scores, metric.key)
    if value is None or not config.stop.on:
        return best
    edge = best.get("value")
    if edge is not None:
        edge += config.stop.min_delta if metric.more else -config.stop.min_delta
    if edge is None or metric.better(value, edge):
        return {"round": number, "value": value}
    return best


def over(config: Config, best: Scores, done: int) -> str:
    """Why the run ends after this round; empty where it goes on."""
    patience = config.stop.patience
    if not patience or not best or done - best["round"] < patience:
        return ""
    delta = f" by more than {config.stop.min_delta:g}" if config.stop.min_delta else ""
    return (
        f"after round {done}: in {patience} rounds no validation score was better{delta} than "
        f"round {best['round']:g}'s, {best['value']:.4g} (stop.patience)"
    )


# -- the result ------------------------------------------------------------------------------------


COLLECTED = "result.safetensors"


def chosen(config: Config, strategy: Strategy[Any], run: Saved) -> Saved:
    """The run with the state that is its result: the newest, or with stop.best the best round's.

    Raises:
        CheckpointError: the best round's checkpoint is gone or damaged.
    """
    if not config.stop.best or not run.best:
        return run
    directory, number = Journal(config).directory, int(run.best["round"])
    path = directory / "checkpoint" / f"round-{number:05}.safetensors"
    found = tree_file.load(path, Saved, Member, *state_types(strategy), older=OLDER)
    if not isinstance(found, Saved) or found.token != run.token:
        raise CheckpointError(f"{path}: it is no checkpoint of this run, and was its best round")
    return replace(run, state=found.state)


def keep_collected(config: Config, run: Saved) -> None:
    """Keep the state that what clients had kept was averaged into: no round's checkpoint has it."""
    journal = Journal(config)
    done = {"round": str(journal.lines()[-1]["round"])}
    tree_file.save(journal.directory / "checkpoint" / COLLECTED, run, done)


def result(config: Config, strategy: Strategy[Any], run: Saved, round: str) -> Saved:
    """The run with its result, as its adapter/ has it: `chosen`, or what was collected at its end.

    round: the last, of which `run` is the checkpoint. Before a run's end, its state so far.

    Raises:
        CheckpointError: the state that it needs is gone or damaged.
    """
    directory = Journal(config).directory
    path = directory / "checkpoint" / COLLECTED
    if not (collects(strategy) and path.exists()):
        last = path.with_name(f"round-{int(round):05}.safetensors")
        ended = (directory / "summary.json").exists()
        if collects(strategy) and ended and tree_file.is_sealed(last):
            raise CheckpointError(
                f"{path} is gone, which is what the run ended with: resume the run, and its end is "
                "made again"
            )
        return chosen(config, strategy, run)
    found = tree_file.load(path, Saved, Member, *state_types(strategy), older=OLDER)
    ended = tree_file.notes(path).get("round") == round  # and went on to no more rounds
    if not (isinstance(found, Saved) and found.token == run.token and ended):
        return run
    return replace(run, state=found.state)


def told_of(config: Config, run: Saved, done: int) -> dict[str, Any]:
    """What was chosen, under "chosen" for the summary; nothing where nothing was to be.

    done: the last round.
    """
    if not config.stop.on:
        return {}
    best = {"best_round": int(run.best["round"]), "value": run.best["value"]} if run.best else {}
    result = best.get("best_round", done) if config.stop.best else done
    found = {"metric": config.stop.metric, **best, "result": result, "last_round": done}
    return {"chosen": {**found, "ended": over(config, run.best, done)}}
