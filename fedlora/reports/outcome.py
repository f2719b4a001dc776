"""Judges a run: its main score, and warnings in sentences, none where all is well.

    low        the final score is no better than the majority class, than the frozen model under a
               trained head, or than the model before any training
    still      the training loss did not move
    diverged   a client's training loss was no finite number
    fallen     the final score is worse than the best round's, by more than noise
    unheard    a client's training hardly moved the model, round after round (server/heard.py)

Only records go in, as they lie in rounds.jsonl, so a run is judged alike however it ends, whether
it was resumed or not. What a run does not tell (no baselines, no central test, losses under DP)
speaks neither for nor against it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.reports.units import number, percent

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a run is judged by."""

    key: str
    title: str
    share: bool
    """Between 0 and 1, written as a percentage; more is better."""
    rising: bool = False
    """Of what is no share: is more better?"""

    def text(self, value: float | None) -> str:
        return percent(value) if self.share else number(value)

    @property
    def more(self) -> bool:
        """Is more better?"""
        return self.share or self.rising

    def better(self, value: float, other: float) -> bool:
        return value > other if self.more else value < other


MARGIN = Metric("margin", "margin", share=False, rising=True)
ACCURACY = Metric("accuracy", "accuracy", share=True)
EXACT_MATCH = Metric("exact_match", "exact match", share=True)
F1 = Metric("f1", "entity F1", share=True)
TOKENS = Metric("token_accuracy", "token accuracy", share=True)
PEARSON = Metric("pearson", "Pearson correlation", share=False, rising=True)
ROUGE_L = Metric("rouge_l", "ROUGE-L", share=True)
PERPLEXITY = Metric("perplexity", "perplexity", share=False)
LOSS = Metric("loss", "loss", share=False)

JUDGED_BY = (MARGIN, ACCURACY, F1, TOKENS, PEARSON, ROUGE_L, PERPLEXITY)
"""A run is judged by the first of these that anything of it has; else by the loss. Of preferences
by the margin: it is 0 before training, where the accuracy is rounding's."""

HEAD = "trained head only"
FLOORS = ("majority class", HEAD)
"""The baselines that cost no federation: a model that is not above them has learned nothing."""
STILL = 1e-4
"""A training loss that moves less than this, of its size, over all rounds did not move."""
ERRORS = 2.0
"""A share fell if it fell by more than so many standard errors of the difference."""
FALLEN = 0.05
"""What is no share, whose error is on no record, fell if it is worse by this much of the best."""
UNHEARD, UNHEARD_ROUNDS = 0.3, 3
"""A client is not heard if it counts less than this, of what it should, over so many rounds. Clean
runs of every strategy stayed above 0.4, clients that were dropped below 0.2."""
NAMED = 5
"""So many clients are named; the others are counted."""


def judge(
    rounds: Sequence[Record], baselines: Mapping[str, Record], final: Record | None
) -> list[str]:
    """What is wrong with a run, a sentence with its figures each; empty where nothing is.

    rounds: lines of rounds.jsonl. final: the central scores of the model that the run ended with,
    with their number of test rows as `examples`; None where there is no such model or test.
    """
    found = [*_still(rounds), *_diverged(rounds), *_unheard(rounds)]
    if not final:
        return found
    metric = judged_by([final])
    return [*_low(metric, rounds, baselines, final), *found, *_fallen(metric, rounds, final)]


def said(warnings: Sequence[str]) -> str:
    """The sentences as one line."""
    return f"warning: {' '.join(warnings)}"


def judged_by(scores: Sequence[Record | None]) -> Metric:
    """The first of JUDGED_BY that anything has, else the loss."""
    for metric in JUDGED_BY:
        if any(metric.key in found for found in scores if found):
            return metric
    return LOSS


def finite(found: Record | None, key: str) -> float | None:
    """found[key] if it is there and a finite number."""
    value = (found or {}).get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _low(
    metric: Metric, rounds: Sequence[Record], baselines: Mapping[str, Record], final: Record
) -> Iterator[str]:
    """Equal is no better: to say one class always scores what the majority class does. But where
    every row is right, a trained head that is as good is no sign that nothing was learned."""
    score = finite(final, metric.key)
    if score is None:
        yield f"The final {metric.title} is no finite number."
        return
    bars: dict[str, Record | None] = {name: baselines.get(name) for name in FLOORS}
    if metric.share and score == 1:
        del bars[HEAD]
    bars["untrained model"] = next((r["evaluation"] for r in rounds if not r["round"]), None)
    values = {name: finite(found, metric.key) for name, found in bars.items()}
    under = [
        f"{name} {metric.text(value)}"
        for name, value in values.items()
        if value is not None and not metric.better(score, value)
    ]
    if under:
        told = f"The final {metric.title}, {metric.text(score)}"
        yield f"{told}, is no better than: {', '.join(under)}."


def _still(rounds: Sequence[Record]) -> Iterator[str]:
    """It takes two rounds that have a training loss."""
    told = [(r["round"], finite(r, "train_loss")) for r in rounds if r["round"]]
    losses = [(n, loss) for n, loss in told if loss is not None]
    sizes = [loss for _, loss in losses]
    if len(losses) > 1 and max(sizes) - min(sizes) < STILL * max(map(abs, sizes)):
        (first, begun), (last, ended) = losses[0], losses[-1]
        yield (
            f"The training loss never moved: {number(begun)} in round {first}, {number(ended)} in "
            f"round {last}."
        )


def _diverged(rounds: Sequence[Record]) -> Iterator[str]:
    first: dict[int, int] = {}
    for r in rounds:
        for client in r.get("loss_not_finite") or ():
            first.setdefault(client, r["round"])
    if first:
        named = [f"client {c} (first in round {n})" for c, n in sorted(first.items())]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        yield f"The training loss was no finite number: {', '.join(named[:NAMED])}{more}."


def _unheard(rounds: Sequence[Record]) -> Iterator[str]:
    """On average over UNHEARD_ROUNDS at least: in one round alone clean runs reach it by chance."""
    seen: dict[str, list[float]] = {}
    for r in rounds:
        for client in (r.get("certificate") or {}).get("heard") or {}:
            if (ratio := finite(r["certificate"]["heard"], client)) is not None:
                seen.setdefault(client, []).append(ratio)
    means = {c: sum(x) / len(x) for c, x in seen.items() if len(x) >= UNHEARD_ROUNDS}
    few = {c: mean for c, mean in means.items() if mean < UNHEARD}
    if few:
        named = [f"client {c} ({percent(max(x, 0.0))})" for c, x in sorted(few.items())]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        yield (
            "What these clients trained hardly moved the model, of what it should have: "
            f"{', '.join(named[:NAMED])}{more}."
        )


def _fallen(metric: Metric, rounds: Sequence[Record], final: Record) -> Iterator[str]:
    """Round 0 is no round of the federation; it is a bar of `_low`."""
    told = [(r["round"], finite(r["evaluation"], metric.key)) for r in rounds if r["round"]]
    scores = [(n, value) for n, value in told if value is not None]
    score = finite(final, metric.key)
    if score is None or not scores:
        return
    best_round, best = (max if metric.share else min)(scores, key=lambda s: s[1])
    if metric.better(best, score) and abs(best - score) > _noise(metric, best, score, final):
        yield (
            f"The run ended worse than its best round, by more than noise: {metric.title} "
            f"{metric.text(score)}, after {metric.text(best)} in round {best_round}."
        )


def _noise(metric: Metric, best: float, score: float, final: Record) -> float:
    """How far apart two scores may be by chance.

    Of shares p, q of n test rows, ERRORS sqrt((p (1 - p) + q (1 - q)) / n): the error as if each
    had rows of its own. They share them, which makes it smaller; that one of them is the best of
    many makes it larger.
    """
    if not metric.share:
        return FALLEN * abs(best)
    return ERRORS * math.sqrt((best * (1 - best) + score * (1 - score)) / final["examples"])
